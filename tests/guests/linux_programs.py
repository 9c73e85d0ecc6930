"""Static programs of our own for Linux guests: C sources in `linux/`, compiled when they change.

The guest has no libc of its own, so they carry theirs. Kept by content hash;
call from any thread or process.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from hvkvm.boot import cache

SOURCES = Path(__file__).parent / "linux"
COMPILE = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-s")


class ProgramBuildError(Exception):
    """A program does not compile; the text is the compiler's own."""


def program(name: str) -> Path:
    """The compiled `linux/NAME.c`. ProgramBuildError."""
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(repr(COMPILE).encode() + source.read_bytes()).hexdigest()[:16]
    path = cache.root() / "guests" / f"{name}-{digest}"
    if not path.exists():
        cache.publish(path, [_compiled(source)])
    path.chmod(0o755)
    return path


def ahead(*names: str) -> None:
    """Compile these when a module of tests is imported, that is, outside before the lab has started.

    There it is quick, and kept; in the lab it takes seconds, and is lost with the lab. What does not
    compile is told by the test that wants it.
    """
    for name in names:
        with suppress(ProgramBuildError, OSError):
            program(name)


def _compiled(source: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="hvkvm-guest-") as folder:
        output = Path(folder) / source.stem
        try:
            done = subprocess.run(
                [*COMPILE, "-o", output, source], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise ProgramBuildError("gcc: not found; install the gcc and libc6-dev packages") from None
        if done.returncode:
            raise ProgramBuildError(f"{source}\n{done.stderr}")
        return output.read_bytes()
