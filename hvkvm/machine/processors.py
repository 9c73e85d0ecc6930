"""The vCPUs, interrupt chips and clock of a machine, and the image that a reset starts them on.

A `part.Part`: the last to reset and the first to load, since the registers decide
where the guest goes on, and what others count time by.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
from hvkvm.abi.kvm_structs import kvm_clock_data, kvm_irqchip, kvm_pit_state2
from hvkvm.errors import HvkvmError, StateError
from hvkvm.events import Warned
from hvkvm.kvm.saved_vcpu import SavedVcpu, cpuid_of, load_vcpu, save_vcpu
from hvkvm.kvm.vcpu_state import set_tscs, state_msrs, tscs
from hvkvm.machine.cpu_features import shown
from hvkvm.machine.reset import PowerOnState
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.machine.guest_image import GuestImage
    from hvkvm.machine.platform import Platform

_CHIPS = (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC)


class ProcessorsState(NamedTuple):
    """Everything that KVM keeps of a VM but its memory and the Hyper-V registers."""

    vcpus: tuple[SavedVcpu, ...]
    chips: tuple[bytes, ...]
    """kvm_irqchip: both PICs and the IOAPIC."""
    pit: bytes
    clock: int
    """kvmclock, in nanoseconds."""
    tsc_khz: int
    tscs: tuple[int, ...]
    """Each vCPU's, of the same moment as `clock`."""


class Processors:
    """Made when nothing has run yet: what KVM shows then is the power-on state. Raises KvmIoctlError.

    Then either `boot` or `load` says where the guest begins.
    """

    name = "vCPUs"
    State = ProcessorsState

    def __init__(self, platform: Platform, image: GuestImage) -> None:
        self._platform = platform
        self._image = image
        self._power_on = PowerOnState(platform.kvm, platform.vm, platform.vcpus, observer=platform.observer)
        self._msrs: Sequence[int] = state_msrs(platform.kvm.msr_index_list())

    def start(self) -> None:
        """See `Part.start`: the threads run when `Lifecycle` lets them."""

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`: they are paused already."""
        done()

    def boot(self) -> None:
        """Load the image, and set the registers to start it. Raises BootError."""
        self._image.load(self._platform.memory, self._platform.vcpus)

    def reset(self) -> None:
        """See `Part.reset`: power-on registers, and the image loaded afresh; other RAM stays as it is."""
        self._power_on.restore()
        self.boot()

    def save(self) -> ProcessorsState:
        """See `Part.save`. Raises KvmIoctlError."""
        vm, vcpus = self._platform.vm, self._platform.vcpus
        saved = []
        for vcpu in vcpus:
            saved.append(save_vcpu(vcpu, self._msrs))
            self._msrs = list(saved[-1].msrs)  # what one vCPU does not let us read, none does
        chips = tuple(bytes(vm.get_irqchip(chip)) for chip in _CHIPS)
        pit, khz = bytes(vm.get_pit2()), vcpus[0].tsc_khz()
        return ProcessorsState(tuple(saved), chips, pit, int(vm.get_clock().clock), khz, tscs(vcpus))

    def load(self, state: ProcessorsState) -> None:
        """See `Part.load`. Only before a vCPU has run: KVM takes a CPUID once."""
        try:
            self._load(state)
        except (ValueError, HvkvmError) as error:
            raise StateError(f"{self.name}: {error}") from None

    def _load(self, state: ProcessorsState) -> None:
        vm, vcpus = self._platform.vm, self._platform.vcpus
        if len(state.vcpus) != len(vcpus):
            raise ValueError(f"{len(state.vcpus)} were saved, and there are {len(vcpus)}; see --cpus")
        sizes = [len(chip) for chip in (*state.chips, state.pit)]
        if sizes != [ctypes.sizeof(kvm_irqchip)] * len(_CHIPS) + [ctypes.sizeof(kvm_pit_state2)]:
            raise ValueError("its interrupt chips or timer are none of KVM's")
        counted = len(state.tscs) == len(vcpus) and all(0 <= tsc < 1 << 64 for tsc in state.tscs)
        if not (counted and 0 < state.tsc_khz < 1 << 32 and 0 <= state.clock < 1 << 63):
            raise ValueError("its clock counts what no clock can")
        lacking = shown(cpuid_of(state.vcpus[0])) - shown(vcpus[0].cpuid2())
        if lacking:
            names = ", ".join(sorted(lacking))
            raise ValueError(f"this host cannot show the guest what its CPU had: {names}; use another host")
        for vcpu in vcpus:
            if vcpu.tsc_khz() != state.tsc_khz:
                vcpu.set_tsc_khz(state.tsc_khz)
        for wanted, chip in zip(_CHIPS, state.chips, strict=True):
            made = kvm_irqchip.from_buffer_copy(chip)
            if made.chip_id != wanted:
                raise ValueError("its interrupt chips are not in order")
            vm.set_irqchip(made)
        vm.set_pit2(kvm_pit_state2.from_buffer_copy(state.pit))
        vm.set_clock(kvm_clock_data(clock=state.clock))
        set_tscs(vcpus, state.tscs)
        for vcpu, saved in zip(vcpus, state.vcpus, strict=True):
            for index in load_vcpu(vcpu, saved):
                text = f"vcpu{vcpu.index}: KVM does not take MSR {index:#x} as it was saved"
                self._platform.observer.event(Warned("restore", text))
