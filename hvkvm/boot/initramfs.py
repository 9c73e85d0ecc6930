"""The guest's first file system: a busybox, the modules it needs and one command.

Why: `hvkvm run -- COMMAND` shall work with any distribution kernel and nothing
else prepared. Called by the machine and by tests. Pure but for reading files
and the module cache; any thread.

The guest's init prints `hvkvm: init SECONDS` (its uptime) as its first line,
loads the modules in order, runs the command as `boot.guest_scripts` says, hands
its status to the machine (see `boot.guest_exit`) and powers off.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hvkvm.abi.elf import ELF64_EHDR, ELF64_IDENT, ELF64_PHDR, EM_X86_64, PT_INTERP, Ehdr, Phdr
from hvkvm.abi.guest_command import CommandIo
from hvkvm.boot import cache, cpio, guest_exit, guest_orders, guest_scripts, guest_vsock
from hvkvm.boot.command_files import pack_files, programs, read
from hvkvm.boot.kmod import ModuleTree
from hvkvm.digest import sha256
from hvkvm.errors import BootError
from hvkvm.tuples import NamedTuple

ROOT_MODULES = ("hv_vmbus", "hv_storvsc", "sd_mod")
"""What finds a root file system on a disk of ours."""

VSOCK_MODULE = "hv_sock"
"""Linux's AF_VSOCK over VMBus."""


class RootDevice(NamedTuple):
    """The root file system as the kernel's command line names it, and how it is mounted."""

    root: str
    """A device, or UUID=... or LABEL=..."""
    type: str = ""
    flags: str = ""
    mode: str = "ro"
    init: str = "/sbin/init"


_FOLDERS = "bin dev etc mnt modules proc root run sys tmp usr/bin usr/sbin var"
# busybox's own shell finds its applets by itself; these are for programs and scripts that look on PATH.
_APPLETS = (
    "awk basename blkid cat chmod chown chroot cmp cp cttyhack cut date dd depmod devmem df diff "
    "dirname dmesg du echo env expr false fdisk find free getty grep gunzip gzip halt hdparm head "
    "hexdump hostname id ifconfig insmod ip kill ln logger ls lsmod lspci md5sum mkdir mke2fs mkfifo "
    "mknod mktemp modinfo modprobe more mount mv nc nproc od pidof ping poweroff printenv printf ps "
    "pwd readlink reboot reset rm rmdir rmmod route sed seq setsid sh sha256sum sleep sort stat stty "
    "sync sysctl tail tar tee test time timeout top touch tr true truncate tty udhcpc umount uname "
    "uniq unzip uptime usleep vi watch wc wget which xargs xz yes zcat"
)
_CACHE_MAGIC = b"hvkvm modules 1\n"


def build(
    command: Sequence[str] | None,
    *,
    busybox: Path,
    modules: Iterable[str] = (),
    kernel_modules_dir: Path | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    command_io: CommandIo = "console",
    vsock: bool = False,
    terminal_type: str | None = None,
    awaits: bool = False,
) -> bytes:
    """The initramfs that runs `command`, or an interactive shell when it is None or empty.

    With `awaits` it runs none, but waits for what `command_files.orders` makes.

    `modules` are loaded in order with all they depend on, out of
    `kernel_modules_dir` (lib/modules/<version>, or an unpacked kernel package).
    `files` puts more files in, by absolute guest path; a Path keeps its mode, so
    programs stay executable. `command_io` says where a command's streams lead (see
    `boot.guest_scripts`); `vsock` that the host listens for them on vsock too: then
    VSOCK_MODULE is loaded, if the kernel has it. `terminal_type` is TERM of a command
    with a terminal of its own. Raises BootError for a busybox that is not static, a
    module that is not there, modules without a folder, a file that cannot be read.
    """
    wanted = tuple(modules)
    streams = awaits or (command and command_io == "streams")
    optional = (VSOCK_MODULE,) if vsock and streams and kernel_modules_dir is not None else ()
    begin = {"init": guest_scripts.START + guest_scripts.AWAIT} if awaits else {}
    if not awaits:
        begin = programs(command, command_io, vsock=vsock, terminal_type=terminal_type)
        begin["init"] = guest_scripts.START + begin.pop("begin")
    pieces = [_base(busybox)]
    if wanted or optional:
        if kernel_modules_dir is None:
            raise BootError(f"modules {', '.join(wanted)} need the kernel's lib/modules/VERSION folder")
        pieces.append(_modules(wanted, optional, kernel_modules_dir))
    pieces.append(pack_files(files or {}, begin))
    return b"".join(pieces)


def build_root(
    root: RootDevice, *, busybox: Path, modules: Iterable[str] = (), kernel_modules_dir: Path | None = None
) -> bytes:
    """The initramfs that mounts `root` and starts the init there.

    It loads ROOT_MODULES and the file system's, where the kernel has not built them in, and `modules`.
    Without `kernel_modules_dir` the kernel has all that it needs. Raises BootError as `build` does.
    """
    pieces = [_base(busybox), pack_files({}, {"init": guest_scripts.ROOT_INIT})]
    if kernel_modules_dir is not None:
        named = "ext4" if root.type in ("ext2", "ext3") else root.type
        systems = (named,) if named else ("ext4", "xfs")
        pieces.append(_modules((*ROOT_MODULES, *modules), systems, kernel_modules_dir))
    lines = "".join(f"{key}={shlex.quote(value)}\n" for key, value in root._asdict().items())
    pieces.append(pack_files({"root-device": lines.encode(errors="surrogateescape")}))
    return b"".join(pieces)


def _base(busybox: Path) -> bytes:
    program = read(busybox)
    if not is_static_elf(program):
        raise BootError(f"{busybox}: not a static 64-bit program; the busybox-static package has one")
    entries = [cpio.directory(name) for name in _FOLDERS.split()]
    # Before devtmpfs is mounted the kernel opens this one for init.
    entries.append(cpio.char_device("dev/console", 5, 1))
    entries.append(cpio.regular("bin/busybox", program, 0o755))
    entries.append(cpio.regular("bin/guest-exit", guest_exit.program(), 0o755))
    entries.append(cpio.regular("bin/guest-vsock", guest_vsock.program(), 0o755))
    entries.append(cpio.regular("bin/guest-orders", guest_orders.program(), 0o755))
    entries.append(cpio.regular("etc/udhcpc/default.script", guest_scripts.DHCP.encode(), 0o755))
    entries += [cpio.symlink(f"bin/{name}", "busybox") for name in _APPLETS.split()]
    return cpio.pack(cpio.with_parents(entries))


def is_static_elf(program: bytes) -> bool:
    """Whether `program` is a 64-bit x86 ELF that asks for no interpreter: it runs where nothing else is."""
    if len(program) < ELF64_EHDR.size or not program.startswith(ELF64_IDENT):
        return False
    header = Ehdr(*ELF64_EHDR.unpack_from(program))
    table, size, count = header.e_phoff, header.e_phentsize, header.e_phnum
    if header.e_machine != EM_X86_64 or size < ELF64_PHDR.size or table + size * count > len(program):
        return False
    found = (Phdr(*ELF64_PHDR.unpack_from(program, table + size * index)) for index in range(count))
    return all(one.p_type != PT_INTERP for one in found)


def _modules(wanted: tuple[str, ...], optional: tuple[str, ...], folder: Path) -> bytes:
    """The archive of the modules in load order, from the cache while none of their files has changed."""
    import json

    recipe = "\0".join((os.path.realpath(folder), *wanted, *(f"{name}?" for name in optional)))
    key = sha256(recipe.encode(errors="surrogateescape")).hexdigest()[:32]
    kept = cache.root() / "modules" / key
    piece = _cached_modules(kept)
    if piece is not None:
        return piece
    loaded = ModuleTree(folder).closure(wanted, optional=optional)
    piece = cpio.pack(cpio.regular(f"modules/{n:03}-{m.name}.ko", m.data) for n, m in enumerate(loaded))
    marks = [_mark(module.path) for module in loaded]
    # A cache that cannot be written costs time at the next boot, no more.
    with contextlib.suppress(OSError):
        cache.publish(kept, [_CACHE_MAGIC, json.dumps(marks).encode(), b"\n", piece])
    return piece


def _cached_modules(kept: Path) -> bytes | None:
    import json

    try:
        raw = kept.read_bytes()
        if not raw.startswith(_CACHE_MAGIC):
            return None
        end = raw.index(b"\n", len(_CACHE_MAGIC))
        marks = json.loads(raw[len(_CACHE_MAGIC) : end])
        return raw[end + 1 :] if all(mark == _mark(Path(mark[0])) for mark in marks) else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _mark(path: Path) -> list[str | int]:
    seen = os.stat(path)
    return [str(path), seen.st_size, seen.st_mtime_ns]
