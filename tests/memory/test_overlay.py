"""Overlay pages without a KVM: contents, stacks, slots outside RAM, refusals, nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hvkvm.errors import HvkvmError, KvmIoctlError
from hvkvm.memory import mapping
from hvkvm.memory.guest import GuestMemory, RamSource
from hvkvm.memory.mapping import PAGE_SIZE
from hvkvm.memory.overlay import OverlayPage
from hvkvm.memory.private import MAX_MOVED

RAM_SIZE = 16 * PAGE_SIZE
INSIDE = (0, 3 * PAGE_SIZE, RAM_SIZE - PAGE_SIZE)
OUTSIDE = (RAM_SIZE, 0xFED0_0000)


class SlotTable:
    """Stands for a VM: keeps the slots as KVM would, and refuses where it would."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int, int]] = {}
        self.calls = 0
        self.refuse: int | None = None

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.calls += 1
        if self.refuse is not None:
            raise KvmIoctlError(self.refuse, "KVM_SET_USER_MEMORY_REGION", "vm")
        if not size:
            del self.slots[slot]
            return
        assert slot not in self.slots, "KVM changes no slot in place"
        assert not any(g < gpa + size and gpa < g + s for g, s, _hva in self.slots.values())
        self.slots[slot] = (gpa, size, hva)

    def guest_reads(self, gpa: int, n: int) -> bytes | None:
        """What a guest would read at `gpa`, through the slots; None for MMIO."""
        for start, size, hva in self.slots.values():
            if start <= gpa and gpa + n <= start + size:
                return ctypes.string_at(hva + gpa - start, n)
        return None


@pytest.fixture
def vm() -> SlotTable:
    return SlotTable()


@pytest.fixture
def memory(vm: SlotTable) -> Iterator[GuestMemory]:
    with GuestMemory(vm, RAM_SIZE) as memory:
        yield memory


@pytest.fixture
def mmaps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the mmap calls of the room: one entry each."""
    calls: list[int] = []
    real = mapping._mmap

    def counted(address: int | None, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        calls.append(size)
        return real(address, size, prot, flags, fd, offset)

    monkeypatch.setattr(mapping, "_mmap", counted)
    return calls


@pytest.mark.parametrize("gpa", INSIDE)
def test_s4_contents_follow_the_page_and_ram_reappears(vm: SlotTable, memory: GuestMemory, gpa: int) -> None:
    memory.write(gpa, b"ram")
    page = OverlayPage(memory)
    assert bytes(page.view) == bytes(PAGE_SIZE)
    assert page.place(gpa)
    page.view[:3] = b"ovl"
    assert memory.read(gpa, 3) == vm.guest_reads(gpa, 3) == b"ovl"
    memory.write(gpa, b"gst")  # as the guest would
    assert ctypes.string_at(page.hva, 3) == b"gst"
    assert page.place(None)
    assert memory.read(gpa, 3) == b"ram"
    assert bytes(page.view[:3]) == b"gst"
    assert page.place(INSIDE[0] if gpa else INSIDE[1])
    assert memory.read(page.gpa or 0, 3) == b"gst"
    page.zero()
    assert bytes(page.view) == bytes(PAGE_SIZE)
    page.close()


def test_s2_gpa_zero_is_an_address_like_any_other(memory: GuestMemory) -> None:
    with OverlayPage(memory) as page:
        assert page.gpa is None
        assert page.place(0)
        assert page.gpa == 0
        page.view[0] = 7
        assert memory.read(0, 1) == b"\7"


def test_s3_the_same_address_again_costs_no_syscall(
    vm: SlotTable, memory: GuestMemory, mmaps: list[int]
) -> None:
    with OverlayPage(memory) as page:
        for gpa in (INSIDE[0], OUTSIDE[0], None):
            page.place(gpa)
            before = len(mmaps), vm.calls
            assert page.place(gpa)
            assert (len(mmaps), vm.calls) == before


def test_s5_inside_ram_one_mmap_a_change_and_no_slot(
    vm: SlotTable, memory: GuestMemory, mmaps: list[int]
) -> None:
    with OverlayPage(memory) as page:
        mmaps.clear()
        slots = vm.calls
        page.place(INSIDE[0])
        assert mmaps == [PAGE_SIZE]
        page.place(INSIDE[1])
        assert mmaps == [PAGE_SIZE] * 3  # uncover the old, cover the new
        page.place(None)
        assert mmaps == [PAGE_SIZE] * 4
        assert vm.calls == slots


@pytest.mark.parametrize("gpa", OUTSIDE)
def test_s6_outside_ram_the_page_has_a_slot_of_its_own(vm: SlotTable, memory: GuestMemory, gpa: int) -> None:
    with OverlayPage(memory) as page, OverlayPage(memory) as other:
        page.view[0], other.view[0] = 1, 2
        assert vm.guest_reads(gpa, 1) is None
        assert page.place(gpa)
        assert vm.guest_reads(gpa, PAGE_SIZE) == bytes(page.view)
        calls = vm.calls
        assert other.place(gpa)
        assert vm.guest_reads(gpa, 1) == b"\2"
        assert page.place(None)
        assert vm.guest_reads(gpa, 1) == b"\2"
        assert vm.calls == calls, "a stack outside RAM changes no slot either"
        assert other.place(None)
        assert vm.guest_reads(gpa, 1) is None
        assert list(vm.slots) == [0]


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EEXIST])
def test_s6_an_address_kvm_cannot_back_is_the_guests_own_fault(
    vm: SlotTable, memory: GuestMemory, refusal: int
) -> None:
    with OverlayPage(memory) as page:
        page.place(INSIDE[0])
        gc.collect()
        fds = os.listdir("/proc/self/fd")
        vm.refuse = refusal
        for gpa in (1 << 52, (1 << 64) - PAGE_SIZE):
            assert page.place(gpa) is False
            assert page.gpa is None
            assert memory.overlays.at(gpa) == ()
        vm.refuse = None
        assert os.listdir("/proc/self/fd") == fds
        assert page.place(OUTSIDE[0])
        assert set(vm.slots) == {0, 1}, "refused slots are given back"


def test_a_restored_guest_that_goes_through_its_pages_leaves_the_process_its_mappings(vm: SlotTable) -> None:
    """Each page that was covered once is one mapping more, and Linux gives a process 65,530."""
    size = 2 * (MAX_MOVED + 2) * PAGE_SIZE
    file = os.memfd_create("saved")
    os.ftruncate(file, size)
    os.pwrite(file, b"saved", 0)
    with GuestMemory(vm, size, RamSource(file, 0)) as memory, OverlayPage(memory) as page:
        for at in range(0, MAX_MOVED * 2 * PAGE_SIZE, 2 * PAGE_SIZE):
            assert page.place(at)
        for at in (size - PAGE_SIZE, size - 3 * PAGE_SIZE):
            assert page.place(at) is False
            assert page.gpa is None
        assert page.place(2 * PAGE_SIZE)
        memory.write(size - PAGE_SIZE, b"goes on")
        assert (memory.read(0, 5), memory.read(size - PAGE_SIZE, 7)) == (b"saved", b"goes on")
    os.close(file)


def test_a_restored_guests_ram_is_copied_once_to_be_saved_again(
    vm: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a piece in which an overlay covers a page, whose own bytes lie elsewhere."""
    piece = 1 << 20
    file = os.memfd_create("saved")
    os.pwrite(file, b"saved" * piece, 0)
    os.ftruncate(file, 4 * piece)
    copies: list[bytes] = []
    with GuestMemory(vm, 4 * piece, RamSource(file, 0)) as memory, OverlayPage(memory) as page:
        memory.write(3 * piece, b"own")
        assert page.place(piece + PAGE_SIZE)
        memory.write(piece + PAGE_SIZE, b"overlay")
        expected = {offset: memory.read(offset, piece) for offset in range(0, 4 * piece, piece)}
        own = (b"saved" * piece)[piece + PAGE_SIZE : piece + 2 * PAGE_SIZE]
        expected[piece] = expected[piece][:PAGE_SIZE] + own + expected[piece][2 * PAGE_SIZE :]
        read = mapping.Mapping.read

        def noted(one: mapping.Mapping, at: int, size: int) -> bytes:
            copies.append(read(one, at, size))
            return copies[-1]

        monkeypatch.setattr(mapping.Mapping, "read", noted)
        pieces = dict(memory.pieces())
    os.close(file)
    assert pieces == expected
    assert len(copies) == len(pieces)
    assert [offset for offset, data in pieces.items() if not any(data is one for one in copies)] == [piece]


def test_a_host_error_is_raised_and_leaves_the_page_nowhere(vm: SlotTable, memory: GuestMemory) -> None:
    with OverlayPage(memory) as page:
        vm.refuse = errno.ENOMEM
        with pytest.raises(KvmIoctlError):
            page.place(OUTSIDE[0])
        assert page.gpa is None
        vm.refuse = None
        assert page.place(INSIDE[0])


@pytest.mark.parametrize("gpa", [1, 4095, -4096, 1 << 64, 0x1001])
def test_an_address_that_is_no_pages_is_a_callers_mistake(memory: GuestMemory, gpa: int) -> None:
    with OverlayPage(memory) as page:
        page.place(INSIDE[0])
        with pytest.raises(ValueError, match="cannot lie"):
            page.place(gpa)
        assert page.gpa == INSIDE[0]


def test_closing_uncovers_and_frees() -> None:
    gc.collect()  # what an earlier test dropped in a cycle is not this one's
    before = set(os.listdir("/proc/self/fd"))
    vm = SlotTable()
    memory = GuestMemory(vm, RAM_SIZE)
    memory.write(0, b"ram")
    inside, outside = OverlayPage(memory), OverlayPage(memory)
    inside.place(0)
    outside.place(OUTSIDE[0])
    view = inside.view
    for page in (inside, outside, inside):
        page.close()
    assert memory.read(0, 3) == b"ram"
    assert list(vm.slots) == [0]
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(HvkvmError, match="closed"):
        inside.place(0)
    memory.close()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


class Stacks(RuleBasedStateMachine):
    """S6's rule against a model: latest placed wins, removing uncovers, then RAM or nothing."""

    @initialize()
    def build(self) -> None:
        self.vm = SlotTable()
        self.memory = GuestMemory(self.vm, RAM_SIZE)
        self.pages = [OverlayPage(self.memory) for _ in range(4)]
        for i, page in enumerate(self.pages):
            page.view[:] = bytes([0x10 + i]) * PAGE_SIZE
        for gpa in INSIDE:
            self.memory.write(gpa, b"R" * PAGE_SIZE)
        self.model: dict[int, list[int]] = {gpa: [] for gpa in INSIDE + OUTSIDE}

    @rule(which=st.integers(0, 3), gpa=st.sampled_from([None, *INSIDE, *OUTSIDE]))
    def place(self, which: int, gpa: int | None) -> None:
        page = self.pages[which]
        if page.gpa != gpa:
            for stack in self.model.values():
                if which in stack:
                    stack.remove(which)
            if gpa is not None:
                self.model[gpa].append(which)
        assert page.place(gpa)

    @invariant()
    def the_guest_sees_the_top_of_each_stack(self) -> None:
        for gpa, stack in self.model.items():
            seen = self.vm.guest_reads(gpa, PAGE_SIZE)
            if stack:
                assert seen == bytes([0x10 + stack[-1]]) * PAGE_SIZE
            elif gpa in INSIDE:
                assert seen == b"R" * PAGE_SIZE
            else:
                assert seen is None
            assert [self.pages.index(layer) for layer in self.memory.overlays.at(gpa)] == stack  # type: ignore[arg-type]
        for i, page in enumerate(self.pages):
            assert bytes(page.view) == bytes([0x10 + i]) * PAGE_SIZE

    def teardown(self) -> None:
        if hasattr(self, "pages"):
            for page in self.pages:
                page.close()
            assert list(self.vm.slots) == [0]
            self.memory.close()


TestStacks = Stacks.TestCase
TestStacks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_page_for_which_no_slot_is_left_lies_nowhere() -> None:
    """What a guest asks for beyond what KVM has is its own loss, no error of the host's."""
    vm = SlotTable()
    vm.memory_slots = 2
    with GuestMemory(vm, RAM_SIZE) as memory, OverlayPage(memory) as one, OverlayPage(memory) as other:
        assert one.place(OUTSIDE[0])
        assert other.place(OUTSIDE[1]) is False
        assert other.gpa is None
        assert other.place(INSIDE[0])
        one.place(None)
        assert other.place(OUTSIDE[1])
