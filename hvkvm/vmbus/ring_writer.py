"""The producer's end of a ring: packets in, seen by the peer all at once.

`ring` says what holds of both ends. Owner: one thread a ring end.
Nothing here raises for what the peer writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from struct import Struct

from hvkvm.abi.ring import (
    DESCRIPTOR_BYTES,
    FEAT_PENDING_SEND_SZ,
    TRAILER_BYTES,
    WORD_FEATURE_BITS,
    WORD_INTERRUPT_MASK,
    WORD_PENDING_SEND_SZ,
    WORD_READ_INDEX,
    WORD_WRITE_INDEX,
    descriptor,
    packet_header,
    trailer,
)
from hvkvm.memory.atomics import fence
from hvkvm.vmbus.pages import Ram
from hvkvm.vmbus.ring import MAX_PACKET_BYTES, RingEnd

SHORT_PAYLOAD = 1024

_PADDING = tuple(map(bytes, range(8)))


@lru_cache(maxsize=256)
def _whole_packet(payload: int) -> Struct:
    """Descriptor, a payload of so many bytes with its padding, trailer: one call for all of them."""
    return Struct(f"{descriptor.format}{payload}s{-payload % 8}x{trailer.format.removeprefix('<')}")


class RingWriter(RingEnd):
    """The producer's end. Packets are seen by the peer at `flush`, all at once."""

    __slots__ = ("_at", "_owed", "_published", "_reserved", "packets")

    def __init__(self, memory: Ram, pfns: Sequence[int]) -> None:
        super().__init__(memory, pfns)
        self._at = self._published = self._index(WORD_WRITE_INDEX, "write index") or 0
        self._reserved: list[tuple[int, int]] = []
        self._owed = False  # a signal for what was published ahead of `flush`
        self.packets = 0

    def fits(self, payload_bytes: int, header_bytes: int = 0) -> bool:
        """Whether a packet of this payload and header can ever be put: the peer chose the ring's size."""
        need = DESCRIPTOR_BYTES + (-(-header_bytes // 8) + -(-payload_bytes // 8)) * 8 + TRAILER_BYTES
        return need < self.size and need - TRAILER_BYTES <= MAX_PACKET_BYTES

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
        if self._reserved:
            self._reserved = []
        n, start, size = len(payload), self._at, self.size
        eights = DESCRIPTOR_BYTES + len(header) + n + 7 >> 3
        need = eights * 8 + TRAILER_BYTES
        if need >= size or need - TRAILER_BYTES > MAX_PACKET_BYTES:
            raise ValueError(f"a packet of {need} bytes never fits in a ring of {size}")
        read = self.words[WORD_READ_INDEX]  # as in _free(), written out
        if read >= size or read & 7 or need >= size - (start - read) % size:
            free = self._free()
            if free is not None and need >= free:
                free = self._ask_for_room(need)
            if free is None or need >= free:
                return False
        front = descriptor.pack(kind, DESCRIPTOR_BYTES + len(header) >> 3, eights, flags, trans_id)
        if n <= SHORT_PAYLOAD:  # joined, it takes one write in place of three
            data = b"".join((front, header, payload, _PADDING[-n % 8], trailer.pack(0, start)))
            only, end = self._data.only, start + need
            if only is not None and end < size:
                only[start:end] = data
                self._at = end
            else:
                self._at = self._write(start, data)
        else:
            at = self._write(self._write(start, front + header), payload)
            self._at = self._write(at, _PADDING[-n % 8] + trailer.pack(0, start))
        self.packets += 1
        if self.words[WORD_PENDING_SEND_SZ]:
            self.words[WORD_PENDING_SEND_SZ] = 0
        return True

    def put_all(self, kind: int, packets: Iterable[tuple[int, bytes]]) -> int:
        """Write packets of these transaction ids and payloads, by one write; how many there was room for.

        For many short ones: the list may be longer than the ring. Nobody is asked for room; `put` does that.
        """
        if self.broken:
            return 0
        if self._reserved:
            self._reserved = []
        free = self._free()
        if free is None:
            return 0
        start, size, count = self._at, self.size, 0
        at = start
        parts: list[bytes] = []
        last: bytes | None = None
        need, put = 0, parts.append
        for trans_id, payload in packets:
            if payload is not last:  # many are answered alike
                last = payload
                n = len(payload)
                eights = DESCRIPTOR_BYTES + n + 7 >> 3
                need = eights * 8 + TRAILER_BYTES
                pack = _whole_packet(n).pack
            if need >= free:
                break
            free -= need
            put(pack(kind, DESCRIPTOR_BYTES >> 3, eights, 0, trans_id, payload, 0, at))
            at += need
            if at >= size:
                at -= size
            count += 1
        if count:
            self._at = self._write(start, b"".join(parts))
            self.packets += count
            if self.words[WORD_PENDING_SEND_SZ]:
                self.words[WORD_PENDING_SEND_SZ] = 0
        return count

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
    def position(self) -> int:
        """Where the next packet begins: what `consumed` will be once the peer has read all before."""
        return self._at

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
        if self._at != self._published:
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
