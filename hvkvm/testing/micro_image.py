"""Assembles a micro guest: a test's own text behind a small runtime, as a multiboot image.

GNU as and ld do the work, and the image is kept by its content, so a test is
assembled once. The image starts under any VMM that loads multiboot kernels. Any
thread, any number of processes.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from hvkvm.boot import cache
from hvkvm.errors import ConfigError

_FOLDER = Path(__file__).parent
_PARTS = ("guest_parts.inc", "micro_macros.s", "micro_runtime.s")
_LAYOUT = _FOLDER / "micro.ld"
_ASSEMBLE = ("as", "--64", "--fatal-warnings")
_LINK = ("ld", "-m", "elf_x86_64", "-n", "--build-id=none", "-T")
_NARROW = ("objcopy", "-O", "elf32-i386")
"""Multiboot loaders take 32-bit ELF only, whatever the code in it."""

NAME = "micro guest"
"""What an assembler's complaint calls the test's text."""


class AssemblyError(ConfigError):
    """A micro guest does not assemble or link; the text is the tool's own, with the test's lines."""


def micro_image(source: str) -> Path:
    """The image of `source`: GNU as's AT&T syntax in 64-bit mode, run from its first line on.

    At its end the guest ends with status 0. AssemblyError for what does not assemble, and when
    binutils are missing; ConfigError where the image cannot be kept.
    """
    runtime = "".join((_FOLDER / name).read_text() for name in _PARTS)
    # The logical line numbers have complaints name the test's own lines.
    text = f'{runtime}\n# 1 "{NAME}"\n{source}\n    .text\n    ret\n'
    digest = hashlib.sha256()
    for piece in (repr((_ASSEMBLE, _LINK, _NARROW)), _LAYOUT.read_text(), text):
        digest.update(piece.encode())
    path = cache.root() / "micro" / f"{digest.hexdigest()[:24]}.elf"
    if not cache.holds(path):
        image = _build(text)
        try:
            cache.publish(path, [image])
        except OSError as error:
            remedy = "set HVKVM_CACHE to a folder with room"
            raise ConfigError(f"{path}: {error.strerror or error}; {remedy}") from None
    return path


def _build(text: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="hvkvm-micro-") as folder:
        work = Path(folder)
        (work / "guest.s").write_text(text)
        _run(*_ASSEMBLE, "-o", str(work / "guest.o"), str(work / "guest.s"))
        _run(*_LINK, str(_LAYOUT), "-o", str(work / "image64"), str(work / "guest.o"))
        _run(*_NARROW, str(work / "image64"), str(work / "image"))
        return (work / "image").read_bytes()


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise AssemblyError(f"{command[0]}: not found; install the binutils package") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = [line for line in lines if line.startswith(NAME)] or lines
        raise AssemblyError("\n".join(["it does not assemble:", *said]))
