"""Both ends of a ring on pages of a test's memory."""

from __future__ import annotations

from hvkvm.memory.guest import GuestMemory
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

PAGE = 4096


def ends(memory: GuestMemory, pfns: list[int]) -> tuple[RingWriter, RingReader]:
    """A new, empty ring on the pages `pfns`."""
    for pfn in pfns:
        memory.zero(pfn * PAGE, PAGE)
    return RingWriter(memory, pfns), RingReader(memory, pfns)
