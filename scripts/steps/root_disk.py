"""A root file system of the distribution, made of its packages: a raw disk, its kernel and its initramfs.

Why: a guest that lives on hv_storvsc wants a whole distribution, and none shall be downloaded as an image.
mmdebstrap installs the packages, in a user namespace wherever this machine lets one be made, so that the
packages' own XX who owns what. Called by `scripts/root-disk`.

What is made is kept by its content: the packages with their versions, and this recipe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache, vmlinux
from steps.distribution import Archive, StepError, fetching, release_codename, say

SETTINGS = Path(__file__).with_name("root_disk_settings.sh")

_SYSTEM = (
    "systemd-sysv udev dbus libpam-systemd login passwd linux-image-cloud-amd64 initramfs-tools kmod"
    " hyperv-daemons openssh-server e2fsprogs logsave iproute2 iputils-ping procps less"
)
_FOR_TESTS = "xfsprogs btrfs-progs fio sg3-utils sdparm ethtool pciutils nvme-cli"
"""What tests of disks and networks use in the guest; it makes the disk a tenth larger."""
PACKAGES = (*_SYSTEM.split(), *_FOR_TESTS.split())

_LEFT_OUT = (
    *(f"/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")),
    # Every initramfs would look for btrfs, and time its checksums first: seconds of each boot.
    "/usr/share/initramfs-tools/hooks/btrfs",
    "/usr/share/initramfs-tools/scripts/local-premount/btrfs",
)
_EARLY = """mkdir -p "$1/etc/initramfs-tools/conf.d"
echo FSTYPE=ext4 >"$1/etc/initramfs-tools/conf.d/fsck-for-root"
"""
"""Read when the packages make the initramfs: it holds fsck for these file systems."""
_RECIPE = 1
"""Counted up when this file makes another disk of the same packages."""
_SPACE = 1 << 30
"""Bytes of the disk beyond what the packages take; the file has a hole there."""
MOST = 3
"""Disks that are kept, some 500 MiB each: those that were asked for last."""
_ABANDONED = 24 * 3600.0
"""Seconds after which what was begun and is not done never will be."""
_TOOLS = {"mmdebstrap": "mmdebstrap", "fakeroot": "fakeroot", "mke2fs": "e2fsprogs", "tar": "tar"}


class RootDisk(NamedTuple):
    """The files of one, all in one folder of the cache; the disk is sparse and never written to."""

    disk: Path
    kernel: Path
    initrd: Path
    packages: Path

    @classmethod
    def of(cls, folder: Path) -> RootDisk:
        """Those of `folder`."""
        return cls(folder / "disk.raw", folder / "vmlinuz", folder / "initrd.img", folder / "packages")


def root_disk(suite: str | None = None, *, update: bool = False, offline: bool = False) -> RootDisk:
    """The disk, made first when the cache lacks it. StepError when it cannot be.

    `update` looks for newer packages, `offline` makes nothing.
    """
    suite = suite or release_codename()
    note = cache.root() / "resolved" / f"{suite}-root.json"
    recipe = _recipe()
    kept = None if update else _noted(note, recipe)
    if kept is not None:
        with contextlib.suppress(OSError):  # a cache that is only read
            os.utime(kept.disk.parent)
        return kept
    if offline:
        option = "" if suite == release_codename() else f"--suite {suite} "
        raise StepError(f"no root disk of {suite} in the cache; run scripts/root-disk {option}make")
    _check_tools()
    archive = Archive(suite)
    with fetching():
        archive.refresh()
        packages = _closure(archive)
    key = hashlib.sha256("\n".join([recipe, *packages]).encode()).hexdigest()[:32]
    folder = cache.root() / "root" / f"{suite}-{key}"
    if not folder.is_dir():
        _make(archive, packages, key, folder)
    cache.publish(note, [json.dumps({"folder": folder.name, "recipe": recipe}).encode()])
    os.utime(folder)
    _forget_old(folder.parent)
    return RootDisk.of(folder)


def _forget_old(folder: Path) -> None:
    """Remove the disks beyond the MOST that were asked for last. A VM that runs keeps what it has open."""
    by_age: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process forgets, too
            by_age.append((path.stat().st_mtime, path))
    by_age.sort(reverse=True)
    begun = [one for one in by_age if one[1].name.startswith(".")]
    made = [one for one in by_age if not one[1].name.startswith(".")]
    late = time.time() - _ABANDONED
    for _when, path in [*made[MOST:], *(one for one in begun if one[0] < late)]:
        shutil.rmtree(path, ignore_errors=True)


def _recipe() -> str:
    """What beside the packages decides about the disk, as one word."""
    parts = (str(_RECIPE), " ".join(PACKAGES), " ".join(_LEFT_OUT), _EARLY, _FILL, SETTINGS.read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _noted(note: Path, recipe: str) -> RootDisk | None:
    try:
        seen = json.loads(note.read_text())
        disk = RootDisk.of(cache.root() / "root" / str(seen["folder"]))
        return disk if seen["recipe"] == recipe and all(map(Path.is_file, disk)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_tools() -> None:
    missing = sorted(package for tool, package in _TOOLS.items() if shutil.which(tool) is None)
    if missing:
        raise StepError(f"a disk is made with {', '.join(missing)}, not installed here; run scripts/setup")


def _closure(archive: Archive) -> list[str]:
    """The packages that will be in it, each with its version, as apt would take them now. StepError."""
    text = archive.simulated_install("?essential", "?priority(required)", "apt", *PACKAGES)
    found = sorted(f"{name} {version}" for name, version in re.findall(r"^Inst (\S+) \((\S+) ", text, re.M))
    if not found:
        raise StepError(f"apt names no packages for a disk of {archive.suite}")
    return found


def _make(archive: Archive, packages: list[str], key: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"root-disk: making a disk of {archive.suite} from {len(packages)} packages, some minutes")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        folder = Path(name)
        disk = RootDisk.of(folder)
        tarball = folder / "root.tar"
        _install(archive, tarball)
        _take_boot_files(tarball, disk)
        say("root-disk: making the file system")
        _make_file_system(tarball, folder / "tree", disk.disk, uuid.UUID(key))
        tarball.unlink()
        disk.packages.write_text("".join(f"{line}\n" for line in packages))
        vmlinux.extract(disk.kernel)
        os.chmod(folder, 0o755)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():  # else somebody else made the same meanwhile
                raise
        else:
            folder.mkdir()  # for the context to remove
    taken = os.stat(target / "disk.raw").st_blocks * 512
    say(f"root-disk: {target / 'disk.raw'} takes {taken >> 20} MiB")


def _install(archive: Archive, tarball: Path) -> None:
    """Have mmdebstrap write the tree of the packages, configured, to `tarball`."""
    words = [
        *("mmdebstrap", f"--mode={_mode()}", "--variant=minbase", "--format=tar"),
        *("--skip=output/dev", "--skip=check/empty", f"--include={','.join(PACKAGES)}"),
        *("--aptopt=Acquire::Languages none", "--aptopt=APT::Install-Recommends false"),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        f"--essential-hook={_EARLY}",
        f"--customize-hook={SETTINGS.read_text()}",
        *(archive.suite, "-", str(archive.state / "sources/archive.sources")),
    ]
    said: list[str] = []
    with tarball.open("wb") as out:
        # In its own mind it has no home, and no folder of ours but this machine's temporary one.
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd="/",
            env=dict(os.environ, LC_ALL="C"),
        ) as running:
            assert running.stderr is not None
            for line in running.stderr:
                said = [*said, line.rstrip()][-40:]
                step = line.removeprefix("I: ").rstrip()
                if re.match(r"(running apt-get update|downloading|extracting|installing|creating)", step):
                    say(f"root-disk: {step.rstrip('.')}")
    if running.returncode:
        reason = next((line for line in said if line.startswith("E: ")), said[-1] if said else "no message")
        raise StepError("\n".join([f"mmdebstrap: {reason}", *said[-12:]]))


def _mode() -> str:
    """mmdebstrap's "unshare" where a user namespace can be made, else "root". StepError for neither."""
    probe = "unshare --user --map-root-user --mount --pid --fork mount -t proc proc /proc"
    mapped = shutil.which("newuidmap") is not None and _has_subordinate_ids()
    root = os.geteuid() == 0
    if mapped or root:
        done = subprocess.run(probe.split(), capture_output=True, check=False)
        if done.returncode == 0:
            return "unshare"
    if root:
        return "root"
    raise StepError(
        "no user namespace for the packages' own scripts: install uidmap, and have lines for this user in"
        " /etc/subuid and /etc/subgid (usermod --add-subuids, --add-subgids)"
    )


def _has_subordinate_ids() -> bool:
    import pwd

    name = pwd.getpwuid(os.getuid()).pw_name
    for path in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return False
        if not any(line.split(":")[0] in (name, str(os.getuid())) for line in lines):
            return False
    return True


def _take_boot_files(tarball: Path, disk: RootDisk) -> None:
    """The newest kernel of /boot and its initramfs, beside the disk."""
    with tarfile.open(tarball) as tar:
        members = {m.name.removeprefix("./"): m for m in tar if m.isreg() and "boot/" in m.name}
        for pattern, target in ((r"boot/vmlinuz-", disk.kernel), (r"boot/initrd\.img-", disk.initrd)):
            names = sorted(name for name in members if re.match(pattern, name))
            source = tar.extractfile(members[names[-1]]) if names else None
            if source is None:
                raise StepError(f"the packages left no {pattern} in /boot")
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


_FILL = """set -eu
mkdir "$2"
tar --extract --numeric-owner --preserve-permissions --file "$1" --directory "$2"
: >"$2/etc/machine-id"
mkdir -p "$2/dev"
# 4 KiB a block; every file takes whole ones, and an inode.
blocks=$(du --summarize --apparent-size --block-size=4096 "$2" | cut -f1)
files=$(find "$2" | wc -l)
mke2fs -q -t ext4 -L hvkvm-root -U "$4" -b 4096 -m 1 -d "$2" "$3" $((blocks + files + blocks / 8 + $5 / 4096))
"""


def _make_file_system(tarball: Path, tree: Path, image: Path, name: uuid.UUID, space: int = _SPACE) -> None:
    words = ["fakeroot", "sh", "-c", _FILL, "fill", tarball, tree, image, str(name), str(space)]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    finally:
        # Folders may lack the write bit that removing needs.
        for folder, _names, _files in os.walk(tree):
            os.chmod(folder, 0o700)
        shutil.rmtree(tree, ignore_errors=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise StepError(f"the file system cannot be made: {lines[-1]}")


def variables(suite: str | None = None) -> dict[str, str]:
    """The environment variables that name the cached disk for tests; none when there is none."""
    try:
        found = root_disk(suite, offline=True)
    except StepError:
        return {}
    return {
        "HVKVM_ROOT_DISK": str(found.disk),
        "HVKVM_ROOT_KERNEL": str(found.kernel),
        "HVKVM_ROOT_INITRD": str(found.initrd),
    }
