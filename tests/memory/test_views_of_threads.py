"""Threads that view and read the same memory at once: none takes a view away from another.

With a GIL that is no question. Without one, slices of one memoryview lose count of one another, now and then.
So what is run here by threads may go well by chance, and the first test looks at what Python counts in.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import pytest
from at_once import at_once

from hvkvm.abi.ring import VM_PKT_DATA_USING_GPA_DIRECT, GpaRange, Packet, gpa_direct_header
from hvkvm.abi.storvsp import READ_TYPE, Srb
from hvkvm.block.buffers import clear, zeros
from hvkvm.devices.synth.storvsp_pages import DataPages
from hvkvm.memory.atomics import FREE_THREADED
from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.mapping import PAGE_SIZE

SIZE = 1 << 20
ROUNDS = 20000
THREADS = 4


class Slots:
    """Stands for a VM that has room for every slot."""

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """It is there."""


def request(pages: tuple[int, ...]) -> tuple[Srb, Packet]:
    """One that reads into these guest pages, all but the first 512 bytes."""
    length = len(pages) * PAGE_SIZE - 512
    header = gpa_direct_header([GpaRange(length, 512, pages)])
    return Srb(0, 0, 0, bytes(10), READ_TYPE, length, 0), Packet(
        VM_PKT_DATA_USING_GPA_DIRECT, 1, 1, header, b""
    )


@pytest.mark.skipif(not FREE_THREADED, reason="with a GIL they may: it keeps their count")
def test_no_two_views_of_memory_are_counted_together() -> None:
    with GuestMemory(Slots(), SIZE) as memory:
        named = DataPages(memory)
        views = [memory.view(0, 64), memory.view(0, 64), memory.view(64, 64), zeros(8)[0], zeros(8)[0]]
        for pages in [(5,), (5,), tuple(range(5, 105, 2)), tuple(range(5, 105, 2))]:
            buffers = named.of(*request(pages))
            assert buffers is not None
            views.append(buffers[0])
        counted_in = [gc.get_referents(view) for view in views]
        assert all(len(one) == 1 for one in counted_in)
        assert len({id(one[0]) for one in counted_in}) == len(views)


def views(memory: GuestMemory) -> None:
    for _ in range(ROUNDS):
        view = memory.view(0, 64)
        view[0] = 7
        del view


def copies(memory: GuestMemory) -> None:
    for _ in range(ROUNDS):
        assert memory.read(0, 64)[0] == 7
        assert memory.read_u32(9) == 0
        assert memory.read_u64(1) == 0


@pytest.mark.usefixtures("tiny_switch_interval")
@pytest.mark.parametrize("use", [views, copies])
def test_ram_stays_usable_while_threads_look_at_it(use: Callable[[GuestMemory], None]) -> None:
    with GuestMemory(Slots(), SIZE) as memory:
        kept = memory.view(0, 64)
        kept[0] = 7
        at_once(*[partial(use, memory)] * THREADS)
        assert (kept[0], memory.read_u32(0), memory.view(0, 1)[0]) == (7, 7, 7)
        memory.write(0, b"\1")
        assert kept[0] == 1


@pytest.mark.usefixtures("tiny_switch_interval")
@pytest.mark.parametrize("pages", [(5,), tuple(range(5, 105, 2))], ids=["a page", "a list"])
def test_what_a_worker_lets_go_of_stays_with_the_loop(pages: tuple[int, ...]) -> None:
    """A guest names the same pages again while workers are done with the requests before."""
    srb, packet = request(pages)
    rounds = ROUNDS // len(pages)
    with GuestMemory(Slots(), SIZE) as memory:
        named = DataPages(memory)
        requests: SimpleQueue[object] = SimpleQueue()

        def loop() -> None:
            try:
                for _ in range(rounds):
                    buffers = named.of(srb, packet)
                    assert buffers is not None
                    assert buffers[0][0] == 0
                    requests.put(buffers)
            finally:
                for _ in range(THREADS):
                    requests.put(None)

        def worker() -> None:
            while (buffers := requests.get()) is not None:
                for buffer in buffers:  # type: ignore[attr-defined]
                    assert buffer[:8] == bytes(8)

        at_once(loop, *[worker] * THREADS)


@pytest.mark.usefixtures("tiny_switch_interval")
def test_threads_that_need_zeros_all_get_them() -> None:
    def work() -> None:
        buffer = memoryview(bytearray(b"x" * 512))
        for _ in range(ROUNDS):
            assert zeros(512)[0][511] == 0
            clear([buffer])
        assert bytes(buffer) == bytes(512)

    at_once(*[work] * THREADS)
