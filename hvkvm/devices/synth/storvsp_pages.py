"""The guest pages that packets of a storage channel name, as views of RAM.

A driver names the same pages again and again, so views of single pages are kept, and the lists of the last
long requests: a program that reads or writes much does so with a few buffers of its own. What was mapped
there once may be gone by the next request, and then a view is made anew; a list keeps its RAM mapped. Without
a GIL nothing is kept: a worker lets go of a request's views while the loop cuts the next one's from the same
page, and neither may have a part in the other's buffer (see `memory.mapping`).

Owner: the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import VM_PKT_DATA_USING_GPA_DIRECT, Packet, gpa_pages, gpa_pfns, parse_gpa_range
from hvkvm.abi.storvsp import Srb
from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.block.buffers import Buffers
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.atomics import FREE_THREADED
from hvkvm.memory.page_vector import LEAST_PAGES, PageVector, page_vector
from hvkvm.vmbus.pages import Ram, range_views

MAX_BYTES = 32 << 20
"""Of the pages that one packet names."""

MAX_PAGES = 4096
"""Views of single guest pages that are kept for the next request."""

MAX_LISTS = 16
"""Lists of pages that are kept."""

MOST_HEADER = 24 + 8 * 384
"""Bytes of a header that is kept with its list: Linux asks for 1280 KiB at once. With a view of each page,
which some images need, that is some 100 KiB a list at most."""


class DataPages:
    """Of one channel."""

    def __init__(self, memory: Ram) -> None:
        self._memory = memory
        self.kept: dict[int, memoryview] = {}
        """By page number; a view of what is not mapped any more raises ValueError when it is used."""
        self.made = 0
        """Views of pages made for requests of more than one page: what they cost a turn is counted by it."""
        self._lists: dict[bytes, PageVector] = {}
        """By the header that named the pages: all that decides them but how much of their last is used."""

    def of(self, srb: Srb, packet: Packet) -> Buffers | None:
        """The pages for the data of a request; None if it names none, too few, or what is no RAM."""
        if not srb.length or srb.data_in not in (wire.READ_TYPE, wire.WRITE_TYPE):
            return []
        if packet.type != VM_PKT_DATA_USING_GPA_DIRECT:
            return None
        header, length = packet.header, srb.length
        kept = self._lists.get(header)
        if kept is not None and kept.size == length:
            return kept
        one = parse_gpa_range(header, MAX_BYTES)
        if one is None or one.length < length:
            return None
        offset = one.offset
        try:
            if offset + length <= HV_HYP_PAGE_SIZE:
                return [self.page(gpa_pfns(header, 1)[0])[offset : offset + length]]
            count = offset + length + HV_HYP_PAGE_SIZE - 1 >> 12
            if count >= LEAST_PAGES:
                vector = page_vector(self._memory, gpa_pages(header, count), offset, length)
                if vector is not None:
                    if len(self._lists) >= MAX_LISTS:
                        self._lists.clear()
                    if len(header) <= MOST_HEADER and not FREE_THREADED:
                        self._lists[header] = vector
                    return vector
            views = range_views(self._memory, gpa_pfns(header, count), offset, length, self.page)
            self.made += len(views)
            return views
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
        page = self._memory.view(pfn * HV_HYP_PAGE_SIZE, HV_HYP_PAGE_SIZE)
        if not FREE_THREADED:
            self.kept[pfn] = page
        return page

    def clear(self) -> None:
        """Keep no RAM mapped."""
        self.kept.clear()
        self._lists.clear()
