"""Builds our own test guests: GNU as sources to multiboot ELF32 images, kept by content hash.

The images are plain multiboot kernels, so QEMU's -kernel runs the very same
files. Every guest links the runtime (boot, interrupts, serial, synic) with its
own program, which supplies guest_main. Call from any thread or process.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from hvkvm.boot import cache
from hvkvm.testing import micro_image

SOURCES = Path(__file__).parent
SHARED = Path(micro_image.__file__).with_name("guest_parts.inc")
"""What micro guests have too."""
RUNTIME = ("boot", "interrupts", "serial", "synic")
PROGRAMS = {
    "agent": ("agent", "loops", "ticks", "user"),
}
ASSEMBLE = ("as", "--64", "--fatal-warnings")
LINK = ("ld", "-m", "elf_x86_64", "-n", "--build-id=none", "-T")
# Multiboot loaders take 32-bit ELF only, whatever the code in it.
NARROW = ("objcopy", "-O", "elf32-i386")


class GuestBuildError(Exception):
    """A guest does not assemble or link; the text is the tool's own."""


def image(program: str) -> Path:
    """The built image of `program` (a key of PROGRAMS), assembled now if its sources changed."""
    objects = RUNTIME + PROGRAMS[program]
    path = cache.root() / "guests" / f"{program}-{_digest(objects)}.elf"
    if not path.exists():
        _publish(path, _build(objects))
    return path


def _publish(path: Path, content: bytes) -> None:
    cache.publish(path, [content])


def _digest(objects: tuple[str, ...]) -> str:
    """Of everything that shapes the image, this file's commands included."""
    digest = hashlib.sha256(repr((ASSEMBLE, LINK, NARROW, objects)).encode())
    for name in (*(f"{stem}.s" for stem in objects), "abi.inc", "macros.inc", "link.ld"):
        digest.update((SOURCES / name).read_bytes())
    digest.update(SHARED.read_bytes())
    return digest.hexdigest()[:16]


def _build(objects: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="hvkvm-guest-") as folder:
        work = Path(folder)
        built = []
        for stem in objects:
            built.append(str(work / f"{stem}.o"))
            _run(
                *ASSEMBLE,
                "-I",
                str(SOURCES),
                "-I",
                str(SHARED.parent),
                "-o",
                built[-1],
                str(SOURCES / f"{stem}.s"),
            )
        _run(*LINK, str(SOURCES / "link.ld"), "-o", str(work / "image64"), *built)
        _run(*NARROW, str(work / "image64"), str(work / "image"))
        return (work / "image").read_bytes()


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise GuestBuildError(f"{command[0]}: not found; install the binutils package") from None
    if done.returncode:
        raise GuestBuildError(f"{' '.join(command)}\n{done.stderr}")
