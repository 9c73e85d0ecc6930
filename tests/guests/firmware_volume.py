"""A firmware volume for variables, as an image begins with one."""

from __future__ import annotations

from hvkvm.boot import firmware as images


def volume(size: int) -> bytes:
    """`size` bytes that are known by their head, and otherwise erased."""
    head = bytes(16) + images._NV_DATA_GUID + size.to_bytes(8, "little") + b"_FVH"
    return head.ljust(size, b"\xff")
