"""Guest pages as one list for preadv and pwritev: the bytes that memoryviews of the same pages would move."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvkvm.errors import GuestMemoryError
from hvkvm.memory.mapping import PAGE_SIZE, Mapping, sealed_memfd
from hvkvm.memory.page_vector import LEAST_PAGES, MOST_PAGES, PageVector, page_vector

RAM_PAGES = 2 * MOST_PAGES


class Ram:
    """RAM of RAM_PAGES pages from gpa 0 on."""

    def __init__(self) -> None:
        self.fd = sealed_memfd("ram", RAM_PAGES * PAGE_SIZE)
        self.mapping = Mapping(self.fd, 0, RAM_PAGES * PAGE_SIZE)
        self.mapping.root[:] = Random(1).randbytes(RAM_PAGES * PAGE_SIZE)

    def view(self, gpa: int, n: int) -> memoryview:
        if gpa < 0 or gpa + n > RAM_PAGES * PAGE_SIZE:
            raise GuestMemoryError(gpa, n)
        return self.mapping.view(gpa, n)

    def bytes_of(self, pfns: list[int], offset: int, length: int) -> bytes:
        pages = b"".join(self.mapping.root[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] for pfn in pfns)
        return pages[offset : offset + length]


@pytest.fixture(scope="module")
def ram() -> Iterator[Ram]:
    made = Ram()
    yield made
    made.mapping.close()
    os.close(made.fd)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@given(st.lists(st.integers(0, RAM_PAGES - 1), min_size=LEAST_PAGES, max_size=80), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_moves_what_views_of_the_pages_would(
    ram: Ram, file: int, pfns: list[int], data: st.DataObject
) -> None:
    offset = data.draw(st.integers(0, PAGE_SIZE - 1))
    whole = len(pfns) * PAGE_SIZE - offset
    length = data.draw(st.integers(whole - PAGE_SIZE + 1, whole))
    vector = page_vector(ram, pfns, offset, length)
    if vector is None:
        assert max(pfns) - min(pfns) == len(pfns) - 1
        return
    assert (vector.size, len(vector)) == (length, len(pfns))
    expected = ram.bytes_of(pfns, offset, length)
    assert b"".join(vector) == expected
    assert b"".join(vector[1:]) == expected[PAGE_SIZE - offset :]
    assert bytes(vector[0]) == expected[: PAGE_SIZE - offset]
    assert vector.write(file, 8192) == length
    assert os.pread(file, length, 8192) == expected


def test_it_reads_onto_the_pages_and_nowhere_else(ram: Ram, file: int) -> None:
    pfns = Random(2).sample(range(RAM_PAGES), MOST_PAGES)
    length = MOST_PAGES * PAGE_SIZE - 700
    data = os.urandom(length)
    os.pwrite(file, data, 0)
    before = bytes(ram.mapping.root)
    vector = page_vector(ram, pfns, 200, length)
    assert vector is not None
    assert vector.read(file, 0) == length
    assert ram.bytes_of(pfns, 200, length) == data
    untouched = set(range(RAM_PAGES)) - set(pfns)
    assert all(
        ram.mapping.root[at : at + PAGE_SIZE] == before[at : at + PAGE_SIZE]
        for at in (pfn * PAGE_SIZE for pfn in untouched)
    )
    assert vector.read(file, length - 10) == 10  # the file ends there
    assert vector.read(file, length) == 0


def test_an_error_of_the_host_is_raised(ram: Ram, tmp_path: Path) -> None:
    vector = page_vector(ram, range(0, 2 * LEAST_PAGES, 2), 0, LEAST_PAGES * PAGE_SIZE)
    assert vector is not None
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        vector.write(fd, 0)
    os.close(fd)


@pytest.mark.parametrize(
    "pfns",
    [
        [*range(0, 2 * LEAST_PAGES, 2), RAM_PAGES],
        [*range(0, 2 * LEAST_PAGES, 2), 1 << 63],
        [*range(0, 2 * LEAST_PAGES, 2), (1 << 64) - 1],
        range(LEAST_PAGES - 1),
        range(0, 2 * LEAST_PAGES - 2, 2),
        range(LEAST_PAGES),
        range(0, 2 * MOST_PAGES + 2, 2),
    ],
    ids=["outside", "far outside", "last of all", "few", "few apart", "neighbours", "too many"],
)
def test_memoryviews_are_for_the_rest(ram: Ram, pfns: list[int]) -> None:
    assert page_vector(ram, pfns, 0, len(pfns) * PAGE_SIZE) is None


def test_pages_stay_mapped_for_as_long_as_it_lives(file: int) -> None:
    ram = Ram()
    pfns = range(0, 2 * LEAST_PAGES, 2)
    vector: PageVector | None = page_vector(ram, pfns, 0, LEAST_PAGES * PAGE_SIZE)
    assert vector is not None
    ram.mapping.close()
    os.close(ram.fd)
    assert vector.write(file, 0) == vector.size
    assert os.pread(file, vector.size, 0) == bytes(vector.size), "guest memory was still reached"
    del vector
    gc.collect()
