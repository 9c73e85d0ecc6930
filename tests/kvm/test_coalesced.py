"""Bulk reading of the coalesced ring against reading it write by write."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi.kvm_structs import kvm_coalesced_mmio_ring_of
from hvkvm.kvm.coalesced import _SLOTS, CoalescedRing

OFFSET = 2 * 4096
PORT = 0x3F8


class Queue:
    """A ring in a vCPU's map, filled as KVM fills it."""

    def __init__(self, start: int) -> None:
        self.memory = bytearray(3 * 4096)
        self.vm = SimpleNamespace(coalesced_lock=threading.Lock(), check_extension=lambda number: 2)
        self.vcpu = SimpleNamespace(data=memoryview(self.memory))
        self.ring = kvm_coalesced_mmio_ring_of(_SLOTS).from_buffer(self.memory, OFFSET)
        self.ring.first = self.ring.last = start

    def put(self, address: int, pio: int, data: bytes) -> None:
        slot = self.ring.coalesced_mmio[self.ring.last]
        slot.phys_addr, slot.len, slot.pio = address, len(data), pio
        slot.data[: len(data)] = data
        self.ring.last = (self.ring.last + 1) % _SLOTS


STARTS = st.integers(0, _SLOTS - 1)


@given(start=STARTS, data=st.binary(max_size=_SLOTS - 1))
def test_bytes_of_the_port_come_out_at_once_wherever_the_ring_stands(start, data):
    queue = Queue(start)
    reader = CoalescedRing(queue.vm, queue.vcpu)
    assert reader.empty
    for byte in data:
        queue.put(PORT, 1, bytes((byte,)))
    assert reader.empty == (not data)
    assert reader.take_bytes(PORT) == data
    assert reader.empty
    assert reader.take_bytes(PORT) == b""
    queue.put(PORT, 1, b"!")
    assert reader.take_bytes(PORT) == b"!"


WRITE = st.one_of(
    st.just((PORT, 1, b"x")),
    st.just((PORT, 1, b"xy")),
    st.just((PORT, 0, b"x")),
    st.just((PORT + 1, 1, b"x")),
    st.just((PORT | 1 << 32, 0, b"xxxxxxxx")),
)


@given(start=STARTS, writes=st.lists(WRITE, min_size=1, max_size=40))
def test_anything_else_stays_for_the_reader_of_single_writes(start, writes):
    queue = Queue(start)
    for write in writes:
        queue.put(*write)
    plain = all(write == (PORT, 1, b"x") for write in writes)
    ring = CoalescedRing(queue.vm, queue.vcpu)
    assert ring.take_bytes(PORT) == (b"x" * len(writes) if plain else None)
    left = [(queued.address, int(queued.pio), queued.data) for queued in ring.take_writes()]
    assert left == ([] if plain else writes)
