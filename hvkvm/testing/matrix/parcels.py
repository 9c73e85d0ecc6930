"""Files that go with a case to another host, each known by the SHA-256 of its content.

A configuration's paths become names of parcels where it is sent, and paths of that host's
store where it arrives. A folder of modules travels as one archive. Any thread, any number
of processes: a parcel appears whole in a store or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig

CHUNK_BYTES = 8 << 20
PREFIX = "parcel:"
"""Begins the name of a parcel in a configuration that is on its way."""
FILES = ("kernel", "initrd", "busybox", "warm")
"""Fields that name one file of this host."""
_ARCHIVE = ".tar"
_HEX = frozenset("0123456789abcdef")


class Parcel(NamedTuple):
    """A file that can be sent."""

    digest: str
    path: Path
    size: int


def digest_of(path: Path) -> str:
    """The name of a file's content: SHA-256 in hexadecimal. OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Sender:
    """Knows what configurations name, by content. Makes archives in `folder`. Owner: one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path, str] = {}
        self.parcels: dict[str, Parcel] = {}

    def packed(self, config: MachineConfig) -> MachineConfig:
        """`config` with names of parcels for its files. ConfigError for a file that cannot travel."""
        changes: dict[str, object] = {}
        for key in FILES:
            path = getattr(config, key)
            if path is not None:
                changes[key] = Path(self.add(path))
        if config.modules_dir is not None:
            wanted = config.modules or config.awaits
            changes["modules_dir"] = Path(self.add(config.modules_dir)) if wanted else None
        changes["files"] = tuple((guest, Path(self.add(host))) for guest, host in config.files)
        changes["disks"] = tuple(disk._replace(file=self._image(disk.file)) for disk in config.disks)
        changes["cdroms"] = tuple(
            drive._replace(file=drive.file and self._image(drive.file)) for drive in config.cdroms
        )
        for disk in config.disks:
            if disk.faults is not None:
                raise ConfigError(f"--disk {disk.file}: faults= does not travel to a worker; leave it out")
        if config.firmware not in (None, "auto") or config.firmware_vars is not None:
            raise ConfigError("--firmware: a file of it does not travel to a worker; write firmware = 'auto'")
        return config._replace(**changes)  # type: ignore[arg-type]

    def _image(self, name: str) -> str:
        return name if name.startswith("nbd:") else self.add(Path(name))

    def add(self, path: Path) -> str:
        """The name of what is at `path`, which can be sent from now on. ConfigError."""
        if path not in self._names:
            try:
                self._names[path] = self._packed_folder(path) if os.path.isdir(path) else self._file(path, "")
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}; make it readable for this user") from None
        return self._names[path]

    def _file(self, path: Path, end: str) -> str:
        digest = digest_of(path)
        self.parcels[digest] = Parcel(digest, path, path.stat().st_size)
        return f"{PREFIX}{digest}{end}/{path.name}"

    def _packed_folder(self, folder: Path) -> str:
        archive = self._folder / f"{len(self._names)}{_ARCHIVE}"
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as out:
            # In order and without times, so that the same content is the same archive.
            for path in sorted(folder.rglob("*")):
                if os.path.isfile(path):
                    entry = tarfile.TarInfo(str(path.relative_to(folder)))
                    entry.size = path.stat().st_size
                    with path.open("rb") as file:
                        out.addfile(entry, file)
        packed = self._file(archive, _ARCHIVE)
        return f"{packed.rpartition('/')[0]}/{folder.name}"

    def chunks(self, digest: str) -> Iterator[bytes]:
        """The content of a parcel."""
        with self.parcels[digest].path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield data


class Store:
    """The parcels that a host has, in `root`."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or cache.root() / "parcels"

    def path(self, digest: str) -> Path:
        """Where a parcel is, or would be."""
        if len(digest) != 64 or not _HEX.issuperset(digest):
            raise ValueError(f"{digest!r} names no parcel")
        return self._root / digest

    def missing(self, digests: list[str]) -> list[str]:
        """Those that are not there."""
        return [digest for digest in digests if not self.path(digest).exists()]

    def receive(self, digest: str, key: str, data: bytes, last: bool) -> None:
        """Put `data` behind what came of this parcel under `key` before. ValueError for other content."""
        partial = self.path(digest).with_suffix(f".{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("ab") as file:
                file.write(data)
        except OSError:
            partial.unlink(missing_ok=True)  # a full disk: what came would stay there for good
            raise
        if last:
            try:
                if digest_of(partial) != digest:
                    raise ValueError(f"parcel {digest} has come with another content")
                os.replace(partial, self.path(digest))
            finally:
                partial.unlink(missing_ok=True)

    def unpacked(self, config: MachineConfig) -> MachineConfig:
        """`config` with paths of this store for its names of parcels."""
        changes: dict[str, object] = {
            key: Path(self._found(str(getattr(config, key))))
            for key in (*FILES, "modules_dir")
            if getattr(config, key) is not None
        }
        changes["files"] = tuple((guest, Path(self._found(str(host)))) for guest, host in config.files)
        changes["disks"] = tuple(disk._replace(file=self._found(disk.file)) for disk in config.disks)
        changes["cdroms"] = tuple(drive._replace(file=self._found(drive.file)) for drive in config.cdroms)
        return config._replace(**changes)  # type: ignore[arg-type]

    def _found(self, name: str) -> str:
        if not name.startswith(PREFIX):
            return name
        digest, _slash, own = name.removeprefix(PREFIX).partition("/")
        if not digest.endswith(_ARCHIVE):
            return str(self.path(digest))
        return str(self._unpacked_folder(digest.removesuffix(_ARCHIVE), own))

    def _unpacked_folder(self, digest: str, own: str) -> Path:
        """The modules' folder: its name, the kernel's version, counts."""
        archive = self.path(digest)
        folder = self._root / f"{digest}.d"
        if not folder.exists():
            made = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=self._root))
            try:
                _unpack(archive, made / own)
            except BaseException:
                _remove(made)
                raise
            try:
                os.rename(made, folder)
            except OSError:
                _remove(made)  # another process was faster
        return folder / own


def _unpack(archive: Path, folder: Path) -> None:
    """Files alone, each below `folder`, whatever the archive says."""
    with tarfile.open(archive) as packed:
        for entry in packed:
            parts = Path(entry.name).parts
            content = packed.extractfile(entry) if entry.isfile() else None
            if content is None or ".." in parts or os.path.isabs(entry.name):
                continue
            path = folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                shutil.copyfileobj(content, out)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def names_of(config: MachineConfig) -> list[str]:
    """The digests of all parcels that a packed configuration needs."""
    found: list[object] = [getattr(config, key) for key in (*FILES, "modules_dir")]
    found += [host for _guest, host in config.files]
    found += [disk.file for disk in config.disks]
    found += [drive.file for drive in config.cdroms]
    digests = [
        str(name).removeprefix(PREFIX).partition("/")[0].removesuffix(_ARCHIVE)
        for name in found
        if str(name).startswith(PREFIX)
    ]
    return list(dict.fromkeys(digests))
