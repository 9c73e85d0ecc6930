"""Guest pages as one list for preadv and pwritev: the bytes that memoryviews of the same pages would move."""

from __future__ import annotations

import gc
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvkvm.errors import GuestMemoryError
from hvkvm.memory.guest import RamRegion
from hvkvm.memory.mapping import PAGE_SIZE, Mapping, sealed_memfd
from hvkvm.memory.page_vector import LEAST_PAGES, MOST_PAGES, PageVector, page_numbers, page_vector

RAM_PAGES = 2 * MOST_PAGES
HIGH = 1 << 20
"""The first page above the hole below 4 GiB; half of RAM lies there."""
HIGH_PAGES = HIGH + RAM_PAGES // 2


class Ram:
    """RAM on both sides of a hole, as a machine of more than 3 GiB has it."""

    def __init__(self) -> None:
        self.fd = sealed_memfd("ram", RAM_PAGES * PAGE_SIZE)
        half = RAM_PAGES * PAGE_SIZE // 2
        self.maps = [Mapping(self.fd, at, half) for at in (0, half)]
        self.regions = tuple(
            RamRegion(gpa * PAGE_SIZE, half, one.hva, 0)
            for gpa, one in zip((0, HIGH), self.maps, strict=True)
        )
        for number, one in enumerate(self.maps):
            one.root[:] = Random(number).randbytes(half)

    def view(self, gpa: int, n: int) -> memoryview:
        for region, mapping in zip(self.regions, self.maps, strict=True):
            if region.gpa <= gpa and gpa + n <= region.end:
                return mapping.view(gpa - region.gpa, n)
        raise GuestMemoryError(gpa, n)

    def close(self) -> None:
        for one in self.maps:
            one.close()
        os.close(self.fd)

    def bytes_of(self, pfns: Sequence[int], offset: int, length: int) -> bytes:
        pages = b"".join(self.view(pfn * PAGE_SIZE, PAGE_SIZE) for pfn in pfns)
        return pages[offset : offset + length]


def vector_of(ram: Ram, pfns: Sequence[int], offset: int, length: int) -> PageVector | None:
    return page_vector(ram, array("Q", pfns).tobytes(), offset, length)


@pytest.fixture(scope="module")
def ram() -> Iterator[Ram]:
    made = Ram()
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@given(
    st.sampled_from((0, HIGH)),
    st.lists(st.integers(0, RAM_PAGES // 2 - 1), min_size=LEAST_PAGES, max_size=80),
    st.data(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_moves_what_views_of_the_pages_would(
    ram: Ram, file: int, base: int, pfns: list[int], data: st.DataObject
) -> None:
    pfns = [base + pfn for pfn in pfns]
    offset = data.draw(st.integers(0, PAGE_SIZE - 1))
    whole = len(pfns) * PAGE_SIZE - offset
    length = data.draw(st.integers(whole - PAGE_SIZE + 1, whole))
    vector = vector_of(ram, pfns, offset, length)
    assert vector is not None
    assert (vector.size, len(vector)) == (length, len(pfns))
    expected = ram.bytes_of(pfns, offset, length)
    assert b"".join(vector) == expected
    assert b"".join(vector[1:]) == expected[PAGE_SIZE - offset :]
    assert bytes(vector[0]) == expected[: PAGE_SIZE - offset]
    assert vector.write(file, 8192) == length
    assert os.pread(file, length, 8192) == expected


@pytest.mark.parametrize("base", [0, HIGH], ids=["low", "high"])
def test_neighbours_are_one_piece(ram: Ram, file: int, base: int) -> None:
    pfns = range(base + 3, base + 3 + LEAST_PAGES)
    length = LEAST_PAGES * PAGE_SIZE - 300
    vector = vector_of(ram, pfns, 200, length)
    assert vector is not None
    assert (vector.size, len(vector)) == (length, 1)
    assert vector.is_aligned(4)
    assert not vector.is_aligned(512)
    expected = ram.bytes_of(pfns, 200, length)
    assert bytes(vector[0]) == expected
    assert vector.write(file, 0) == length
    assert os.pread(file, length, 0) == expected


def test_page_numbers() -> None:
    numbers = [*range(20), (1 << 52) - 1, 7]
    addresses = array("Q", [number << 12 for number in numbers])
    assert page_numbers(addresses.tobytes()) == array("Q", numbers).tobytes()
    for odd in (1, 8, 2048, 4095):
        for place in (0, 10, 21):
            wrong = addresses[:]
            wrong[place] += odd
            assert page_numbers(wrong.tobytes()) is None


def test_it_reads_onto_the_pages_and_nowhere_else(ram: Ram, file: int) -> None:
    count = MOST_PAGES // 2
    pfns = [HIGH + pfn for pfn in Random(2).sample(range(RAM_PAGES // 2), count)]
    length = count * PAGE_SIZE - 700
    data = os.urandom(length)
    os.pwrite(file, data, 0)
    before = [bytes(one.root) for one in ram.maps]
    vector = vector_of(ram, pfns, 200, length)
    assert vector is not None
    assert vector.read(file, 0) == length
    assert ram.bytes_of(pfns, 200, length) == data
    assert bytes(ram.maps[0].root) == before[0]
    for pfn in set(range(HIGH, HIGH_PAGES)) - set(pfns):
        at = (pfn - HIGH) * PAGE_SIZE
        assert ram.maps[1].root[at : at + PAGE_SIZE] == before[1][at : at + PAGE_SIZE]
    assert vector.read(file, length - 10) == 10  # the file ends there
    assert vector.read(file, length) == 0


def test_an_error_of_the_host_is_raised(ram: Ram, tmp_path: Path) -> None:
    vector = vector_of(ram, range(0, 2 * LEAST_PAGES, 2), 0, LEAST_PAGES * PAGE_SIZE)
    assert vector is not None
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        vector.write(fd, 0)
    os.close(fd)


@pytest.mark.parametrize(
    "pfns",
    [
        [*range(0, 2 * LEAST_PAGES, 2), RAM_PAGES // 2],
        [*range(HIGH, HIGH + 2 * LEAST_PAGES, 2), HIGH_PAGES],
        [*range(HIGH, HIGH + 2 * LEAST_PAGES, 2), HIGH - 1],
        [1 << 63, *range(0, 2 * LEAST_PAGES, 2)],
        [*range(0, 2 * LEAST_PAGES, 2), (1 << 64) - 1],
        [(1 << 64) - 1] * 2 * LEAST_PAGES,
        [*range(0, 2 * LEAST_PAGES, 2), HIGH],
        range(LEAST_PAGES - 1),
        range(0, 2 * LEAST_PAGES - 2, 2),
        range(RAM_PAGES // 2 - 1, RAM_PAGES // 2 + LEAST_PAGES),
        range(0, 2 * MOST_PAGES + 2, 2),
    ],
    ids=[
        *(
            "beyond the low part",
            "beyond the high one",
            "below it",
            "far outside",
            "last of all",
            "all there",
        ),
        *("both parts", "few", "few apart", "neighbours and no RAM", "too many"),
    ],
)
def test_memoryviews_are_for_the_rest(ram: Ram, pfns: Sequence[int]) -> None:
    assert vector_of(ram, pfns, 0, len(pfns) * PAGE_SIZE) is None


def test_pages_stay_mapped_for_as_long_as_it_lives(file: int) -> None:
    ram = Ram()
    pfns = range(0, 2 * LEAST_PAGES, 2)
    vector: PageVector | None = vector_of(ram, pfns, 0, LEAST_PAGES * PAGE_SIZE)
    assert vector is not None
    ram.close()
    assert vector.write(file, 0) == vector.size
    assert os.pread(file, vector.size, 0) == bytes(vector.size), "guest memory was still reached"
    del vector
    gc.collect()
