"""PRPs: which guest pages a command's data lies in, as views that preadv and pwritev take.

A guest's list is copied page by page and never believed: an entry that is no RAM or not on a page
boundary ends the command. The work is bounded by the length, which the caller has bounded. I/O loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hvkvm.abi.nvme import NVME_SC_DATA_XFER_ERROR, NVME_SC_PRP_INVALID_OFFSET, NVME_STATUS_DNR
from hvkvm.block.buffers import Buffers
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import RamRegion
from hvkvm.memory.page_vector import page_numbers, page_vector

PAGE = 4096
_ENTRY = 8


class Memory(Protocol):
    """What a controller needs of guest memory; each call raises GuestMemoryError for what is no RAM."""

    @property
    def regions(self) -> Sequence[RamRegion]: ...
    def contains(self, gpa: int, n: int) -> bool: ...
    def read(self, gpa: int, n: int) -> bytes: ...
    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None: ...
    def view(self, gpa: int, n: int) -> memoryview: ...
    def read_u32(self, gpa: int) -> int: ...
    def write_u32(self, gpa: int, value: int) -> None: ...


class PrpError(Exception):
    """The command's data is nowhere; `status` says why, as the guest is told."""

    def __init__(self, status: int) -> None:
        super().__init__(f"NVMe status {status:#x}")
        self.status = status | NVME_STATUS_DNR


def buffers(memory: Memory, prp1: int, prp2: int, length: int) -> Buffers:
    """`length` bytes in guest memory. Neighbouring pages make one view. Raises PrpError."""
    if prp1 & 3:
        raise PrpError(NVME_SC_PRP_INVALID_OFFSET)
    first = min(PAGE - prp1 % PAGE, length)
    left = length - first
    try:
        if not left:
            return [memory.view(prp1, first)]
        if left <= PAGE:
            if prp2 % PAGE:
                raise PrpError(NVME_SC_PRP_INVALID_OFFSET)
            if prp2 == prp1 + first:
                return [memory.view(prp1, length)]
            return [memory.view(prp1, first), memory.view(prp2, left)]
        return _listed(memory, prp1, first, prp2, left)
    except GuestMemoryError:
        raise PrpError(NVME_SC_DATA_XFER_ERROR) from None


def _listed(memory: Memory, prp1: int, first: int, at: int, left: int) -> Buffers:
    pages = _pages(memory, at, -(-left // PAGE))
    numbers = page_numbers((prp1 - prp1 % PAGE).to_bytes(_ENTRY, "little") + pages)
    if numbers is None:
        raise PrpError(NVME_SC_PRP_INVALID_OFFSET)
    vector = page_vector(memory, numbers, prp1 % PAGE, first + left)
    if vector is not None:
        return vector
    found: list[memoryview] = []
    start, end = prp1, prp1 + first
    for page in memoryview(pages).cast("Q"):
        if page != end:
            found.append(memory.view(start, end - start))
            start = page
        size = min(PAGE, left)
        end = page + size
        left -= size
    found.append(memory.view(start, end - start))
    return found


def _pages(memory: Memory, at: int, count: int) -> bytes:
    """The `count` entries of the list that begins at `at`."""
    if at & _ENTRY - 1:
        raise PrpError(NVME_SC_PRP_INVALID_OFFSET)
    found = b""
    while count:
        # A list goes on in another page where its last entry in this one is not the data's last.
        room = (PAGE - at % PAGE) // _ENTRY
        entries = memory.read(at, min(room, count) * _ENTRY)
        if count > room:
            at = int.from_bytes(entries[-_ENTRY:], "little")
            entries = entries[:-_ENTRY]
            if at % PAGE:  # so only the first page of a list can be without entries of its own
                raise PrpError(NVME_SC_PRP_INVALID_OFFSET)
        found += entries
        count -= len(entries) // _ENTRY
    return found


def copy_in(memory: Memory, prp1: int, prp2: int, length: int) -> bytes:
    """A copy of a command's data. Raises PrpError."""
    return b"".join(map(bytes, buffers(memory, prp1, prp2, length)))


def copy_out(memory: Memory, prp1: int, prp2: int, data: bytes) -> None:
    """Give a command its data. Raises PrpError, and then nothing was written."""
    at = 0
    for view in buffers(memory, prp1, prp2, len(data)):
        view[:] = data[at : at + len(view)]
        at += len(view)
