"""Ring buffers in guest pages: a reader and a writer, each for either side.

The peer owns its index and everything that its packets say, and may change them
at any moment. So an index is read once, checked, and the checked copy is used
(S61); what a packet says about its length is copied before it is believed. A
peer that breaks the rules makes the ring `broken`, with the reason as text: it
gives no more packets, takes none, and raises nothing.

Signals. A producer signals only if the ring was empty when it published and the
consumer's interrupt_mask is 0; a consumer only if a producer waits for room
(pending_send_sz) and now has it. Both publish first, then fence, then look: the
peer does the same the other way round, so that one of them sees the other.

Index stores and loads are single words of a memoryview, which x86 orders as
release and acquire. Owner: one thread a ring end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hvkvm.abi.ring import (
    DESCRIPTOR_BYTES,
    FEAT_PENDING_SEND_SZ,
    RING_CONTROL_BYTES,
    TRAILER_BYTES,
    WORD_FEATURE_BITS,
    WORD_INTERRUPT_MASK,
    WORD_PENDING_SEND_SZ,
    WORD_READ_INDEX,
    WORD_WRITE_INDEX,
    Packet,
    descriptor,
    packet_header,
    trailer,
)
from hvkvm.memory.atomics import fence
from hvkvm.vmbus.pages import GuestPages, Ram

_LEAST = DESCRIPTOR_BYTES + TRAILER_BYTES
MAX_PACKET_BYTES = 0xFFFF * 8
"""Most that len8 can say, in bytes."""


class _Ring:
    """What both ends share: the control words and the data area, which wraps."""

    __slots__ = ("_data", "broken", "size", "words")

    def __init__(self, memory: Ram, pfns: Sequence[int]) -> None:
        control = memory.view(pfns[0] * RING_CONTROL_BYTES, RING_CONTROL_BYTES)
        self.words = control.cast("I")
        self._data = GuestPages(memory, pfns[1:])
        self.size = self._data.size
        self.broken = ""
        """Why the ring is used no more; empty while all is well."""

    def _index(self, word: int, name: str) -> int | None:
        """The checked value of an index word, read once; None breaks the ring."""
        value = self.words[word]
        if value >= self.size or value & 7:
            self.broken = self.broken or f"{name} {value:#x} in a ring of {self.size:#x} bytes"
            return None
        return value

    def _read(self, at: int, n: int) -> bytes:
        end = at + n
        if end <= self.size:
            return self._data.read(at, n)
        first = self.size - at
        return self._data.read(at, first) + self._data.read(0, n - first)

    def _views(self, at: int, n: int) -> list[memoryview]:
        end = at + n
        if end <= self.size:
            return self._data.views(at, n)
        first = self.size - at
        return self._data.views(at, first) + self._data.views(0, n - first)

    def _write(self, at: int, data: bytes | memoryview) -> int:
        """Write `data`; the index behind it."""
        n = len(data)
        end = at + n
        if end < self.size:
            self._data.write(at, data)
            return end
        first = self.size - at
        view = memoryview(data)
        self._data.write(at, view[:first])
        if n > first:
            self._data.write(0, view[first:])
        return n - first

    def describe(self) -> str:
        """Indices, mask and pending size as they are now, for dumps."""
        w = self.words
        text = (
            f"write {w[WORD_WRITE_INDEX]:#x} read {w[WORD_READ_INDEX]:#x} of {self.size:#x}, "
            f"mask {w[WORD_INTERRUPT_MASK]}, pending {w[WORD_PENDING_SEND_SZ]}"
        )
        return f"{text}, broken: {self.broken}" if self.broken else text

    def snapshot(self) -> dict[str, int | str | None]:
        """The same as values; `free` bytes are None while the indices make no sense. Any thread."""
        w = self.words
        write, read = w[WORD_WRITE_INDEX], w[WORD_READ_INDEX]
        sane = write < self.size and read < self.size
        return {
            "size": self.size,
            "write_index": write,
            "read_index": read,
            "free": self.size - (write - read) % self.size if sane else None,
            "interrupt_mask": w[WORD_INTERRUPT_MASK],
            "pending_send_sz": w[WORD_PENDING_SEND_SZ],
            "feature_bits": w[WORD_FEATURE_BITS],
            "broken": self.broken,
        }


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


class RingReader(_Ring):
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
        available = self._available()
        if not available or self.broken:
            return None
        if available < _LEAST:
            self.broken = f"{available} bytes are less than a packet"
            return None
        kind, offset8, len8, flags, trans_id = descriptor.unpack(self._read(self._at, DESCRIPTOR_BYTES))
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
        rest = self._read((self._at + DESCRIPTOR_BYTES) % self.size, total - DESCRIPTOR_BYTES)
        self._skip(total)
        split = offset - DESCRIPTOR_BYTES
        return Packet(kind, flags, trans_id, rest[:split], rest[split:])

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
        read = (self._at - self._published) % self.size
        if not read or self.broken:
            return False
        self.words[WORD_READ_INDEX] = self._at
        self._published = self._at
        fence()
        pending = self.words[WORD_PENDING_SEND_SZ] & ~7
        if not pending:
            return False
        write = self._index(WORD_WRITE_INDEX, "write index")
        if write is None:
            return False
        free = self.size - (write - self._at) % self.size
        return free > pending >= free - read

    def mask(self) -> None:
        """Ask the producer not to signal: we read until nothing is left."""
        self.words[WORD_INTERRUPT_MASK] = 1

    def unmask(self) -> bool:
        """Ask for signals again; whether something came meanwhile, for which no signal will come."""
        self.words[WORD_INTERRUPT_MASK] = 0
        fence()
        return not self.broken and self._available() > 0


class RingWriter(_Ring):
    """The producer's end. Packets are seen by the peer at `flush`, all at once."""

    __slots__ = ("_at", "_owed", "_published", "_reserved", "packets")

    def __init__(self, memory: Ram, pfns: Sequence[int]) -> None:
        super().__init__(memory, pfns)
        self._at = self._published = self._index(WORD_WRITE_INDEX, "write index") or 0
        self._reserved: list[tuple[int, int]] = []
        self._owed = False  # a signal for what was published ahead of `flush`
        self.packets = 0

    def _free(self) -> int | None:
        read = self._index(WORD_READ_INDEX, "read index")
        return None if read is None else self.size - (self._at - read) % self.size

    def put(
        self,
        kind: int,
        payload: bytes | memoryview,
        *,
        trans_id: int = 0,
        flags: int = 0,
        header: bytes = b"",
    ) -> bool:
        """Write a packet behind the others; False if there is no room now, or the ring is broken.

        After a False for lack of room the peer is asked to signal when it has
        made some (`flush` must follow, for the signal that may be due). A packet
        that can never fit: ValueError, a mistake of the caller.
        """
        if self.broken:
            return False
        self._reserved = []
        front = packet_header(kind, header, len(payload), trans_id, flags)
        padding = -len(payload) % 8
        need = len(front) + len(payload) + padding + TRAILER_BYTES
        if need >= self.size or need - TRAILER_BYTES > MAX_PACKET_BYTES:
            raise ValueError(f"a packet of {need} bytes never fits in a ring of {self.size}")
        free = self._free()
        if free is not None and need >= free:
            free = self._ask_for_room(need)
        if free is None or need >= free:
            return False
        start = self._at
        at = self._write(start, front)
        if payload:
            at = self._write(at, payload)
        at = self._write(at, bytes(padding) + trailer.pack(0, start))
        self._at = at
        self.packets += 1
        if self.words[WORD_PENDING_SEND_SZ]:
            self.words[WORD_PENDING_SEND_SZ] = 0
        return True

    def _ask_for_room(self, need: int) -> int | None:
        """Tell the peer what we wait for, then look again: it may have read before it could see that.

        What is staged is published first. Else a peer that reads all it can see
        may find that there was room before, say nothing, and say nothing either
        when it reads the rest.
        """
        self._publish()
        self.words[WORD_PENDING_SEND_SZ] = need
        fence()
        return self._free()

    def wait_for_room(self, need: int) -> bool:
        """Whether packets of `need` bytes, trailers included, fit; else the peer is asked to tell when."""
        if self.broken:
            return False
        free = self._free()
        if free is not None and need >= free:
            free = self._ask_for_room(need)
        return free is not None and need < free

    def reserve(self, front: int, most: int, least: int, count: int) -> list[memoryview]:
        """Room for up to `count` packets, to be filled in place: where their payloads go, in order.

        Each has `front` bytes (a multiple of 8) of payload in front of what is
        filled in, and then up to `most` (likewise); none is made for fewer than
        `least`. What is reserved is forgotten at the next `reserve` or `put`.
        """
        self._reserved = reserved = []
        free = None if self.broken else self._free()
        views: list[memoryview] = []
        if free is None:
            return views
        usable, at = free - 8, self._at  # a ring is never quite full
        extra = DESCRIPTOR_BYTES + front + TRAILER_BYTES
        for _ in range(count):
            room = min(most, usable - extra) & ~7
            if room < least:
                break
            reserved.append((at, room))
            views += self._views((at + DESCRIPTOR_BYTES + front) % self.size, room)
            usable -= extra + room
            at = (at + extra + room) % self.size
        return views

    def commit(self, kind: int, n: int, front: Callable[[int], bytes]) -> None:
        """Make packets of the `n` bytes that were filled in; `front(size)` is what goes before each.

        As many as it takes: all but the last are full. 0 takes the reservation back.
        """
        reserved, self._reserved = self._reserved, []
        for start, room in reserved:
            if n <= 0:
                return
            size = min(n, room)
            n -= size
            head = front(size)
            at = self._write(start, packet_header(kind, b"", len(head) + size, 0) + head)
            at = self._write((at + size) % self.size, bytes(-size % 8) + trailer.pack(0, start))
            self._at = at
            self.packets += 1
            if self.words[WORD_PENDING_SEND_SZ]:
                self.words[WORD_PENDING_SEND_SZ] = 0

    @property
    def consumed(self) -> int:
        """The peer's read index as it stands, unchecked: to see whether it moves."""
        return self.words[WORD_READ_INDEX]

    @property
    def staged(self) -> bool:
        """Whether packets wait for `flush`."""
        return self._at != self._published

    def flush(self) -> bool:
        """Publish what was written; whether the consumer must be signalled.

        Once for a whole batch: the ring was empty for the consumer if it has
        read up to where the batch begins (hv_signal_on_write()).
        """
        if self.broken:
            return False
        self._publish()
        owed, self._owed = self._owed, False
        return owed

    def _publish(self) -> None:
        if self._at == self._published:
            return
        before, self._published = self._published, self._at
        self.words[WORD_WRITE_INDEX] = self._at
        fence()
        if not self.words[WORD_INTERRUPT_MASK] and self.words[WORD_READ_INDEX] == before:
            self._owed = True

    def announce(self) -> None:
        """Say that this end heeds pending_send_sz. The guest does that for both of its rings."""
        self.words[WORD_FEATURE_BITS] = FEAT_PENDING_SEND_SZ
