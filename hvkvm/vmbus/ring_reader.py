"""The consumer's end of a ring: packets out, room back.

`ring` says what holds of both ends. Owner: one thread a ring end.
Nothing here raises for what the peer writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvkvm.abi.ring import (
    DESCRIPTOR_BYTES,
    TRAILER_BYTES,
    WORD_INTERRUPT_MASK,
    WORD_PENDING_SEND_SZ,
    WORD_READ_INDEX,
    WORD_WRITE_INDEX,
    Packet,
    descriptor,
)
from hvkvm.memory.atomics import fence
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.ring import MAX_PACKET_BYTES, RingEnd

_LEAST = DESCRIPTOR_BYTES + TRAILER_BYTES

_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time that calling its class takes."""


class RawPacket:
    """A packet whose payload still lies in the ring: valid until `RingReader.publish`.

    `views` may change under the reader's hands: for payloads that nobody
    interprets, such as a stream's bytes on their way to a socket. `front` is
    the copied beginning of the payload that was asked for; `views` begin
    behind it.
    """

    __slots__ = ("flags", "front", "trans_id", "type", "views")

    def __init__(
        self, type_: int, flags: int, trans_id: int, views: list[memoryview], front: bytes = b""
    ) -> None:
        self.type = type_
        self.flags = flags
        self.trans_id = trans_id
        self.views = views
        self.front = front


class RingReader(RingEnd):
    """The consumer's end. `max_packet` bytes is the most a packet may have, descriptor included."""

    __slots__ = ("_at", "_limit", "_max", "_published", "packets")

    def __init__(self, memory: Ram, pfns: Sequence[int], *, max_packet: int = MAX_PACKET_BYTES) -> None:
        super().__init__(memory, pfns)
        self._at = self._published = self._index(WORD_READ_INDEX, "read index") or 0
        # What is between _at and _limit was seen written; the peer's index is read again only behind it.
        self._limit = self._at
        self._max = max_packet
        self.packets = 0

    def _available(self) -> int:
        """Bytes to read, 0 also if the ring is broken."""
        if self._at == self._limit:
            if self.broken:
                return 0
            write = self._index(WORD_WRITE_INDEX, "write index")
            if write is None:
                return 0
            self._limit = write
        return (self._limit - self._at) % self.size

    def _next(self) -> tuple[int, int, int, int, int] | None:
        """The descriptor of the next packet, checked against what is there (S61)."""
        at = self._at
        available = (self._limit - at) % self.size or self._available()
        if not available or self.broken:
            return None
        if available < _LEAST:
            self.broken = f"{available} bytes are less than a packet"
            return None
        only = self._data.only
        if only is not None and at + DESCRIPTOR_BYTES <= self.size:
            kind, offset8, len8, flags, trans_id = descriptor.unpack(only[at : at + DESCRIPTOR_BYTES])
        else:
            kind, offset8, len8, flags, trans_id = descriptor.unpack(self._read(at, DESCRIPTOR_BYTES))
        total = len8 * 8
        if not 2 <= offset8 <= len8 or total + TRAILER_BYTES > available or total > self._max:
            self.broken = f"a packet of {total} bytes, data at {offset8 * 8}, {available} bytes available"
            return None
        return kind, offset8 * 8, total, flags, trans_id

    def get(self) -> Packet | None:
        """The next packet, copied; None when the ring is empty or broken."""
        found = self._next()
        if found is None:
            return None
        kind, offset, total, flags, trans_id = found
        # The descriptor's copy decides; what lies in the ring now may say something else.
        at, end = self._at + DESCRIPTOR_BYTES, self._at + total
        only = self._data.only
        if only is not None and end <= self.size:
            rest = only[at:end].tobytes()
        else:
            rest = self._read(at % self.size, total - DESCRIPTOR_BYTES)
        self._at = (end + TRAILER_BYTES) % self.size
        self.packets += 1
        split = offset - DESCRIPTOR_BYTES
        return _tuple(Packet, (kind, flags, trans_id, rest[:split], rest[split:]))

    def waiting(self, most: int) -> bytes:
        """A copy of up to `most` bytes that wait, not beyond the end of the data area; none if broken.

        For who takes many packets of one kind at once: `took` says what of it was taken, whole packets that
        were checked as `get` does.
        """
        available = self._available()
        return self._read(self._at, min(available, most, self.size - self._at)) if available else b""

    def took(self, packets: int, size: int) -> None:
        """So many packets of what `waiting` gave were taken, of so many bytes with their trailers."""
        self._at = (self._at + size) % self.size
        self.packets += packets

    def get_raw(self, front: int = 0) -> RawPacket | None:
        """The next packet without copying its payload, but for its first `front` bytes (or all, if fewer).

        None when the ring is empty or broken.
        """
        found = self._next()
        if found is None:
            return None
        kind, offset, total, flags, trans_id = found
        at, rest = (self._at + offset) % self.size, total - offset
        if front > rest:
            front = rest
        copied = self._read(at, front) if front else b""
        views = self._views((at + front) % self.size, rest - front) if rest > front else []
        self._skip(total)
        return RawPacket(kind, flags, trans_id, views, copied)

    def _skip(self, total: int) -> None:
        self._at = (self._at + total + TRAILER_BYTES) % self.size
        self.packets += 1

    def publish(self) -> bool:
        """Give the room of what was read back; whether the producer waits for it and must be signalled.

        It is the rule of Linux's hv_pkt_iter_close(): signal if the free space
        went from at most pending_send_sz to more.
        """
        before = self._published
        if self._at == before or self.broken:
            return False
        self.words[WORD_READ_INDEX] = self._published = self._at
        fence()
        return self._is_awaited(before)

    def _is_awaited(self, before: int) -> bool:
        """Whether the producer waits for the room behind `before`, which it has by now."""
        pending = self.words[WORD_PENDING_SEND_SZ] & ~7
        if not pending:
            return False
        write = self._index(WORD_WRITE_INDEX, "write index")
        if write is None:
            return False
        free = self.size - (write - self._at) % self.size
        return free > pending >= free - (self._at - before) % self.size

    def rest(self) -> tuple[bool, bool]:
        """`publish`, then `unmask`, and what they tell. One fence serves for both.

        The room goes back before the last look: a producer that waits for it may then write.
        """
        words, before = self.words, self._published
        if self.broken:
            return False, False
        words[WORD_READ_INDEX] = self._published = at = self._at
        words[WORD_INTERRUPT_MASK] = 0
        fence()
        return at != before and self._is_awaited(before), self._available() > 0

    def mask(self) -> None:
        """Ask the producer not to signal: we read until nothing is left. A broken ring is left alone."""
        if not self.broken:
            self.words[WORD_INTERRUPT_MASK] = 1

    def unmask(self) -> bool:
        """Ask for signals again; whether something came meanwhile, for which no signal will come.

        A broken ring is left alone.
        """
        if self.broken:
            return False
        self.words[WORD_INTERRUPT_MASK] = 0
        fence()
        return self._available() > 0
