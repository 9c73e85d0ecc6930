"""Registers and pages of one VP (S1 to S9, S36, S57), on plain memory and on real overlays."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from fake_synic import EVENT_GPA, MESSAGE_GPA, FakeOverlay, FakeVp, Recorder

from hvkvm.errors import KvmIoctlError
from hvkvm.events import SynicPageMoved, Warned
from hvkvm.hyperv.synic.pages import EventFlagsPage
from hvkvm.hyperv.synic.vp import VpSynic
from hvkvm.memory.atomics import fetch_and_8, load_4, store_4
from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.overlay import OverlayPage

MIB = 1 << 20


class SharedPage(FakeOverlay):
    """A page at an address of the test's choice."""

    def __init__(self, hva: int, view: memoryview) -> None:
        super().__init__()
        self.hva, self.view = hva, view


MESSAGE = (1).to_bytes(4, "little") + bytes(252)


@pytest.fixture
def vp() -> FakeVp:
    return FakeVp(0, Recorder())


def test_s1_without_synic_update_and_reset_do_nothing(vp: FakeVp) -> None:
    vp.active = False
    vp.switch_on()
    vp.reset()
    assert vp.messages.moves == vp.flags.moves == []
    assert (vp.scontrol, vp.siefp, vp.simp) == (0, 0, 0)
    assert vp.post_message(2, MESSAGE) == vp.set_event_flag(2, 1) == -errno.ENXIO


def test_s2_bit_0_decides_and_gpa_0_is_an_address(vp: FakeVp) -> None:
    vp.update(1, 0, 0x5000)
    assert vp.messages.gpa is None
    vp.update(1, 1, 0x5000)
    assert (vp.messages.gpa, vp.flags.gpa) == (None, 0)
    assert vp.set_event_flag(0, 0) == 1
    vp.update(1, 0, 1)
    assert (vp.messages.gpa, vp.flags.gpa) == (0, None)
    assert vp.post_message(0, MESSAGE) == 0


def test_s2_reserved_bits_are_no_part_of_the_address(vp: FakeVp) -> None:
    vp.update(1, 0, 0x7FFF)
    assert vp.messages.gpa == 0x7000


def test_s3_pages_move_only_to_another_address(vp: FakeVp) -> None:
    vp.switch_on()
    assert vp.messages.moves == [MESSAGE_GPA]
    vp.switch_on()
    vp.update(0, vp.siefp, vp.simp)
    vp.update(1, vp.siefp, vp.simp | 0xFFE)
    assert (vp.messages.moves, vp.flags.moves) == ([MESSAGE_GPA], [EVENT_GPA])
    vp.update(1, vp.siefp, 0x9001)
    assert (vp.messages.moves, vp.flags.moves) == ([MESSAGE_GPA, 0x9000], [EVENT_GPA])
    assert [e for e in vp._observer.events if isinstance(e, SynicPageMoved)] == [  # type: ignore[attr-defined]
        SynicPageMoved(0, "message", MESSAGE_GPA),
        SynicPageMoved(0, "event", EVENT_GPA),
        SynicPageMoved(0, "message", 0x9000),
    ]


def test_s4_contents_survive_switching_off_and_moving_but_not_reset(vp: FakeVp) -> None:
    vp.switch_on()
    vp.post_message(2, MESSAGE)
    vp.set_event_flag(2, 9)
    kept = bytes(vp.messages.view), bytes(vp.flags.view)
    vp.update(0, 0, 0)
    vp.switch_on(0x30000, 0x40000)
    assert (bytes(vp.messages.view), bytes(vp.flags.view)) == kept
    assert vp.post_message(2, MESSAGE) == -errno.EAGAIN
    vp.reset()
    assert (bytes(vp.messages.view), bytes(vp.flags.view)) == (bytes(4096), bytes(4096))


def test_s6_an_address_where_nothing_can_lie_leaves_the_page_off(vp: FakeVp) -> None:
    vp.messages.refused = {1 << 62}
    vp.switch_on(1 << 62)
    assert vp.post_message(2, MESSAGE) == -errno.ENXIO
    assert vp.set_event_flag(2, 1) == 1, "the other page is not concerned"
    assert any(isinstance(e, Warned) for e in vp._observer.events)  # type: ignore[attr-defined]
    vp.update(1, vp.siefp, vp.simp)
    assert vp.messages.moves == [1 << 62], "not tried again for the same value"
    vp.switch_on()
    assert vp.post_message(2, MESSAGE) == 0


def test_s7_reset_switches_off_unplaces_and_zeroes(vp: FakeVp) -> None:
    vp.switch_on()
    vp.post_message(2, MESSAGE)
    vp.set_event_flag(2, 1)
    vp.reset()
    assert (vp.scontrol, vp.siefp, vp.simp) == (0, 0, 0)
    assert (vp.messages.gpa, vp.flags.gpa) == (None, None)
    assert vp.post_message(2, MESSAGE) == vp.set_event_flag(2, 1) == -errno.ENXIO
    assert bytes(vp.flags.view) == bytes(4096)
    vp.switch_on()
    assert (vp.messages.gpa, vp.flags.gpa) == (MESSAGE_GPA, EVENT_GPA)


@pytest.mark.parametrize("value", [-1, 1 << 64])
@pytest.mark.parametrize("register", ["scontrol", "siefp", "simp"])
def test_a_saved_register_that_is_no_64_bit_number_is_refused(vp: FakeVp, register: str, value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        vp.load(vp.save()._replace(**{register: value}))


@pytest.mark.parametrize("page", ["message_page", "event_page"])
@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_a_saved_page_of_another_size_is_refused(vp: FakeVp, page: str, size: int) -> None:
    with pytest.raises(ValueError, match="another size"):
        vp.load(vp.save()._replace(**{page: bytes(size)}))


def test_s8_a_page_that_cannot_be_closed_is_told_and_the_other_closed(
    vp: FakeVp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise KvmIoctlError(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION", "vm")

    monkeypatch.setattr(vp.messages, "close", broken)
    vp.switch_on()
    vp.close()
    assert vp.flags.closed
    (warning,) = [e for e in vp._observer.events if isinstance(e, Warned)]  # type: ignore[attr-defined]
    assert "vp 0" in warning.text


def test_s8_a_host_that_cannot_place_a_page_raises(vp: FakeVp, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FakeOverlay, gpa: int | None) -> bool:
        raise OSError(errno.ENOMEM, "no mappings left")

    monkeypatch.setattr(FakeOverlay, "place", broken)
    with pytest.raises(OSError, match="no mappings"):
        vp.switch_on()
    assert vp.post_message(2, MESSAGE) == -errno.ENXIO


@pytest.mark.parametrize("scontrol", [0, 1])
@pytest.mark.parametrize("siefp", [0, EVENT_GPA | 1])
@pytest.mark.parametrize("simp", [0, MESSAGE_GPA | 1])
def test_s9_messages_need_simp_and_flags_need_scontrol_too(
    vp: FakeVp, scontrol: int, siefp: int, simp: int
) -> None:
    vp.update(scontrol, siefp, simp)
    assert vp.post_message(2, MESSAGE) == (0 if simp else -errno.ENXIO)
    assert vp.set_event_flag(2, 1) == (1 if scontrol and siefp else -errno.ENXIO)


def test_s57_each_exit_brings_all_three_values(vp: FakeVp) -> None:
    """One update whose values are all new, as when exits were missed."""
    assert vp.update(1, 0x3001, 0x4001), "the message page came on"
    assert (vp.scontrol, vp.flags.gpa, vp.messages.gpa) == (1, 0x3000, 0x4000)
    assert not vp.update(1, 0x5001, 0x6001), "moved, it was on"
    assert (vp.flags.gpa, vp.messages.gpa) == (0x5000, 0x6000)
    assert not vp.update(1, 0, 0)
    assert vp.update(1, 0, 0x6001)
    assert not vp.update(1, 0, 0x6001), "on already: the same values again bring nothing"


def test_s36_a_guest_that_clears_at_the_same_time_loses_no_flag() -> None:
    """The guest is another process, so it clears in the middle of our OR: no flag is lost, none twice."""
    shared = mmap.mmap(-1, 4096)
    anchor = ctypes.c_uint64.from_buffer(shared)
    words = ctypes.addressof(anchor)
    page = EventFlagsPage(SharedPage(words, memoryview(shared)))
    stop, count, flags = words, words + 8, words + 3 * 256
    guest = os.fork()
    if guest == 0:
        cleared = 0
        while True:
            last = load_4(stop)
            for number in range(16):
                cleared += fetch_and_8(flags, ~(1 << number) & (1 << 64) - 1) >> number & 1
            if last:
                store_4(count, cleared)
                os._exit(0)
    fresh = 0
    try:
        for _ in range(3000):
            for number in range(16):
                fresh += page.set(3, number)
    finally:
        store_4(stop, 1)
        os.waitpid(guest, 0)
    assert load_4(count) == fresh


@pytest.mark.parametrize(
    "change",
    [lambda vp: vp.update(1, 0, 0), lambda vp: vp.reset(), lambda vp: vp.close()],
    ids=["off", "reset", "close"],
)
def test_s36_nothing_comes_between_a_flags_check_and_the_flag(
    vp: FakeVp, change: Callable[[VpSynic], object]
) -> None:
    """Else a flag would get into a page that was zeroed, and so into the guest's next life."""
    vp.switch_on()
    page = vp.event_page
    other = threading.Thread(target=change, args=(vp,))
    between: list[bool] = []

    class Slow:
        overlay = page.overlay

        def set(self, sint: int, number: int) -> bool:
            other.start()
            other.join(0.1)  # it waits for us: how long does not matter
            between.append(not other.is_alive())
            return page.set(sint, number)

    vp.event_page = Slow()  # type: ignore[assignment]
    assert vp.set_event_flag(2, 1) == 1
    other.join()
    assert between == [False]
    assert vp.set_event_flag(2, 1) == -errno.ENXIO


@pytest.mark.usefixtures("tiny_switch_interval")
def test_s36_flags_set_while_the_page_moves_are_all_there(memory: GuestMemory) -> None:
    """Every flag that was accepted is in the page, wherever the guest had it meanwhile."""
    vp = real_vp(0, memory)
    vp.update(1, 0x10001, 0)
    accepted: list[int] = []

    def host() -> None:
        for number in range(2048):
            if vp.set_event_flag(4, number) == 1:
                accepted.append(number)

    setting = threading.Thread(target=host)
    setting.start()
    gpas = [0x20001, 0, 0x30001, 0xE000_0001, 0x40001]
    at = 0
    while setting.is_alive():
        vp.update(1, gpas[at % len(gpas)], 0)
        at += 1
    setting.join()
    vp.update(1, 0x50001, 0)
    page = memory.read(0x50000 + 4 * 256, 256)
    assert [n for n in range(2048) if page[n // 8] >> n % 8 & 1] == accepted
    assert accepted
    vp.close()


class SlotRecorder:
    """A VM that remembers its slots and refuses what overlaps, as KVM does."""

    def __init__(self) -> None:
        self.calls = 0
        self.slots: dict[int, tuple[int, int]] = {}

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.calls += 1
        if size:
            self.slots[slot] = (gpa, size)
        else:
            del self.slots[slot]


@pytest.fixture
def recorder() -> SlotRecorder:
    return SlotRecorder()


@pytest.fixture
def memory(recorder: SlotRecorder) -> Iterator[GuestMemory]:
    memory = GuestMemory(recorder, 4 * MIB)
    yield memory
    memory.close()


def real_vp(index: int, memory: GuestMemory) -> VpSynic:
    vp = VpSynic(index, OverlayPage(memory), OverlayPage(memory))
    vp.active = True
    return vp


def test_s3_same_values_cost_no_slot_call_on_real_memory(memory: GuestMemory, recorder: SlotRecorder) -> None:
    vp = real_vp(0, memory)
    vp.update(1, 0xE000_0001, 0xE000_1001)
    calls = recorder.calls
    assert calls == 3, "RAM, and two pages outside it"
    for _ in range(10):
        vp.update(1, 0xE000_0001, 0xE000_1001)
        vp.update(0, 0xE000_0001, 0xE000_1001)
    assert recorder.calls == calls
    vp.close()


def test_s4_ram_under_a_page_is_untouched_and_reappears(memory: GuestMemory) -> None:
    vp = real_vp(0, memory)
    memory.write(0x10000, b"guest's own" * 300)
    before = memory.read(0x10000, 4096)
    vp.update(1, 0, 0x10001)
    assert memory.read(0x10000, 4096) == bytes(4096)
    assert vp.post_message(0, MESSAGE) == 0
    assert memory.read_u32(0x10000) == 1
    vp.update(1, 0, 0)
    assert memory.read(0x10000, 4096) == before
    vp.update(1, 0, 0x20001)
    assert memory.read_u32(0x20000) == 1
    vp.close()


def test_s6_pages_on_one_gpa_show_the_last_one_placed(memory: GuestMemory) -> None:
    """The rule for SIMP == SIEFP, and for two VPs on one address."""
    vp, other = real_vp(0, memory), real_vp(1, memory)
    vp.update(1, 0, 0x10001)
    vp.post_message(0, MESSAGE)
    vp.update(1, 0x10001, 0x10001)
    assert memory.read_u32(0x10000) == 0, "the event page lies above the message page"
    vp.set_event_flag(0, 4)
    assert memory.read_u32(0x10000) == 1 << 4
    other.update(1, 0, 0x10001)
    assert memory.read_u32(0x10000) == 0
    other.update(1, 0, 0)
    assert memory.read_u32(0x10000) == 1 << 4
    vp.update(1, 0, 0x10001)
    assert memory.read_u32(0x10000) == 1, "the message was there all the time"
    vp.close()
    assert memory.read_u32(0x10000) == 0
    other.close()


@pytest.mark.parametrize("gpa", [0xE000_0000, 0x1_0000_0000, 4 * MIB])
def test_s6_pages_outside_ram_work(memory: GuestMemory, gpa: int, recorder: SlotRecorder) -> None:
    vp = real_vp(0, memory)
    vp.update(1, 0, gpa | 1)
    assert vp.post_message(3, MESSAGE) == 0
    assert (gpa, 4096) in recorder.slots.values()
    vp.reset()
    assert (gpa, 4096) not in recorder.slots.values()
    vp.close()


def test_s4_pages_are_zero_at_creation(memory: GuestMemory) -> None:
    page = OverlayPage(memory)
    assert ctypes.string_at(page.hva, 4096) == bytes(4096)
    page.close()
