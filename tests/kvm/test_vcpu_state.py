"""A reset is the power-on state again: every register that KVM shows, dirtied and then compared."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from ctypes import Array, Structure, Union
from typing import Any

import pytest
from guest_machine import Guest

from hvkvm.abi import board
from hvkvm.abi.kvm import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MP_STATE_HALTED,
    KVM_PIT_SPEAKER_DUMMY,
)
from hvkvm.abi.x86 import MTRR_DEF_TYPE_E, MTRR_TYPE_WRBACK, MSR_MTRRdefType
from hvkvm.errors import KvmIoctlError
from hvkvm.events import Event, Observer
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vcpu_state import MSR_IA32_TSC, UNLISTED_MSRS, VcpuState, capture, restore, state_msrs
from hvkvm.kvm.vm import Vm
from hvkvm.machine.cpu import guest_cpuid, vcpu_cpuid
from hvkvm.machine.reset import PowerOnState

pytestmark = pytest.mark.kvm

CPUS = 2
_CHIPS = (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC)
_COUNTS_BY_ITSELF = {"lapic.regs[0x390]", "lapic.regs[0x391]", "lapic.regs[0x392]", "lapic.regs[0x393]"}
"""The timer's current count. (With the timer off it stands still; not on every KVM.)"""


def flat(value: Any, name: str) -> Iterator[tuple[str, object]]:
    """The leaves of a structure with a name each, so that a difference says what differs."""
    if isinstance(value, Union):
        yield name, bytes(value)
    elif isinstance(value, Structure):
        for field, *_ in value._fields_:
            yield from flat(getattr(value, field), f"{name}.{field}")
    elif isinstance(value, Array | list | tuple):
        for at, item in enumerate(value):
            yield from flat(item, f"{name}[{at:#x}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{name}[{key:#x}]", item
    else:
        yield name, value


def registers(state: VcpuState) -> dict[str, object]:
    return {
        name: value
        for field in state._fields
        for name, value in flat(getattr(state, field), field)
        if name not in _COUNTS_BY_ITSELF
    }


class Board:
    """Two vCPUs with the interrupt chips and the CPUID that a machine gives them; nothing ever runs."""

    def __init__(self, kvm: Kvm, vm: Vm) -> None:
        self.vm = vm
        vm.set_identity_map_addr(board.IDENTITY_MAP_ADDRESS)
        vm.set_tss_addr(board.TSS_ADDRESS)
        vm.create_irqchip()
        vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        self.vcpus = [vm.create_vcpu(index) for index in range(CPUS)]
        cpuid = guest_cpuid(kvm.supported_cpuid(), tsc_deadline=True)
        for vcpu in self.vcpus:
            vcpu.set_cpuid2(vcpu_cpuid(cpuid, vcpu.index, CPUS, None))
        self.listed = kvm.msr_index_list()
        self.msrs = state_msrs(self.listed)

    def state(self) -> list[dict[str, object]]:
        chips = {
            name: value
            for chip in _CHIPS
            for name, value in flat(bytes(self.vm.get_irqchip(chip)), f"chip{chip}")
        }
        pit = self.vm.get_pit2()
        for channel in pit.channels:
            channel.count_load_time = 0  # the host's clock
        chips["pit"] = bytes(pit)
        return [chips, *(registers(capture(vcpu, self.msrs)) for vcpu in self.vcpus)]


@pytest.fixture
def bare(kvm: Kvm) -> Iterator[Board]:
    with kvm.create_vm() as vm:
        yield Board(kvm, vm)


def dirty_msrs(vcpu: Vcpu, indices: list[int]) -> set[int]:
    """Change every MSR that takes another value; which did."""
    changed = set()
    for index, before in vcpu.readable_msrs(indices).items():
        for value in (before ^ 1, before ^ 4, before ^ 0x800, 6, 0x12_3000, 0x0606_0606_0606_0606, 0xC00):
            if value == before or vcpu.set_writable_msrs({index: value}):
                continue
            if vcpu.readable_msrs([index]).get(index, before) != before:
                changed.add(index)
                break
    return changed


def dirty_registers(vcpu: Vcpu, dice: random.Random) -> None:
    """All that is no MSR."""
    xcrs = vcpu.xcrs()
    for at in range(xcrs.nr_xcrs):
        for value in (7, 3):
            xcrs.xcrs[at].value = value
            with suppress(KvmIoctlError):
                vcpu.set_xcrs(xcrs)
                break
    area = bytearray(vcpu.xsave())
    area[32:416] = dice.randbytes(384)  # the x87 and SSE registers
    area[512:520] = (3).to_bytes(8, "little")  # XSTATE_BV: x87 and SSE are in use
    area[24:28] = bytes(4)
    vcpu.set_xsave(bytes(area))
    debug = vcpu.debugregs()
    for at in range(4):
        debug.db[at] = 0x1000 * (at + 1)
    debug.dr6, debug.dr7 = 0xFFFF0FF1, 0x403
    vcpu.set_debugregs(debug)
    lapic = vcpu.lapic()
    for register in (0x320, 0x350, 0x360):
        lapic.regs[register] = 0x40
    lapic.regs[0xF1] = 1  # software-enabled
    lapic.regs[0x80] = 0x20
    vcpu.set_lapic(lapic)
    sregs = vcpu.sregs()
    sregs.cr2, sregs.cr3, sregs.cr4 = 0x1234000, 0x5000, sregs.cr4 | 0x20
    sregs.gdt.base, sregs.idt.base, sregs.fs.base, sregs.gs.base = 0x6000, 0x7000, 0x8000, 0x9000
    sregs.apic_base ^= 0x800
    vcpu.set_sregs(sregs)
    regs = vcpu.regs()
    for name, *_ in regs._fields_:
        setattr(regs, name, dice.getrandbits(32) | 2)
    regs.rflags = 2
    vcpu.set_regs(regs)
    events = vcpu.vcpu_events()
    events.nmi.masked = 1
    events.interrupt.shadow = 1
    vcpu.set_vcpu_events(events)
    vcpu.set_mp_state(KVM_MP_STATE_HALTED)


def dirty_chips(vm: Vm) -> None:
    for chip_id in _CHIPS:
        chip = vm.get_irqchip(chip_id)
        if chip_id == KVM_IRQCHIP_IOAPIC:
            chip.chip.ioapic.redirtbl[3] = 0x31
        else:
            chip.chip.pic.imr, chip.chip.pic.irq_base = 0x5A, 0x20
        vm.set_irqchip(chip)
    pit = vm.get_pit2()
    # Counting once and slowly: a channel that ticks raises the PIC's line when KVM's thread gets to it.
    pit.channels[0].count, pit.channels[0].mode = 0xFFFF, 0
    pit.channels[2].count, pit.channels[2].mode = 0x1234, 2
    vm.set_pit2(pit)


class Notes(Observer):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


def difference(before: list[dict[str, object]], after: list[dict[str, object]]) -> dict[str, object]:
    """What differs: who and which register, what it was and what it is."""
    return {
        f"{owner} {name}": (was[name], now[name])
        for owner, was, now in zip(("chips", "vcpu0", "vcpu1"), before, after, strict=True)
        for name in now
        if now[name] != was[name]
    }


def test_a_reset_puts_every_register_back(kvm: Kvm, bare: Board) -> None:
    notes = Notes()
    power_on = PowerOnState(kvm, bare.vm, bare.vcpus, observer=notes)
    before = bare.state()
    changed: set[int] = set()
    for vcpu in bare.vcpus:
        changed |= dirty_msrs(vcpu, bare.msrs)
        dirty_registers(vcpu, random.Random(vcpu.index))
    dirty_chips(bare.vm)
    dirtied = {re.split(r"[.[]", name.split()[1])[0] for name in difference(before, bare.state())}
    assert dirtied >= set(VcpuState._fields) - {"xcrs", "nested"} | {"chip0", "chip2", "pit"}
    assert len(changed) > 20
    power_on.restore()
    assert not difference(before, bare.state())
    assert notes.events == []


def test_restoring_is_putting_back_what_was_captured_not_only_zeros(bare: Board) -> None:
    """As a saved state will be: dirtied, captured, dirtied otherwise, restored."""
    vcpu = bare.vcpus[0]
    dirty_msrs(vcpu, bare.msrs)
    dirty_registers(vcpu, random.Random(1))
    saved = capture(vcpu, bare.msrs)
    other = bare.vcpus[1]
    restore(vcpu, capture(other, bare.msrs)._replace(lapic=saved.lapic))  # of another APIC id KVM takes none
    assert registers(capture(vcpu, bare.msrs)) != registers(saved)
    restore(vcpu, saved)
    assert registers(capture(vcpu, bare.msrs)) == registers(saved)


def test_what_is_state_holds_all_that_kvm_lists(bare: Board) -> None:
    hyperv = range(0x4000_0000, 0x4000_0200)
    assert set(bare.msrs) == {*bare.listed, *UNLISTED_MSRS} - {MSR_IA32_TSC, *hyperv}


@pytest.mark.user_synic
def test_a_guest_finds_the_registers_after_a_reset_as_at_power_on(boot_agent: Callable[..., Guest]) -> None:
    guest = boot_agent(cpus=2, hv="passthrough", synic="user")
    far = 1 << 55  # cycles: half a year at least
    written = {0x3B: far, 0x174: 0x1234, 0x277: 0x0606_0606_0606_0606, 0x2FF: 0xC00, 0x200: 0x12_3006}
    found, first = {}, {}
    for cpu in guest.agent.cpus:
        assert cpu.rdmsr(MSR_IA32_TSC) < far
        for index, value in written.items():
            before = cpu.do("RDMSR", index)
            first[cpu.index, index] = before.value
            if before.fault is None and cpu.do("WRMSR", index, value).fault is None:
                found[cpu.index, index] = cpu.rdmsr(index)
        cpu.wrmsr(MSR_IA32_TSC, 3 * far)
    assert len(found) >= 4
    boots = guest.agent.boots
    guest.machine.lifecycle.request_reset("test")
    guest.agent.await_online(boots + 1)
    for index in {index for _, index in found}:
        values = [cpu.rdmsr(index) for cpu in guest.agent.cpus]
        assert not set(values) & set(written.values()), hex(index)
        assert index == 0x3B or values == [first[cpu.index, index] for cpu in guest.agent.cpus], hex(index)
    for cpu in guest.agent.cpus:  # as firmware leaves it, on every one alike
        if (cpu.index, MSR_MTRRdefType) in found:
            assert cpu.rdmsr(MSR_MTRRdefType) == MTRR_DEF_TYPE_E | MTRR_TYPE_WRBACK
    assert all(cpu.rdmsr(MSR_IA32_TSC) < far for cpu in guest.agent.cpus)
