"""Where the loaders put things in guest RAM, and whether they fit.

Every loader claims its ranges here, so that two pieces can never overlap
silently and a machine that is too small is told the size that would do. One
`Layout` serves one load; the thread that loads owns it.
"""

from __future__ import annotations

from typing import Protocol

from hvkvm.abi import board
from hvkvm.errors import BootError
from hvkvm.tuples import NamedTuple

PAGE = 0x1000
MIB = 1 << 20
SLACK = 8 * MIB  # what a kernel needs past its own image before it says anything at all


class GuestRam(Protocol):
    """What the loaders need of `memory.guest.GuestMemory`; gpa and sizes in bytes."""

    @property
    def size(self) -> int:
        """All RAM, in bytes."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        """Copy `data` to `gpa`."""

    def clear(self, gpa: int, n: int, /) -> None:
        """Make `n` bytes at `gpa` zero."""

    def fill(self, gpa: int, n: int, fd: int, offset: int, /) -> int:
        """Copy up to `n` bytes at `offset` of a file to `gpa`; how many. OSError where it cannot be."""

    def view(self, gpa: int, n: int, /) -> memoryview:
        """A writable window on `n` bytes at `gpa`, inside one RAM region."""


class Claim(NamedTuple):
    """A range of guest RAM taken by `what`."""

    gpa: int
    size: int
    what: str

    @property
    def end(self) -> int:
        """The gpa after the last byte."""
        return self.gpa + self.size


class Layout:
    """The claims of one load on the RAM below 4 GiB of a machine with `memory_size` bytes.

    Raises BootError (naming --memory) when even the fixed low areas do not fit.
    """

    def __init__(self, memory_size: int, kernel: object) -> None:
        self.memory_size = memory_size
        self.low_end = min(memory_size, board.RAM_LOW_LIMIT)
        self.claims: list[Claim] = []
        self._kernel = kernel
        if memory_size < 2 * MIB:
            least = _megabytes(2 * MIB + SLACK)
            raise BootError(f"--memory {memory_size >> 10}K: too small for any kernel; give at least {least}")

    def claim(self, gpa: int, size: int, what: str) -> Claim:
        """Take a fixed range for a kernel's segment; its pages may not touch another claim.

        Raises BootError when it lies below KERNEL_ADDRESS (the loaders' own
        tables are there), past RAM below 4 GiB, or over an earlier claim.
        """
        end = gpa + size
        if gpa < board.KERNEL_ADDRESS:
            raise BootError(
                f"--kernel {self._kernel}: {what} wants {gpa:#x}, but the first MiB belongs to the boot "
                "tables; link the image at 1 MiB or above"
            )
        if end > board.RAM_LOW_LIMIT:
            raise BootError(
                f"--kernel {self._kernel}: {what} ends at {end:#x}, past the {board.RAM_LOW_LIMIT >> 30} GiB "
                "of RAM that lie below the MMIO hole; link or configure the kernel lower"
            )
        if end > self.low_end:
            raise self._too_small(f"{what} ends at {end:#x}", end)
        for other in self.claims:
            if gpa < other.end and other.gpa < end:
                raise BootError(
                    f"--kernel {self._kernel}: {what} at {gpa:#x}+{size:#x} overlaps {other.what} at "
                    f"{other.gpa:#x}+{other.size:#x}; the image is broken, build it again"
                )
        taken = Claim(gpa, size, what)
        self.claims.append(taken)
        return taken

    def claim_high(self, size: int, highest: int, what: str, flag: str) -> Claim:
        """Take `size` bytes at a page as high as can be, above every other claim.

        `highest` is the last byte's largest gpa (a boot protocol's
        initrd_addr_max). Raises BootError naming `flag` or --memory.
        """
        floor = max((claim.end for claim in self.claims), default=board.KERNEL_ADDRESS)
        floor = -(-floor // PAGE) * PAGE
        gpa = (min(self.low_end, highest + 1) - size) & -PAGE
        if gpa >= floor:
            taken = Claim(gpa, size, what)
            self.claims.append(taken)
            return taken
        room = min(board.RAM_LOW_LIMIT, highest + 1) & -PAGE
        if floor + size > room:
            raise BootError(
                f"{flag}: {what} has {_megabytes(size)}, but this kernel takes it below {room:#x} only, "
                f"where {_megabytes(max(room - floor, 0), up=False)} are left; make it smaller"
            )
        raise self._too_small(f"{what} needs {_megabytes(size)} above the kernel's {floor:#x}", floor + size)

    def _too_small(self, reason: str, end: int) -> BootError:
        least = min(end + SLACK, board.RAM_LOW_LIMIT)
        have = _megabytes(self.memory_size, up=False)
        return BootError(f"--memory {have}: {reason}; give at least {_megabytes(least)}")


def _megabytes(size: int, *, up: bool = True) -> str:
    return f"{(size + MIB - 1 if up else size) // MIB}M"
