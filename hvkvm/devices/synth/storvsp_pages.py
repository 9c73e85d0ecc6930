"""The guest pages that packets of a storage channel name, as views of RAM.

A driver names the same pages again and again, so the views are kept; what was mapped there once may be gone
by the next request, and then they are made anew.

Owner: the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import VM_PKT_DATA_USING_GPA_DIRECT, Packet, gpa_pages, gpa_pfns, parse_gpa_range
from hvkvm.abi.storvsp import Srb
from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.block.buffers import Buffers
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.page_vector import LEAST_PAGES, page_vector
from hvkvm.vmbus.pages import Ram, range_views

MAX_BYTES = 32 << 20
"""Of the pages that one packet names."""

MAX_PAGES = 4096
"""Views of single guest pages that are kept for the next request."""


class DataPages:
    """Of one channel."""

    def __init__(self, memory: Ram) -> None:
        self._memory = memory
        self.kept: dict[int, memoryview] = {}
        """By page number; a view of what is not mapped any more raises ValueError when it is used."""

    def of(self, srb: Srb, packet: Packet) -> Buffers | None:
        """The pages for the data of a request; None if it names none, too few, or what is no RAM."""
        if not srb.length or srb.data_in not in (wire.READ_TYPE, wire.WRITE_TYPE):
            return []
        if packet.type != VM_PKT_DATA_USING_GPA_DIRECT:
            return None
        one = parse_gpa_range(packet.header, MAX_BYTES)
        if one is None or one.length < srb.length:
            return None
        header, offset, length = packet.header, one.offset, srb.length
        try:
            if offset + length <= HV_HYP_PAGE_SIZE:
                return [self.page(gpa_pfns(header, 1)[0])[offset : offset + length]]
            count = offset + length + HV_HYP_PAGE_SIZE - 1 >> 12
            if count >= LEAST_PAGES:
                vector = page_vector(self._memory, gpa_pages(header, count), offset, length)
                if vector is not None:
                    return vector
            return range_views(self._memory, gpa_pfns(header, count), offset, length, self.page)
        except GuestMemoryError:
            return None

    def page(self, pfn: int) -> memoryview:
        """A view of the page. GuestMemoryError."""
        page = self.kept.get(pfn)
        if page is not None:
            try:
                return page[:]
            except ValueError:  # what was mapped there once is not any more
                pass
        if len(self.kept) >= MAX_PAGES:
            self.kept.clear()
        page = self.kept[pfn] = self._memory.view(pfn * HV_HYP_PAGE_SIZE, HV_HYP_PAGE_SIZE)
        return page

    def clear(self) -> None:
        """Keep no RAM mapped."""
        self.kept.clear()
