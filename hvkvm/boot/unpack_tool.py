"""Unpacks with a command line tool what Python itself cannot: zstd before Python 3.14, and lz4.

Called by `boot.vmlinux` and `boot.kmod`. A few KB may unpack to more than the host's memory, so whoever
calls says how much he takes. Any thread.
"""

from __future__ import annotations

import os


def unpack(tool: str, packed: bytes, most: int) -> bytes | None:
    """What `tool` makes of `packed`; None where it is more than `most` bytes, or broken as `tool` has it.

    FileNotFoundError where there is no such tool, and OSError.
    """
    import subprocess

    # Not a pipe, which somebody would have to fill while the other one is read.
    with open(os.memfd_create("packed", os.MFD_CLOEXEC), "w+b") as given:
        given.write(packed)
        given.seek(0)
        with subprocess.Popen(
            [tool, "-dcq"], stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            try:
                unpacked = process.stdout.read(most + 1) if process.stdout is not None else b""
            except BaseException:
                process.kill()
                raise
            if len(unpacked) > most:
                process.kill()
                return None
    return unpacked if process.returncode == 0 else None
