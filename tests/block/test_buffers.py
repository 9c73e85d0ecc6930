"""Lists of buffers: cut anywhere, read and written whole, more of them than one call takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.block import buffers
from hvkvm.block.buffers import IOV_MAX, Cutter, clear, read_fully, size_of, write_fully, zeros


def views(data: bytes, sizes: list[int]) -> list[memoryview]:
    """`data` in buffers of these sizes, and one with the rest."""
    store = memoryview(bytearray(data))
    parts = []
    for size in sizes:
        parts.append(store[:size])
        store = store[size:]
    return [*parts, store]


@given(st.binary(max_size=200), st.lists(st.integers(0, 40)), st.lists(st.integers(0, 60)))
def test_cutting_keeps_every_byte_in_order(data: bytes, sizes: list[int], takes: list[int]) -> None:
    cutter = Cutter(views(data, sizes))
    taken = [cutter.take(n) for n in [*takes, len(data)]]
    for n, parts in zip(takes, taken, strict=False):
        assert size_of(parts) <= n
    assert b"".join(b"".join(parts) for parts in taken) == data


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    data = os.urandom(3 * IOV_MAX * 5)
    parts = views(data, [5] * (3 * IOV_MAX))
    with (tmp_path / "file").open("w+b") as file:
        assert write_fully(file.fileno(), parts, 7) == len(data)
        clear(parts)
        assert not any(b"".join(parts))
        assert read_fully(file.fileno(), parts, 7) == len(data)
        assert b"".join(parts) == data
        assert read_fully(file.fileno(), parts, 7 + 100) == len(data) - 100


def test_short_transfers_go_on_where_they_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = os.urandom(10_000)
    with (tmp_path / "file").open("w+b") as file:
        file.write(data)
        file.flush()
        whole = os.preadv

        def a_few(fd: int, parts: list[memoryview], offset: int, flags: int) -> int:
            return whole(fd, [parts[0][:777]], offset, flags)

        monkeypatch.setattr(buffers.os, "preadv", a_few)
        parts = views(bytes(10_000), [1000, 3, 4000])
        assert read_fully(file.fileno(), parts, 0) == 10_000
    assert b"".join(parts) == data


def test_zeros_of_any_length() -> None:
    assert size_of(zeros(3 * buffers.ZERO_BYTES + 5)) == 3 * buffers.ZERO_BYTES + 5
    assert not any(b"".join(zeros(buffers.ZERO_BYTES + 5)))
    assert zeros(0) == []
