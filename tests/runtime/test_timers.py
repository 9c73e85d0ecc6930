"""The timer heap: due order, equal times in order of making, cancelled ones leave and do not pile up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.runtime.timers import Timer, TimerHeap


def timer(due: float, heap: TimerHeap, callback: object = print) -> Timer:
    return Timer(due, callback, (), heap.discard)  # type: ignore[arg-type]


@given(dues=st.lists(st.integers(0, 20)), gone=st.sets(st.integers(0, 30)), now=st.integers(-1, 21))
def test_takes_what_is_due_in_order(dues: list[int], gone: set[int], now: int) -> None:
    heap = TimerHeap()
    timers = [timer(due, heap) for due in dues]
    for one in timers:
        earliest = min((t.due for t in timers[: timers.index(one)]), default=99)
        assert heap.add(one) is (one.due < earliest)
    for i in gone & set(range(len(timers))):
        timers[i].cancel()
    alive = sorted((one for one in timers if one.active), key=lambda one: one.due)
    assert heap.next_due() == (alive[0].due if alive else None)
    assert [one for one in heap.take_due(now) if one.active] == [one for one in alive if one.due <= now]
    assert heap.next_due() == min((one.due for one in alive if one.due > now), default=None)


def test_a_timer_runs_once_and_not_after_cancel() -> None:
    heap, runs = TimerHeap(), list[int]()
    one, other = timer(0, heap, lambda: runs.append(1)), timer(0, heap, lambda: runs.append(2))
    one.run()
    one.run()
    other.cancel()
    other.run()
    other.cancel()
    assert runs == [1]


def test_cancelled_timers_do_not_pile_up() -> None:
    heap = TimerHeap()
    keep = timer(1e9, heap)
    heap.add(keep)
    for i in range(10000):
        one = timer(1e6 + i, heap)
        heap.add(one)
        one.cancel()
    assert len(heap) < 200
    assert heap.next_due() == 1e9
    many = [timer((i * 7919) % 1000, heap) for i in range(1000)]
    for one in many:
        heap.add(one)
    for one in many:
        if one.due % 10:
            one.cancel()
    assert len(heap) < 300
    assert [one.due for one in heap.take_due(1e6)] == list(range(0, 1000, 10)), "in order still"
    assert heap.next_due() == 1e9
    heap.clear()
    assert heap.next_due() is None
