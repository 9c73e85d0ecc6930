"""What the lab's machine is and what it boots: a vmlinux and an initramfs, both made once.

Why: the lab has to start in seconds, so nothing is decompressed or packed
again that has not changed. Called by `steps.lab_host`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from hvkvm.boot import cache, cpio
from hvkvm.boot.kmod import ModuleTree
from steps import artifacts

QEMU = "qemu-system-x86_64"
INIT = Path(__file__).with_name("lab_init.sh")
# What the host side of the lab needs, and tun and bridge for the tests of networks.
MODULES = "virtio_pci virtio_console 9pnet_virtio 9p overlay irqbypass kvm kvm_amd tun bridge".split()  # noqa: SIM905
# kvm_amd wants it only for SEV, and some kernels link it in.
OPTIONAL = ["ccp"]
APPLETS = (
    "sh cat chroot echo head hostname insmod ip kill mkdir mount poweroff printf rm setsid sleep stty"
    " sync umount unshare"
)
FOLDERS = "bin dev lower new proc project sys tmp upper"


class Plan(NamedTuple):
    """A lab machine as it was asked for. `suite` None: this machine's own. `fresh`: see `lab_kept`.

    `qemu` is the program that emulates it: a name on PATH, or a path.
    """

    suite: str | None
    cpus: int
    memory: str
    writable: tuple[Path, ...] = ()
    fresh: Path | None = None
    qemu: str = QEMU

    def shares(self) -> list[tuple[str, Path]]:
        """(9p tag, folder) of each read-write share."""
        return [(f"rw{index}", path) for index, path in enumerate(self.writable)]


class Image(NamedTuple):
    """Files for QEMU's -kernel and -initrd."""

    kernel: Path
    initramfs: Path


def image(plan: Plan, folder: Path) -> Image:
    """The kernel and the initramfs of `plan`; the latter is written to `folder`.

    Raises StepError when a package cannot be had.
    """
    base = _base(artifacts.path("lab-modules", plan.suite), artifacts.path("busybox"))
    fresh = str(plan.fresh or "")
    table = "".join(f"{tag} {path}\n" for tag, path in plan.shares())
    own = [cpio.regular(name, os.fsencode(text)) for name, text in (("shares", table), ("fresh", fresh))]
    target = folder / "initramfs"
    target.write_bytes(base.read_bytes() + cpio.pack(own))
    return Image(artifacts.booted("lab-kernel", plan.suite), target)


def _base(modules: Path, busybox: Path) -> Path:
    """The part of the initramfs that does not change, from the cache when it was made before."""
    init = INIT.read_bytes()
    recipe = "\0".join([str(modules), str(busybox), *MODULES, *OPTIONAL, APPLETS, FOLDERS])
    key = hashlib.sha256(os.fsencode(recipe) + init).hexdigest()[:32]
    kept = cache.root() / "lab" / f"{key}.cpio"
    if not cache.holds(kept):
        loaded = ModuleTree(modules).closure(MODULES, optional=OPTIONAL)
        entries = [cpio.directory(name) for name in FOLDERS.split()]
        entries.append(cpio.char_device("dev/console", 5, 1))
        entries.append(cpio.regular("bin/busybox", busybox.read_bytes(), 0o755))
        entries += [cpio.symlink(f"bin/{name}", "busybox") for name in APPLETS.split()]
        entries += [cpio.regular(f"modules/{n:02}-{m.name}.ko", m.data) for n, m in enumerate(loaded)]
        entries.append(cpio.regular("init", init, 0o755))
        cache.publish(kept, cpio.archive(cpio.with_parents(entries)))
    return kept
