"""Both backends of the atomics: the same results, and no lost update against a concurrent writer (S36)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.memory import atomics
from hvkvm.memory.atomics import Backend

U4 = st.integers(0, 2**32 - 1)
U8 = st.integers(0, 2**64 - 1)


def backends() -> list[Backend]:
    found = [atomics.instruction_backend()]
    with suppress(OSError, AttributeError):
        found.append(atomics.libatomic_backend())
    return found


BACKENDS = backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=[b.name for b in BACKENDS])


class Word:
    """An aligned word of 4 or 8 bytes with guard words around it."""

    def __init__(self, kind: type[ctypes.c_uint32] | type[ctypes.c_uint64], value: int) -> None:
        self.cells = (kind * 3)(0x5A, value, 0x5A)
        self.address = ctypes.addressof(self.cells) + ctypes.sizeof(kind)

    @property
    def value(self) -> int:
        assert self.cells[0] == self.cells[2] == 0x5A, "a neighbour was written"
        return int(self.cells[1])


@each_backend
@given(start=U8, mask=U8)
def test_fetch_or_and_fetch_and(backend: Backend, start: int, mask: int) -> None:
    word = Word(ctypes.c_uint64, start)
    assert backend.fetch_or_8(word.address, mask) == start
    assert word.value == start | mask
    word = Word(ctypes.c_uint64, start)
    assert backend.fetch_and_8(word.address, mask) == start
    assert word.value == start & mask


@each_backend
@given(start=U4, value=U4)
def test_exchange(backend: Backend, start: int, value: int) -> None:
    word = Word(ctypes.c_uint32, start)
    assert backend.exchange_4(word.address, value) == start
    assert word.value == value


@each_backend
@given(start=U4, expected=U4, desired=U4)
def test_compare_exchange(backend: Backend, start: int, expected: int, desired: int) -> None:
    word = Word(ctypes.c_uint32, start)
    assert backend.compare_exchange_4(word.address, expected, desired) is (start == expected)
    assert word.value == (desired if start == expected else start)
    word = Word(ctypes.c_uint32, start)
    assert backend.compare_exchange_4(word.address, start, desired) is True
    assert word.value == desired


@each_backend
def test_the_fence_can_be_called(backend: Backend) -> None:
    assert backend.fence() is None


@given(value=U4)
def test_plain_loads_and_stores(value: int) -> None:
    word = Word(ctypes.c_uint32, 0)
    atomics.store_4(word.address, value)
    assert word.value == value
    assert atomics.load_4(word.address) == value


def gil_free(backend: Backend) -> Callable[[int, int], int]:
    """The backend's own fetch_or on a handle that drops the GIL, so that two threads truly collide."""
    if backend.name == "libatomic":
        raw = ctypes.CDLL("libatomic.so.1").__getattr__("__atomic_fetch_or_8")
        raw.argtypes, raw.restype = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int), ctypes.c_uint64
        return lambda address, mask: int(raw(address, mask, 5))
    entry = ctypes.cast(backend.fetch_or_8, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert entry is not None
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)
    return prototype(entry)


@each_backend
@pytest.mark.usefixtures("tiny_switch_interval")
def test_s36_concurrent_setters_lose_no_bit(backend: Backend) -> None:
    """Each thread owns 32 bits of one word; a bit once set is there until its own thread clears it."""
    word = Word(ctypes.c_uint64, 0)
    fetch_or = gil_free(backend)
    lost: list[int] = []

    def setter(shift: int) -> None:
        mine = 0
        for _ in range(200):
            for bit in range(shift, shift + 32):
                before = fetch_or(word.address, 1 << bit)
                if before & 1 << bit or before & mine != mine:
                    lost.append(bit)
                mine |= 1 << bit
            before = backend.fetch_and_8(word.address, ~mine & 2**64 - 1)
            if before & mine != mine:
                lost.append(shift)
            mine = 0

    threads = [threading.Thread(target=setter, args=(shift,)) for shift in (0, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost
    assert word.value == 0
