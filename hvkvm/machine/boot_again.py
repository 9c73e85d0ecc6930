"""What a saved machine was booted from, so that a reset behind its restore can boot it anew.

The file has names and marks, not the kernel itself. It may come from anybody: what it names is loaded
only if that is what was booted when it was saved, told by time and size for a kernel, which the guest
gets only if it is one, and by a checksum for the initial RAM disk, which the guest gets as it is.

Called by whoever makes the machine, by the thread that writes a save, and on the I/O loop at a reset.
"""

from __future__ import annotations

from _blake2 import blake2b  # of `hashlib`, which loads OpenSSL: every run would have that at its start
from pathlib import Path

from hvkvm.errors import HvkvmError
from hvkvm.machine.config import MachineConfig
from hvkvm.state.manifest import SavedBoot

_PIECE = 1 << 20


def recipe(config: MachineConfig, ramdisk: bytes | Path | None) -> SavedBoot | None:
    """How to boot what `config` boots, with `ramdisk`; None where a reset cannot. OSError.

    Not with firmware.
    """
    if config.kernel is None or config.firmware is not None:
        return None
    mark = config.kernel.stat()
    return SavedBoot(
        str(config.kernel.absolute()),
        mark.st_size,
        mark.st_mtime_ns,
        _name(config.initrd),
        config.command,
        _name(config.modules_dir),
        config.modules,
        _name(config.busybox),
        tuple((guest, str(host.absolute())) for guest, host in config.files),
        _checksum(ramdisk),
    )


def configuration(config: MachineConfig, boot: SavedBoot) -> MachineConfig:
    """`config`, of a machine that goes on from a file, with what the file says was booted.

    A warm guest's is as it was booted then, to wait for its command.
    """
    return config._replace(
        kernel=Path(boot.kernel),
        initrd=_path(boot.initrd),
        command=boot.command,
        modules_dir=_path(boot.modules_dir),
        modules=boot.modules,
        busybox=_path(boot.busybox),
        files=tuple((guest, Path(host)) for guest, host in boot.files),
    )


def handed_command(config: MachineConfig, booted: MachineConfig) -> MachineConfig:
    """`booted`, of `configuration`, with the command and files that `config` has for a warm guest."""
    if not booted.awaits or not config.command:
        return booted
    files = {**dict(booted.files), **dict(config.files)}
    return booted._replace(awaits=False, command=config.command, files=tuple(files.items()))


def why_no_kernel(boot: SavedBoot, room: int) -> str:
    """Why what `boot` names is not what was booted, or must not be read; "". `room`: bytes of guest RAM."""
    for name in filter(
        None, (boot.kernel, boot.initrd, boot.busybox, *(host for _guest, host in boot.files))
    ):
        path = Path(name)
        try:
            if not path.is_file():
                return f"{name[:200]!r} is no file any more"
            if path.stat().st_size > room:
                return f"{name[:200]!r} has more bytes than the guest has RAM"
        except (OSError, ValueError) as error:
            return f"{name[:200]!r}: {error}"
    mark = Path(boot.kernel).stat()
    if (mark.st_size, mark.st_mtime_ns) != (boot.kernel_size, boot.kernel_changed):
        return f"{boot.kernel[:200]!r} has changed since it was saved"
    return ""


def why_no_ramdisk(boot: SavedBoot, ramdisk: bytes | Path | None) -> str:
    """Why `ramdisk` is not what was booted; ""."""
    try:
        same = _checksum(ramdisk) == boot.ramdisk
    except (OSError, HvkvmError) as error:
        return str(error)
    return "" if same else "what its initial RAM disk is made of has changed since it was saved"


def _checksum(ramdisk: bytes | Path | None) -> bytes:
    if ramdisk is None:
        return b""
    digest = blake2b(digest_size=32)
    if isinstance(ramdisk, bytes):
        digest.update(ramdisk)
    else:
        with ramdisk.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.digest()


def _name(path: Path | None) -> str:
    return "" if path is None else str(path.absolute())


def _path(name: str) -> Path | None:
    return Path(name) if name else None
