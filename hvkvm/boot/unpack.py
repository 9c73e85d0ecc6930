"""Unpacks a kernel or a module, whole and no more than its caller takes, by Python or a command line tool.

Called by `boot.vmlinux` and `boot.kmod`. A few KB may unpack to more than the host's memory. What is cut
short may begin like a good one, and is None. Any thread.
"""

from __future__ import annotations

import os
from typing import Any


def by_python(unpacker: Any, packed: bytes, most: int) -> bytes | None:
    """What a new decompressor object of lzma, zlib or bz2 makes of `packed`; None of more than `most` bytes.

    Whatever it raises for what is broken.
    """
    unpacked: bytes = unpacker.decompress(packed, most)
    return unpacked if unpacker.eof else None


def by_tool(tool: str, packed: bytes, most: int) -> bytes | None:
    """What `tool` makes of `packed`, for what Python cannot: lz4, and zstd before 3.14. None as above.

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
