"""Guest RAM: bounds for any guest-chosen address, word access, revocable views, and nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.errors import GuestMemoryError
from hvkvm.memory import atomics, mapping
from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.overlay import OverlayPage

LOW = 0xC000_0000
HIGH = 0x1_0000_0000
TAIL = 4 << 20
HIGH_END = HIGH + TAIL


class Slots:
    """Stands for a VM: records slot calls, and can fail the nth."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, int, int, int]] = []
        self.fail_at = fail_at

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        if len(self.calls) == self.fail_at:
            raise OSError(22, "refused")
        self.calls.append((slot, gpa, size, hva))


def mapped(hva: int) -> bool:
    """Whether this process has any mapping at `hva`."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            if start <= hva < end:
                return True
    return False


def open_fds() -> set[str]:
    gc.collect()  # or what an earlier test dropped in a cycle is closed in the middle of this one
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def big() -> Iterator[GuestMemory]:
    """RAM on both sides of the hole; only touched pages cost anything."""
    with GuestMemory(Slots(), LOW + TAIL) as memory:
        yield memory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(Slots(), 1 << 20) as memory:
        yield memory


EDGES = st.sampled_from([0, LOW, HIGH, HIGH_END, 2**32, 2**52, 2**63, 2**64])
GPAS = st.one_of(
    st.builds(lambda edge, off: edge + off, EDGES, st.integers(-5000, 5000)),
    st.integers(-(2**65), 2**65),
)
SIZES = st.one_of(st.integers(-10, 10000), st.sampled_from([LOW, TAIL, 2**32, 2**63, 2**64]))


def in_ram(gpa: int, n: int) -> bool:
    """The rule, said another way: some region holds both the start and the end."""
    return n >= 0 and any(start <= gpa and gpa + n <= end for start, end in ((0, LOW), (HIGH, HIGH_END)))


@given(gpa=GPAS, n=SIZES)
def test_contains_agrees_with_the_map(big: GuestMemory, gpa: int, n: int) -> None:
    assert big.contains(gpa, n) is in_ram(gpa, n)


@given(gpa=GPAS, n=st.integers(0, 10000), data=st.data())
def test_every_access_is_inside_ram_or_raises_guest_memory_error(
    big: GuestMemory, gpa: int, n: int, data: st.DataObject
) -> None:
    name, size, access = data.draw(
        st.sampled_from(
            [
                ("read", n, lambda: big.read(gpa, n)),
                ("write", n, lambda: big.write(gpa, bytes(n))),
                ("view", n, lambda: big.view(gpa, n)),
                ("zero", n, lambda: big.zero(gpa, n)),
                ("clear", n, lambda: big.clear(gpa, n)),
                ("hva", n, lambda: big.hva(gpa, n)),
                ("read_u32", 4, lambda: big.read_u32(gpa)),
                ("read_u64", 8, lambda: big.read_u64(gpa)),
                ("write_u32", 4, lambda: big.write_u32(gpa, 7)),
                ("write_u64", 8, lambda: big.write_u64(gpa, 7)),
            ]
        )
    )
    if in_ram(gpa, size):
        access()
    else:
        with pytest.raises(GuestMemoryError) as caught:
            access()
        assert (caught.value.gpa, caught.value.size) == (gpa, size), name


@given(gpa=GPAS, n=st.integers(-(2**64), -1))
def test_a_negative_size_is_never_inside(big: GuestMemory, gpa: int, n: int) -> None:
    assert not big.contains(gpa, n)
    with pytest.raises(GuestMemoryError):
        big.read(gpa, n)


@given(
    base=st.sampled_from([0, LOW - 64, HIGH, HIGH_END - 64]),
    at=st.integers(0, 40),
    data=st.binary(max_size=24),
)
def test_what_is_written_is_read(big: GuestMemory, base: int, at: int, data: bytes) -> None:
    big.zero(base, 64)
    big.write(base + at, data)
    assert big.read(base, 64) == bytes(at) + data + bytes(64 - at - len(data))
    view = big.view(base, 64)
    assert view[at : at + len(data)] == data
    assert ctypes.string_at(big.hva(base, 64), 64) == bytes(view)


@pytest.mark.parametrize("base", [0x10000, HIGH])
@pytest.mark.parametrize(
    ("at", "n"), [(0, 0x3000), (5, 0x3000), (5, 0x20), (0xFFF, 2), (0x1001, 0x1FFF), (0, 0)]
)
@pytest.mark.parametrize("can_punch", [True, False])
def test_clear_zeroes_what_it_is_told_and_nothing_else(
    big: GuestMemory, base: int, at: int, n: int, can_punch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_punch:
        monkeypatch.setattr("hvkvm.memory.guest.punch", lambda *where: False)
    size = 0x5000
    big.write(base, b"x" * size)
    big.clear(base + at, n)
    assert big.read(base, size) == b"x" * at + bytes(n) + b"x" * (size - at - n)
    big.write(base + at, b"again"[:n])
    assert big.read(base + at, min(n, 5)) == b"again"[:n]
    big.zero(base, size)


def test_clearing_fresh_memory_takes_none(big: GuestMemory) -> None:
    before = os.fstat(big.fd).st_blocks
    big.clear(HIGH + 0x1000, 0x1F000)
    assert os.fstat(big.fd).st_blocks <= before


def test_huge_pages_are_asked_for(big: GuestMemory) -> None:
    """Where the kernel may give them is its setting; `hg` in VmFlags is MADV_HUGEPAGE."""
    with open("/proc/self/smaps") as maps:
        text = maps.read()
    if "THPeligible" not in text:
        pytest.skip("this kernel has no transparent huge pages")
    for region in big.regions:
        about = text.partition(f"{region.hva:x}-")[2].partition("VmFlags:")[2].partition("\n")[0]
        assert "hg" in about.split()


@given(at=st.integers(0, 24), value=st.integers(0, 2**64 - 1))
def test_words_are_little_endian_at_any_alignment(big: GuestMemory, at: int, value: int) -> None:
    for base in (0, HIGH):
        big.zero(base, 32)
        big.write_u64(base + at, value)
        assert big.read(base, 32) == bytes(at) + value.to_bytes(8, "little") + bytes(24 - at)
        assert big.read_u64(base + at) == value
        big.write_u32(base + at, value >> 32)
        assert big.read_u32(base + at) == value >> 32
        assert big.read_u32(base + at + 4) == value >> 32


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview], ids=str)
def test_writes_any_buffer_as_bytes(memory: GuestMemory, make: Callable[[bytes], bytes]) -> None:
    memory.write(16, make(b"abcd"))
    assert memory.read(16, 4) == b"abcd"


def test_writes_an_array_of_words_as_bytes(memory: GuestMemory) -> None:
    words = (ctypes.c_uint32 * 2)(0x01020304, 0x05060708)
    memory.write(0, memoryview(words))
    assert memory.read(0, 8) == bytes(words)


def test_layout_and_slots() -> None:
    slots = Slots()
    with GuestMemory(slots, LOW + TAIL) as memory:
        assert [(r.gpa, r.size, r.end, r.slot) for r in memory.regions] == [
            (0, LOW, LOW, 0),
            (HIGH, TAIL, HIGH_END, 1),
        ]
        assert slots.calls == [(r.slot, r.gpa, r.size, r.hva) for r in memory.regions]
        assert all(r.hva % (2 << 20) == 0 for r in memory.regions)
    with GuestMemory(Slots(), LOW) as memory:
        assert [(r.gpa, r.size) for r in memory.regions] == [(0, LOW)]


def test_the_memfd_is_the_ram() -> None:
    with GuestMemory(Slots(), LOW + TAIL) as memory:
        memory.write(0x1234, b"low")
        memory.write(HIGH + 5, b"high")
        assert os.pread(memory.fd, 3, 0x1234) == b"low"
        assert os.pread(memory.fd, 4, LOW + 5) == b"high"
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 4096)  # would be SIGBUS for the guest's next access


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097])
def test_refuses_sizes_that_are_no_whole_pages(size: int) -> None:
    with pytest.raises(ValueError, match="4096"):
        GuestMemory(Slots(), size)


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_refused_slot_leaves_nothing_behind(fail_at: int) -> None:
    before = open_fds()
    slots = Slots(fail_at)
    with pytest.raises(OSError, match="refused"):
        GuestMemory(slots, LOW + TAIL)
    gc.collect()
    assert open_fds() == before
    assert not any(mapped(hva) for _slot, _gpa, _size, hva in slots.calls)


def test_close_revokes_views_and_unmaps() -> None:
    before = open_fds()
    memory = GuestMemory(Slots(), 1 << 20)
    hva = memory.regions[0].hva
    view = memory.view(0, 16)
    view[0] = 1
    memory.close()
    memory.close()
    for use in (lambda: view[0], lambda: view.__setitem__(0, 2), lambda: bytes(view)):
        with pytest.raises(ValueError, match="released"):
            use()
    assert not mapped(hva)
    assert open_fds() == before
    assert not memory.contains(0, 1)
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    with pytest.raises(GuestMemoryError):
        next(memory.pieces())


def test_what_cannot_be_revoked_falls_on_zero_pages_until_dropped() -> None:
    memory = GuestMemory(Slots(), 1 << 20)
    hva = memory.regions[0].hva
    memory.write(0, b"secret")
    view = memory.view(0, 64)
    part = view[:6]
    word = ctypes.c_uint64.from_buffer(view, 8)
    assert bytes(part) == b"secret"
    memory.close()
    assert bytes(part) == bytes(6)
    part[0] = 9
    word.value = 77
    assert mapped(hva)
    del part
    assert mapped(hva)
    del word, view
    gc.collect()
    assert not mapped(hva)


def test_a_host_without_memory_does_not_keep_ram_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()
    memory = GuestMemory(Slots(), 1 << 20)
    hva = memory.regions[0].hva
    page = OverlayPage(memory)
    page.place(HIGH)
    outside = page.view[:8]
    page.zero()
    part = memory.view(0, 64)[:6]

    def refused(*arguments: object) -> int:
        raise OSError(errno.ENOMEM, "refused")

    with monkeypatch.context() as patched:
        patched.setattr(mapping, "_mmap", refused)
        page.close()
        memory.close()
    assert open_fds() == before
    assert (bytes(part), bytes(outside)) == (bytes(6), bytes(8))
    del part, outside
    gc.collect()
    assert not mapped(hva)


def test_ram_dropped_without_close_is_unmapped() -> None:
    memory = GuestMemory(Slots(), 1 << 20)
    hva = memory.regions[0].hva
    os.close(memory.fd)
    del memory
    gc.collect()
    assert not mapped(hva)


def test_remembering_views_stays_bounded(memory: GuestMemory) -> None:
    kept = [memory.view(i, 1) for i in range(300)]
    for _ in range(20000):
        memory.view(0, 64)
    assert len(memory._maps[0]._views) < 2000
    memory.close()
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]


def test_views_taken_by_several_threads_are_all_revoked(tiny_switch_interval: None) -> None:
    for _ in range(10):
        memory = GuestMemory(Slots(), 1 << 20)
        kept: list[memoryview] = []

        def take(memory: GuestMemory = memory, kept: list[memoryview] = kept) -> None:
            for i in range(1500):
                view = memory.view(i, 1)
                if i % 50 == 0:
                    kept.append(view)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        memory.close()
        alive = 0
        for view in kept:
            with suppress(ValueError):
                view[0]
                alive += 1
        assert (len(kept), alive) == (120, 0)


def watch(memory: GuestMemory, stop_at: int, words: list[tuple[int, Callable[[int], int], int]]) -> int:
    """Fork a process that shares RAM and, free of our GIL, looks for any value but 0 and the full word.

    It says so in the word behind `stop_at` when it begins.
    """
    pid = os.fork()
    if pid:
        while not memory.read_u32(stop_at + 4):
            os.sched_yield()
        return pid
    status = 2
    try:
        status = 0
        memory.write_u32(stop_at + 4, 1)  # before that it would see nothing of what is stored
        while not status and not memory.read_u32(stop_at):
            for gpa, read, full in words:
                status |= read(gpa) not in (0, full)
    finally:
        os._exit(status)


def test_s27_word_stores_are_never_torn(memory: GuestMemory) -> None:
    """Whoever reads a word beside its writer sees the old value or the new one, and nothing in between."""
    full4, full8 = 2**32 - 1, 2**64 - 1
    word4 = memory.hva(128, 4)
    words = [
        (64, memory.read_u32, full4),
        (72, memory.read_u64, full8),
        (128, memory.read_u32, full4),
    ]
    child = watch(memory, 0, words)
    for _ in range(30000):
        memory.write_u32(64, full4)
        memory.write_u32(64, 0)
        memory.write_u64(72, full8)
        memory.write_u64(72, 0)
        atomics.store_4(word4, full4)
        atomics.store_4(word4, 0)
    memory.write_u32(0, 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_torn_store_would_be_noticed(memory: GuestMemory) -> None:
    """The check above can fail: struct.pack_into zeroes first, so a word that is never 0 reads as 0."""
    memory.write_u32(64, 2**32 - 1)
    child = watch(memory, 0, [(64, lambda gpa: memory.read_u32(gpa) or 7, 2**32 - 1)])
    view = memory.view(64, 4)
    while not os.waitpid(child, os.WNOHANG)[0]:
        for _ in range(100):
            struct.pack_into("<I", view, 0, 2**32 - 1)


def test_fill_copies_a_file_s_bytes_into_either_region(big: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"0123456789" * 1000)
        file.flush()
        for gpa in (0x1003, HIGH + 0x100):
            big.write(gpa, b"x" * 5000)
            assert big.fill(gpa, 4097, file.fileno(), 3) == 4097
            assert big.read(gpa, 4099) == (b"0123456789" * 500)[3 : 3 + 4097] + b"xx"
        assert big.fill(0x2000, 100, file.fileno(), 9950) == 50
        assert big.fill(0x2000, 100, file.fileno(), 10000) == 0
        with pytest.raises(GuestMemoryError):
            big.fill(LOW - 8, 16, file.fileno(), 0)
