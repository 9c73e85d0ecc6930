"""GPADLs: lists of guest pages that the guest describes in one or many messages.

Why: every byte here comes from the guest, and the counts in it decide how much
we keep. So what a GPADL will take is claimed from a budget when its header
comes, before anything is stored (S59), and a body can only fill what its header
claimed (S60). Nothing here raises for guest bytes.

Owner: `server.Server`, and so the I/O loop.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from struct import Struct

from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.tuples import NamedTuple

MAX_GPADLS = 8192
"""Most a connection may hold, unfinished ones included."""

MAX_UNFINISHED = 256
"""Most that may wait for bodies."""

MAX_RANGES = 16
"""Most of one GPADL. Linux and UEFI send one, and a ring or a NIC's buffer must be one."""

MAX_VALUES = 1 << 20
"""Most 8-byte values a connection may hold: page lists of 4 GiB, in 8 MiB of ours.
With all that stands around the lists it is up to 11 MiB."""

RANGE_VALUES = 32
"""A range costs as much of ours as so many values, beside its list: so many are claimed for it."""

_range = Struct("<II")


class GpaRangeList(NamedTuple):
    """One range: `byte_count` bytes, the first of them `byte_offset` bytes into the first page."""

    byte_count: int
    byte_offset: int
    pfns: array[int]


class Gpadl(NamedTuple):
    """A complete GPADL."""

    gpadl_id: int
    relid: int
    ranges: tuple[GpaRangeList, ...]
    values: int

    @property
    def pages(self) -> int:
        """How many pages its ranges name."""
        return sum(len(one.pfns) for one in self.ranges)

    def ring_pages(self) -> array[int] | None:
        """Its pages if it can hold rings: one range of whole pages. Else None."""
        if len(self.ranges) != 1:
            return None
        only = self.ranges[0]
        whole = not only.byte_offset and only.byte_count == len(only.pfns) * HV_HYP_PAGE_SIZE
        return only.pfns if whole else None


class _Unfinished:
    __slots__ = ("data", "gpadl_id", "need", "rangecount", "relid")

    def __init__(self, gpadl_id: int, relid: int, need: int, rangecount: int) -> None:
        self.gpadl_id = gpadl_id
        self.relid = relid
        self.need = need  # bytes in all
        self.rangecount = rangecount
        self.data = bytearray()


class Finished(NamedTuple):
    """A GPADL_HEADER or BODY brought this to an end: `gpadl` None means that it was refused, `why`."""

    gpadl_id: int
    relid: int
    gpadl: Gpadl | None
    why: str = ""


def _claim(size: int, rangecount: int) -> int:
    return size // 8 + RANGE_VALUES * rangecount


PageCheck = Callable[[int, int], bool]
"""contains(gpa, size in bytes): whether all of it is guest RAM."""


class GpadlTable:
    """The GPADLs of one connection. The guest chooses ids; (relid, id) tells one from another.

    An unfinished one is found by its id alone, because that is all a body
    carries.
    """

    def __init__(self, contains: PageCheck) -> None:
        self._contains = contains
        self._complete: dict[int, dict[int, Gpadl]] = {}  # by relid, then by id
        self._count = 0  # of complete ones
        self._unfinished: dict[int, _Unfinished] = {}
        self._values = 0
        self.checked = 0
        """Pages looked at so far: who takes a guest's messages counts the cost of a turn by it."""

    def header(self, relid: int, gpadl_id: int, buflen: int, rangecount: int, tail: bytes) -> Finished | None:
        """Begin one. The result if it is complete, or refused, at once; None while bodies must follow."""

        def refuse(why: str) -> Finished:
            return Finished(gpadl_id, relid, None, why)

        if gpadl_id in self._unfinished or self.get(relid, gpadl_id) is not None:
            return refuse("the id is in use")
        if rangecount < 1 or buflen % 8 or buflen < 16 * rangecount:
            return refuse(f"{rangecount} ranges in {buflen} bytes")
        if rangecount > MAX_RANGES:
            return refuse(f"{rangecount} ranges, of which {MAX_RANGES} are the most")
        values = _claim(buflen, rangecount)
        if len(self) >= MAX_GPADLS or self._values + values > MAX_VALUES:
            return refuse("too many pages are described already")
        if len(tail) < buflen and len(self._unfinished) >= MAX_UNFINISHED:
            return refuse("too many are unfinished")
        self._values += values
        unfinished = self._unfinished[gpadl_id] = _Unfinished(gpadl_id, relid, buflen, rangecount)
        return self._append(unfinished, tail)

    def body(self, gpadl_id: int, tail: bytes) -> Finished | str | None:
        """Go on with one. Text when there is nothing to go on with: a body too many (S60)."""
        unfinished = self._unfinished.get(gpadl_id)
        if unfinished is None:
            return "no GPADL with this id waits for a body"
        return self._append(unfinished, tail)

    def _append(self, unfinished: _Unfinished, tail: bytes) -> Finished | None:
        room = unfinished.need - len(unfinished.data)
        # Whole values only; what is beyond the claim is padding (UEFI sends 240 bytes whatever it needs).
        unfinished.data += tail[: min(room, len(tail) & ~7)]
        if len(unfinished.data) < unfinished.need:
            return None
        del self._unfinished[unfinished.gpadl_id]
        ranges = self._ranges(unfinished)
        values = _claim(unfinished.need, unfinished.rangecount)
        if isinstance(ranges, str):
            self._values -= values
            return Finished(unfinished.gpadl_id, unfinished.relid, None, ranges)
        gpadl = Gpadl(unfinished.gpadl_id, unfinished.relid, ranges, values)
        self._complete.setdefault(gpadl.relid, {})[gpadl.gpadl_id] = gpadl
        self._count += 1
        return Finished(gpadl.gpadl_id, gpadl.relid, gpadl)

    def _ranges(self, unfinished: _Unfinished) -> tuple[GpaRangeList, ...] | str:
        data, at = bytes(unfinished.data), 0
        ranges = []
        for _ in range(unfinished.rangecount):
            if at + _range.size > len(data):
                return "a range is missing"
            byte_count, byte_offset = _range.unpack_from(data, at)
            at += _range.size
            if not byte_count or byte_offset >= HV_HYP_PAGE_SIZE:
                return f"a range of {byte_count} bytes at offset {byte_offset:#x}"
            pages = (byte_offset + byte_count + HV_HYP_PAGE_SIZE - 1) // HV_HYP_PAGE_SIZE
            if pages * 8 > len(data) - at:
                return f"a range of {byte_count} bytes with too few pages"
            pfns = array("Q", data[at : at + pages * 8])
            at += pages * 8
            self.checked += pages
            lowest, highest = min(pfns), max(pfns)
            if not self._contains(lowest * HV_HYP_PAGE_SIZE, (highest - lowest + 1) * HV_HYP_PAGE_SIZE):
                # Some are outside, or on both sides of RAM's hole.
                for pfn in pfns:
                    if not self._contains(pfn * HV_HYP_PAGE_SIZE, HV_HYP_PAGE_SIZE):
                        return f"page {pfn:#x} is not guest RAM"
            ranges.append(GpaRangeList(byte_count, byte_offset, pfns))
        return tuple(ranges) if at == len(data) else f"{len(data) - at} bytes too many"

    def get(self, relid: int, gpadl_id: int) -> Gpadl | None:
        """The complete GPADL of this channel, or None."""
        found = self._complete.get(relid)
        return None if found is None else found.get(gpadl_id)

    def of_channel(self, relid: int) -> list[Gpadl]:
        """The complete GPADLs of a channel."""
        return list(self._complete.get(relid, {}).values())

    def abandon(self, relid: int, gpadl_id: int) -> bool:
        """Forget an unfinished one of this channel; whether there was one."""
        unfinished = self._unfinished.get(gpadl_id)
        if unfinished is None or unfinished.relid != relid:
            return False
        del self._unfinished[gpadl_id]
        self._values -= _claim(unfinished.need, unfinished.rangecount)
        return True

    def drop(self, relid: int, gpadl_id: int) -> bool:
        """Forget a complete one; whether there was one."""
        gpadl = self.get(relid, gpadl_id)
        if gpadl is None:
            return False
        del self._complete[relid][gpadl_id]
        if not self._complete[relid]:
            del self._complete[relid]
        self._count -= 1
        self._values -= gpadl.values
        return True

    def drop_channel(self, relid: int) -> list[int]:
        """Forget everything of a channel; the ids of the unfinished, whose headers wait for an answer."""
        for gpadl in self.of_channel(relid):
            self.drop(relid, gpadl.gpadl_id)
        unfinished = [u.gpadl_id for u in self._unfinished.values() if u.relid == relid]
        for gpadl_id in unfinished:
            self.abandon(relid, gpadl_id)
        return unfinished

    def described(self) -> Iterator[tuple[int, int, int, int, bytes]]:
        """Each as a guest describes it: relid, id, bytes in all, ranges, and the bytes that have come."""
        for gpadl in self:
            data = b"".join(_range.pack(*one[:2]) + one.pfns.tobytes() for one in gpadl.ranges)
            yield gpadl.relid, gpadl.gpadl_id, len(data), len(gpadl.ranges), data
        for part in self._unfinished.values():
            yield part.relid, part.gpadl_id, part.need, part.rangecount, bytes(part.data)

    def clear(self) -> None:
        """Forget everything."""
        self._complete.clear()
        self._count = 0
        self._unfinished.clear()
        self._values = 0

    @property
    def values(self) -> int:
        """8-byte values claimed, and what ranges cost; for invariants and dumps."""
        return self._values

    @property
    def unfinished(self) -> int:
        """How many wait for bodies."""
        return len(self._unfinished)

    def __len__(self) -> int:
        return self._count + len(self._unfinished)

    def __iter__(self) -> Iterator[Gpadl]:
        return (gpadl for found in self._complete.values() for gpadl in found.values())
