"""Which Linux kernels a test's guests boot: those that were named, else the one that is found.

`--hvkvm-kernels` names kernel files or folders, separated by commas; the modules of
each are looked for beside it. Without it HVKVM_GUEST_KERNEL and HVKVM_GUEST_MODULES
say, and last this machine's own kernel, where its file may be read.
"""

from __future__ import annotations

import os
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import NamedTuple

from hvkvm.errors import ConfigError

REMEDY = (
    "name one by --hvkvm-kernels FILE or HVKVM_GUEST_KERNEL (a distribution's vmlinuz, as in its"
    " linux-image package)"
)


try:
    START = Path.cwd()
except OSError:  # it is gone
    START = Path()
"""Where relative paths start: where the session began, since a test may have gone elsewhere."""


class GuestKernel(NamedTuple):
    """A kernel file, and its lib/modules/VERSION folder where one was found."""

    image: Path
    modules: Path | None

    @property
    def name(self) -> str:
        """For a test's id: the version, as the file's name has it."""
        if self.image.name in ("vmlinuz", "vmlinux", "bzImage"):
            return self.image.resolve().parent.name
        return self.image.name.removeprefix("vmlinuz-").removeprefix("vmlinux-")


def kernel_at(path: Path) -> GuestKernel:
    """The kernel in `path`, a file or a folder that has one, with its modules. ConfigError."""
    if isdir(path):
        images = sorted([*path.glob("vmlinuz*"), *path.glob("boot/vmlinuz*")])
        if not images:
            raise ConfigError(f"--hvkvm-kernels {path}: no vmlinuz in this folder; name the kernel's file")
        path = images[-1]
    if not isfile(path):
        raise ConfigError(f"--hvkvm-kernels {path}: no such file; check the path")
    return GuestKernel(path, _modules_of(path))


def _modules_of(image: Path) -> Path | None:
    """Beside it: an unpacked package, an installed kernel, or the folder of the modules itself."""
    image = image.resolve()
    if exists(image.parent / "modules.dep") or isdir(image.parent / "kernel"):
        return image.parent
    version = image.name.partition("-")[2]
    if version:
        roots = [image.parent.parent, Path("/")]
        for folder in (root / lib / version for root in roots for lib in ("lib/modules", "usr/lib/modules")):
            if isdir(folder):
                return folder
    return None


def find() -> GuestKernel | None:
    """The kernel for those who named none: the environment's, or this machine's. ConfigError."""
    if named := os.environ.get("HVKVM_GUEST_KERNEL"):
        modules = os.environ.get("HVKVM_GUEST_MODULES")
        image = START / named
        if not isfile(image):
            raise ConfigError(f"HVKVM_GUEST_KERNEL={named}: no such file; check the path")
        return GuestKernel(image, START / modules if modules else _modules_of(image))
    version = os.uname().release
    for image in (Path(f"/boot/vmlinuz-{version}"), Path(f"/lib/modules/{version}/vmlinuz")):
        if isfile(image) and os.access(image, os.R_OK):
            return GuestKernel(image, _modules_of(image))
    return None


def from_option(text: str) -> list[GuestKernel]:
    """The kernels that `--hvkvm-kernels` names. ConfigError."""
    return [kernel_at(START / name) for name in text.split(",") if name]


def busybox() -> Path | None:
    """The static busybox that HVKVM_GUEST_BUSYBOX names; None: look on PATH."""
    named = os.environ.get("HVKVM_GUEST_BUSYBOX")
    return START / named if named else None
