"""The Hyper-V interface in user space: every synthetic MSR of every VP, and what stands behind it.

An MSR filter takes 0x40000000-0x400001ff away from KVM, so each access exits:
`handle_rdmsr` and `handle_wrmsr` answer it from a table. What the table does not
know is the guest's #GP. A KVM with Hyper-V of its own sees the guest's CPUID, but
never these accesses, so its SynIC, timers and hypercalls stay asleep (they wait
for a guest OS id); VMCALL is KVM's own ABI then.

Threads: exits come on the vCPUs' threads; VM-wide registers have a lock. `reset`
runs with every vCPU paused; the main thread makes, activates and closes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from hvkvm.abi import tlfs
from hvkvm.abi.hv_synic import HV_SYNIC_SINT_COUNT, HV_SYNIC_VERSION_1
from hvkvm.abi.kvm import (
    KVM_CAP_SYNC_REGS,
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
)
from hvkvm.errors import GuestMemoryError, KvmIoctlError
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.hyperv.crash import CRASH_PARAMETERS, panic_text
from hvkvm.hyperv.usermode.clock import ReferenceClock, RunTime, TscPage, host_counts_by_tsc
from hvkvm.hyperv.usermode.hypercall_page import HypercallPage
from hvkvm.hyperv.usermode.synic import UserSynic
from hvkvm.hyperv.usermode.vp import Loop, UserVp, UserVpState
from hvkvm.kvm.vm import MsrRange
from hvkvm.memory.overlay import OverlayPage
from hvkvm.runtime.protocols import VpThread
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.memory.guest import GuestMemory

APIC_FREQUENCY = 1_000_000_000
"""Hz: what KVM's local APIC timer counts by."""

_CRASH_FORMS = tlfs.HV_CRASH_CTL_CRASH_NOTIFY | tlfs.HV_CRASH_CTL_CRASH_NOTIFY_MSG
_STORED = (
    tlfs.HV_X64_MSR_REENLIGHTENMENT_CONTROL,
    tlfs.HV_X64_MSR_TSC_EMULATION_CONTROL,
    tlfs.HV_X64_MSR_TSC_EMULATION_STATUS,
    *CRASH_PARAMETERS,
)
"""VM-wide registers that only remember."""

Read = Callable[[], int]
Write = Callable[[int], bool]
"""False is #GP."""


class UserHypervState(NamedTuple):
    """Every synthetic register of a VM, and its reference time in 100 ns units."""

    reference_time: int
    os_id: int
    hypercall: int
    stored: dict[int, int]
    tsc_invariant: int
    reference_tsc: int
    assist: tuple[int, ...]
    run_times: tuple[int, ...]
    vps: tuple[UserVpState, ...]
    """Empty without SynIC."""


class UserHyperv:
    """One VM's. `with_synic` adds the SynIC and its timers; without, their MSRs are not there.

    `on_crash(text)` hears of a guest that reports a crash, `on_reset(reason)` of
    one that wants a reset, both on its vCPU's thread. Raises OSError when the
    host has no memory for the pages.
    """

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        io: Loop,
        threads: Sequence[VpThread],
        *,
        with_synic: bool,
        on_crash: Callable[[str], object],
        on_reset: Callable[[str], object],
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        self._vm = vm
        self._memory = memory
        self._on_crash = on_crash
        self._on_reset = on_reset
        self.clock = ReferenceClock()
        self._lock = threading.Lock()
        self._os_id = 0
        self._hypercall = 0
        self._stored: dict[int, int] = dict.fromkeys(_STORED, 0)
        self._tsc_invariant = 0
        self._boot_vcpu = threads[0].vcpu
        self._assist = [0] * len(threads)
        self._run_times = [RunTime() for _ in threads]
        self.synic: UserSynic | None = None
        with ExitStack() as stack:
            self.hypercall_page = HypercallPage(
                stack.enter_context(OverlayPage(memory)), vm.check_extension(KVM_CAP_SYNC_REGS)
            )
            self.tsc_page = TscPage(
                self.clock, stack.enter_context(OverlayPage(memory)), usable=host_counts_by_tsc()
            )
            if with_synic:
                self.synic = UserSynic(vm, memory, io, threads, self.clock, observer=observer)
                stack.callback(self.synic.close)
            self._reads: list[dict[int, Read]] = []
            self._writes: list[dict[int, Write]] = []
            for thread in threads:
                self._add_vp(thread.vcpu)
            self._stack = stack.pop_all()

    # The tables.

    def _add_vp(self, vcpu: Vcpu) -> None:
        index = vcpu.index
        khz = vcpu.tsc_khz()
        reads: dict[int, Read] = {
            tlfs.HV_X64_MSR_GUEST_OS_ID: lambda: self._os_id,
            tlfs.HV_X64_MSR_HYPERCALL: lambda: self._hypercall,
            tlfs.HV_X64_MSR_VP_INDEX: lambda: index,
            tlfs.HV_X64_MSR_RESET: lambda: 0,
            tlfs.HV_X64_MSR_VP_RUNTIME: self._run_times[index].read,
            tlfs.HV_X64_MSR_TIME_REF_COUNT: self.clock.now,
            tlfs.HV_X64_MSR_REFERENCE_TSC: lambda: self.tsc_page.value,
            tlfs.HV_X64_MSR_TSC_FREQUENCY: lambda: khz * 1000,
            tlfs.HV_X64_MSR_APIC_FREQUENCY: lambda: APIC_FREQUENCY,
            tlfs.HV_X64_MSR_VP_ASSIST_PAGE: lambda: self._assist[index],
            tlfs.HV_X64_MSR_CRASH_CTL: lambda: _CRASH_FORMS,
            tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL: lambda: self._tsc_invariant,
        }
        writes: dict[int, Write] = {
            tlfs.HV_X64_MSR_GUEST_OS_ID: self._write_os_id,
            tlfs.HV_X64_MSR_HYPERCALL: self._write_hypercall,
            tlfs.HV_X64_MSR_RESET: self._write_reset,
            tlfs.HV_X64_MSR_REFERENCE_TSC: lambda value: self.tsc_page.write(value, vcpu),
            tlfs.HV_X64_MSR_VP_ASSIST_PAGE: partial(self._write_assist, index),
            tlfs.HV_X64_MSR_CRASH_CTL: self._write_crash_ctl,
            tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL: partial(self._write_tsc_invariant, vcpu),
        }
        for msr in _STORED:
            reads[msr] = partial(self._stored.__getitem__, msr)
            writes[msr] = partial(self._store, msr)
        writes[tlfs.HV_X64_MSR_TSC_EMULATION_STATUS] = lambda value: not value
        if self.synic is not None:
            _add_synic(self.synic.vps[index], reads, writes)
        self._reads.append(reads)
        self._writes.append(writes)

    def handle_rdmsr(self, vcpu: Vcpu) -> None:
        """Handler of KVM_EXIT_X86_RDMSR, on the vCPU's thread."""
        msr = vcpu.run.msr
        read = self._reads[vcpu.index].get(msr.index)
        if read is None:
            msr.error = 1
            return
        msr.error = 0
        msr.data = read()

    def handle_wrmsr(self, vcpu: Vcpu) -> None:
        """Handler of KVM_EXIT_X86_WRMSR, on the vCPU's thread."""
        msr = vcpu.run.msr
        write = self._writes[vcpu.index].get(msr.index)
        msr.error = write is None or not write(msr.data)

    # What a write does, beyond being remembered.

    def _write_os_id(self, value: int) -> bool:
        with self._lock:
            self._os_id = value
            if not value and self._hypercall & tlfs.HV_X64_MSR_HYPERCALL_ENABLE:
                self._hypercall &= ~tlfs.HV_X64_MSR_HYPERCALL_ENABLE
                self.hypercall_page.place(None)
        return True

    def _write_hypercall(self, value: int) -> bool:
        """No effect without a guest OS id, nor once the guest has locked it."""
        with self._lock:
            if not self._os_id or self._hypercall & tlfs.HV_X64_MSR_HYPERCALL_LOCKED:
                return True
            if not self.hypercall_page.place(_hypercall_gpa(value)):
                self.hypercall_page.place(_hypercall_gpa(self._hypercall))
                return False
            self._hypercall = value
        return True

    def _write_reset(self, value: int) -> bool:
        if value & 1:
            self._on_reset("the guest wrote HV_X64_MSR_RESET")
        return True

    def _write_assist(self, index: int, value: int) -> bool:
        """Nothing here ever asks the guest to leave out an EOI, so the page is cleared and forgotten."""
        if value & tlfs.HV_X64_MSR_VP_ASSIST_PAGE_ENABLE:
            try:
                self._memory.write_u32(value & tlfs.HV_X64_MSR_TSC_REFERENCE_ADDRESS_MASK, 0)
            except GuestMemoryError:
                return False
        self._assist[index] = value
        return True

    def _write_crash_ctl(self, value: int) -> bool:
        if value & tlfs.HV_CRASH_CTL_CRASH_NOTIFY:
            parameters = [self._stored[msr] for msr in CRASH_PARAMETERS]
            self._on_crash(panic_text(parameters, self._memory, value))
        return True

    def _write_tsc_invariant(self, vcpu: Vcpu, value: int) -> bool:
        """Shows CPUID 0x80000007 EDX[8] where KVM hid it. Set, it stays set until a reset, as in KVM."""
        if value & ~tlfs.HV_EXPOSE_INVARIANT_TSC or value < self._tsc_invariant:
            return False
        self._tsc_invariant = value
        _tell_kvm_tsc_invariant(vcpu, value)
        return True

    def _store(self, msr: int, value: int) -> bool:
        self._stored[msr] = value
        return True

    # Lifetime.

    def activate(self) -> None:
        """Take the MSRs away from KVM. Once, before any vCPU runs. Raises KvmIoctlError."""
        self._vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)
        both = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE
        self._vm.set_msr_filter([MsrRange(tlfs.HV_X64_MSR_FIRST, tlfs.HV_X64_MSR_COUNT, both)])

    def reset(self) -> None:
        """Power-on values of everything but the SynIC, which `Partition.reset` does. Every vCPU is paused.

        Reference time goes on: it counts from the making of the VM.
        """
        if self._tsc_invariant:
            _tell_kvm_tsc_invariant(self._boot_vcpu, 0)
        with self._lock:
            self._os_id = self._hypercall = self._tsc_invariant = 0
            self.hypercall_page.place(None)
            self._stored.update(dict.fromkeys(_STORED, 0))
            self._assist[:] = [0] * len(self._assist)
        for run_time in self._run_times:
            run_time.reset()
        self.tsc_page.reset()

    def hold(self) -> None:
        """Let no timer go off. Every vCPU is paused."""
        if self.synic is not None:
            self.synic.hold()

    def go_on(self) -> None:
        """Undo `hold`."""
        if self.synic is not None:
            self.synic.go_on()

    def save(self) -> UserHypervState:
        """Everything. Held."""
        return UserHypervState(
            self.clock.now(),
            self._os_id,
            self._hypercall,
            dict(self._stored),
            self._tsc_invariant,
            self.tsc_page.value,
            tuple(self._assist),
            tuple(run_time.last for run_time in self._run_times),
            () if self.synic is None else self.synic.save(),
        )

    def load(self, state: UserHypervState) -> None:
        """Put it back. Held, behind a reset and behind the vCPUs' own state.

        ValueError for what no guest can have brought about; OSError when the host
        cannot place a page.
        """
        registers = (state.os_id, state.hypercall, *state.stored.values(), *state.assist)
        if not all(0 <= value < 1 << 64 for value in registers) or set(state.stored) != set(_STORED):
            raise ValueError("its registers are not those of this interface")
        vps = len(self._assist)
        right = len(state.assist) == len(state.run_times) == vps
        if not right or state.tsc_invariant & ~tlfs.HV_EXPOSE_INVARIANT_TSC:
            raise ValueError("its registers are not those of this machine")
        if not all(0 <= time < 1 << 62 for time in (state.reference_time, *state.run_times)):
            raise ValueError("its reference time or a run time is more than a machine can have run")
        self.clock.set(state.reference_time)
        for run_time, last in zip(self._run_times, state.run_times, strict=True):
            run_time.load(last)
        with self._lock:
            self._os_id, self._hypercall = state.os_id, state.hypercall
            self._stored.update(state.stored)
            self._assist[:] = state.assist
            self._tsc_invariant = state.tsc_invariant
            if not self.hypercall_page.place(_hypercall_gpa(state.hypercall)):
                raise ValueError("its hypercall page cannot lie where it was")
        if state.tsc_invariant:
            _tell_kvm_tsc_invariant(self._boot_vcpu, state.tsc_invariant)
        self.tsc_page.load(state.reference_tsc, self._boot_vcpu)
        if self.synic is not None:
            self.synic.load(state.vps)
        elif state.vps:
            raise ValueError("it has a SynIC, and this machine has none")

    def close(self) -> None:
        """Free every page and timer. Idempotent; vCPU threads have ended."""
        self._stack.close()


def _tell_kvm_tsc_invariant(vcpu: Vcpu, value: int) -> None:
    """The one register that KVM must hear of, should it have it.

    A KVM that knows it reads the guest's CPUID: where that offers this register,
    the invariant TSC stays hidden until the register is set.
    """
    with suppress(KvmIoctlError):
        vcpu.set_msrs(((tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, value),))


def _hypercall_gpa(value: int) -> int | None:
    on = value & tlfs.HV_X64_MSR_HYPERCALL_ENABLE
    return value & tlfs.HV_X64_MSR_HYPERCALL_PAGE_ADDRESS_MASK if on else None


def _add_synic(vp: UserVp, reads: dict[int, Read], writes: dict[int, Write]) -> None:
    reads.update(
        {
            tlfs.HV_X64_MSR_SCONTROL: lambda: vp.scontrol,
            tlfs.HV_X64_MSR_SVERSION: lambda: HV_SYNIC_VERSION_1,
            tlfs.HV_X64_MSR_SIEFP: lambda: vp.siefp,
            tlfs.HV_X64_MSR_SIMP: lambda: vp.simp,
            tlfs.HV_X64_MSR_EOM: lambda: 0,
        }
    )

    def eom(_value: int) -> bool:
        vp.eom()
        return True

    writes.update(
        {
            tlfs.HV_X64_MSR_SCONTROL: lambda value: vp.set_registers(value, vp.siefp, vp.simp),
            tlfs.HV_X64_MSR_SIEFP: lambda value: vp.set_registers(vp.scontrol, value, vp.simp),
            tlfs.HV_X64_MSR_SIMP: lambda value: vp.set_registers(vp.scontrol, vp.siefp, value),
            tlfs.HV_X64_MSR_EOM: eom,
        }
    )
    for sint in range(HV_SYNIC_SINT_COUNT):
        reads[tlfs.HV_X64_MSR_SINT0 + sint] = partial(vp.sint, sint)
        writes[tlfs.HV_X64_MSR_SINT0 + sint] = partial(vp.set_sint, sint)
    for stimer in vp.stimers:
        config = tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * stimer.index
        reads[config] = partial(getattr, stimer, "config")
        reads[config + 1] = partial(getattr, stimer, "count")
        writes[config] = stimer.set_config
        writes[config + 1] = stimer.set_count
