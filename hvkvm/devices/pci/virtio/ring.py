"""A split virtqueue as the device sees it: takes chains of descriptors, puts them back as used.

The rings are views of guest RAM, made when the driver enables the queue. Every index and descriptor is
copied once and checked; a driver that breaks the rules gets `Broken`, which its device turns into
DEVICE_NEEDS_RESET. The work of one chain is bounded by the queue's size.

Owner: the I/O loop; `Ring(...)` is made by the vCPU thread that enables the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hvkvm.abi import virtio
from hvkvm.devices.pci.virtio.table import LEAST_BYTES, SHORT_BYTES, short_table, whole_table
from hvkvm.errors import GuestMemoryError
from hvkvm.memory.atomics import fence
from hvkvm.memory.guest import RamRegion
from hvkvm.memory.page_vector import PageVector
from hvkvm.tuples import NamedTuple

DESC = virtio.vring_desc.size
USED = virtio.vring_used_elem.size


class Memory(Protocol):
    """What a ring needs of guest memory; each call raises GuestMemoryError for what is no RAM."""

    @property
    def regions(self) -> Sequence[RamRegion]: ...
    def read(self, gpa: int, n: int) -> bytes: ...
    def view(self, gpa: int, n: int) -> memoryview: ...


class Broken(Exception):
    """The driver has broken the rules of the ring; the text says how."""


class Place(NamedTuple):
    """Where a queue lies. `size` is in entries, a power of two."""

    size: int
    descriptors: int
    driver: int
    device: int


class Positions(NamedTuple):
    """How far both sides are, as 16-bit counters."""

    taken: int
    used: int


class Chain:
    """One request: the buffers that the device reads, then those that it writes.

    Where `data` is something, it has the buffers between the first and the last; `data_writable` says which
    of both kinds.
    """

    __slots__ = ("data", "data_writable", "head", "readable", "writable")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.data: PageVector | None = None
        self.data_writable = False

    @property
    def pieces(self) -> int:
        """How many buffers there are."""
        return len(self.readable) + len(self.writable) + (0 if self.data is None else len(self.data))

    def spread(self) -> None:
        """Have all buffers in the two lists."""
        data, self.data = self.data, None
        if data is not None and self.data_writable:
            self.writable[:0] = [piece for piece in data if piece]
        elif data is not None:
            self.readable += [piece for piece in data if piece]


class Ring:
    """The queue at `place`. ValueError for what is no queue, GuestMemoryError for one outside RAM."""

    def __init__(self, memory: Memory, place: Place, *, event_idx: bool) -> None:
        size = place.size
        if not 0 < size <= virtio.VRING_MAX_SIZE or size & size - 1:
            raise ValueError(f"a virtqueue of {size} entries")
        aligned = (
            place.descriptors % virtio.VRING_DESC_ALIGN_SIZE
            or place.driver % virtio.VRING_AVAIL_ALIGN_SIZE
            or place.device % virtio.VRING_USED_ALIGN_SIZE
        )
        if aligned:
            raise ValueError("a virtqueue that is not aligned")
        self._memory = memory
        self.size = size
        self._event_idx = event_idx
        self._descriptors = memory.view(place.descriptors, DESC * size)
        self._available = memory.view(place.driver, 6 + 2 * size).cast("H")
        self._used = memory.view(place.device, 6 + USED * size)
        self._used_words = self._used.cast("H")
        self._taken = 0
        self._put = 0
        self._published = 0

    @property
    def positions(self) -> Positions:
        """For a saved machine. Everything put is published then."""
        return Positions(self._taken, self._put)

    def described(self) -> str:
        """How far the driver is, and how far we are. Any thread."""
        at = f"available {self._available[1]}, taken {self._taken}, used {self._published}"
        return f"{self.size} entries, {at}"

    def go_on(self, positions: Positions) -> None:
        """Continue where a saved machine was."""
        self._taken = positions.taken & 0xFFFF
        self._put = self._published = positions.used & 0xFFFF

    # Taking.

    def take(self) -> Chain | None:
        """The next chain; None if there is none. Raises Broken."""
        waiting = self._available[1] - self._taken & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise Broken(f"{waiting} chains in a queue of {self.size}")
        head = self._available[2 + self._taken % self.size]
        self._taken = self._taken + 1 & 0xFFFF
        try:
            return self._walk(head)
        except GuestMemoryError as error:
            raise Broken(str(error)) from None

    def _walk(self, head: int) -> Chain:
        chain = Chain(head)
        view, unpack = self._memory.view, virtio.vring_desc.unpack_from
        table: memoryview | bytes = self._descriptors
        index, limit, indirect = head, self.size, False
        for _step in range(self.size + 1):
            if index >= limit:
                raise Broken(f"descriptor {index} of {limit}")
            address, length, flags, index = unpack(table, DESC * index)
            if flags & virtio.VRING_DESC_F_INDIRECT:
                if indirect or flags & virtio.VRING_DESC_F_NEXT:
                    raise Broken("an indirect descriptor with more behind it")
                if not length or length % DESC or length > DESC * self.size:
                    raise Broken(f"an indirect table of {length} bytes")
                table, limit = self._memory.read(address, length), length // DESC
                if not chain.readable and not chain.writable and self._usual(chain, table):
                    return chain
                index, indirect = 0, True
                continue
            if flags & virtio.VRING_DESC_F_WRITE:
                if length:
                    chain.writable.append(view(address, length))
            elif chain.writable:
                raise Broken("a buffer to read behind one to write")
            elif length:
                chain.readable.append(view(address, length))
            if not flags & virtio.VRING_DESC_F_NEXT:
                return chain
        raise Broken("a chain without end")

    def _usual(self, chain: Chain, table: bytes) -> bool:
        """Take an indirect table at once, if it is as drivers of disks lay it."""
        if len(table) == SHORT_BYTES:
            return self._short(chain, table)
        found = whole_table(self._memory, table) if len(table) >= LEAST_BYTES else None
        if found is None:
            return False
        chain.readable.append(self._memory.view(*found.header))
        chain.writable.append(self._memory.view(*found.status))
        chain.data, chain.data_writable = found.data, found.writable
        return True

    def _short(self, chain: Chain, table: bytes) -> bool:
        short = short_table(table)
        if short is None:
            return False
        view = self._memory.view
        header, data, writable, status = short
        # A copy is cheaper than a view that can be revoked.
        chain.readable.append(memoryview(self._memory.read(*header)))
        (chain.writable if writable else chain.readable).append(view(*data))
        chain.writable.append(view(*status))
        return True

    def more(self) -> bool:
        """Ask to hear of the next chain, and look once more: True if there is one already.

        The driver puts its chain there first and looks whether to notify second; we do it the other way.
        """
        if self._event_idx:
            self._used_words[2 + USED // 2 * self.size] = self._taken
            fence()
        return self._available[1] != self._taken

    # Giving back.

    def put(self, head: int, written: int) -> None:
        """The chain is done, and `written` bytes of its buffers are new. `publish` tells the driver."""
        virtio.vring_used_elem.pack_into(self._used, 4 + USED * (self._put % self.size), head, written)
        self._put = self._put + 1 & 0xFFFF

    def publish(self) -> bool:
        """Show the driver all that was put; whether it wants an interrupt for it."""
        old, new = self._published, self._put
        if old == new:
            return False
        fence()
        self._used_words[1] = self._published = new
        fence()
        if not self._event_idx:
            return not self._available[0] & virtio.VRING_AVAIL_F_NO_INTERRUPT
        event = self._available[2 + self.size]
        return (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
