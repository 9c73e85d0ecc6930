"""The address space: slot numbers lowest first, reused, bounded; and nothing stays of what KVM refuses."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.errors import HvkvmError, KvmIoctlError
from hvkvm.memory.address_space import AddressSpace


class Vm:
    """Takes slots, and refuses those at `refused`."""

    def __init__(self, slots: int) -> None:
        self.memory_slots = slots
        self.shown: dict[int, tuple[int, int, int, int]] = {}
        self.refused: set[int] = set()

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        if gpa in self.refused:
            raise KvmIoctlError(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION", "vm")
        if size:
            self.shown[slot] = (gpa, size, hva, flags)
        else:
            assert self.shown.pop(slot)[:3:2] == (gpa, hva)


@given(st.lists(st.integers(0, 7)))
def test_takes_the_lowest_free_number(give_back: list[int]) -> None:
    vm = Vm(8)
    space = AddressSpace(vm)
    taken: set[int] = set()
    for slot in give_back:
        if slot in taken:
            space.hide(slot)
            taken.remove(slot)
        elif len(taken) < 8:
            got = space.show(slot << 12, 4096, slot << 20)
            assert got == min(set(range(8)) - taken)
            taken.add(got)
        assert set(vm.shown) == taken


def test_says_when_none_is_left() -> None:
    space = AddressSpace(Vm(2))
    assert [space.show(0, 4096, 0), space.show(4096, 4096, 0)] == [0, 1]
    with pytest.raises(HvkvmError, match="of 2"):
        space.show(8192, 4096, 0)


def test_nothing_stays_of_what_kvm_refuses() -> None:
    vm = Vm(2)
    vm.refused = {0x5000}
    space = AddressSpace(vm)
    with pytest.raises(KvmIoctlError):
        space.show(0x5000, 4096, 0)
    assert [space.show(0, 4096, 7, 2), space.show(4096, 4096, 0)] == [0, 1]
    assert vm.shown[0] == (0, 4096, 7, 2)


def test_what_kvm_does_not_take_away_is_there_still() -> None:
    vm = Vm(2)
    space = AddressSpace(vm)
    assert space.show(0x5000, 4096, 7) == 0
    vm.refused = {0x5000}
    with pytest.raises(KvmIoctlError):
        space.hide(0)
    vm.refused = set()
    space.hide(0)
    assert vm.shown == {}
    assert space.show(0, 4096, 0) == 0


@pytest.mark.parametrize("slot", [-1, 1, 5])
def test_refuses_a_number_that_is_not_taken(slot: int) -> None:
    space = AddressSpace(Vm(8))
    space.show(0, 4096, 0)
    with pytest.raises(ValueError, match="not taken"):
        space.hide(slot)


def test_knows_what_is_shown_where() -> None:
    space = AddressSpace(Vm(2))
    slot = space.show(0x2000, 0x1000, 0)
    assert [space.backs(gpa) for gpa in (0x1FFF, 0x2000, 0x2FFF, 0x3000)] == [False, True, True, False]
    space.hide(slot)
    assert not space.backs(0x2000)
