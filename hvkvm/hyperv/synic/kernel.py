"""The SynIC inside KVM (KVM_CAP_HYPERV_SYNIC2): its exits, its activation, its reset.

KVM keeps the MSRs, interrupts the VP and tells when the guest is done with a
message; the pages are ours. Only `partition` makes a `KernelSynic`; the layers
above know it by `synic.seam`.

Threads: exits come on the vCPU's thread; messages are written there too,
outside KVM_RUN, because KVM's stimers write slots inside KVM_RUN (S25).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import (
    KVM_CAP_HYPERV_EVENTFD,
    KVM_CAP_HYPERV_SYNIC2,
    KVM_EXIT_HYPERV_HCALL,
    KVM_EXIT_HYPERV_SYNDBG,
    KVM_EXIT_HYPERV_SYNIC,
)
from hvkvm.abi.tlfs import (
    HV_HYPERCALL_CODE_MASK,
    HV_HYPERCALL_FAST_BIT,
    HV_X64_MSR_EOM,
    HVCALL_SIGNAL_EVENT,
)
from hvkvm.abi.x86 import EFER_LMA
from hvkvm.errors import CapabilityMissing, HvkvmError
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.hyperv.cpuid import restore_order
from hvkvm.hyperv.synic.kernel_line import KernelLine, KernelSignalPath
from hvkvm.hyperv.synic.vp import VpState, VpSynic
from hvkvm.memory.overlay import OverlayPage
from hvkvm.runtime.protocols import EdgeWatcher, VpThread
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.memory.guest import GuestMemory

_CODE_AND_FAST = HV_HYPERCALL_CODE_MASK | HV_HYPERCALL_FAST_BIT
_NO_DEBUGGER = 0
"""SYNDBG status with no success bit: nobody is attached."""


class KernelVp(VpSynic):
    """One vCPU's side: `submit` runs work on its thread, between two KVM_RUNs."""

    __slots__ = ("_thread",)

    def __init__(self, thread: VpThread, memory: GuestMemory, observer: Observer) -> None:
        message = OverlayPage(memory)
        try:
            event = OverlayPage(memory)
        except BaseException:
            message.close()
            raise
        super().__init__(thread.vcpu.index, message, event, observer=observer)
        self._thread = thread

    @property
    def vcpu(self) -> Vcpu:
        """The vCPU that this VP is."""
        return self._thread.vcpu

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None:
        """See `seam.SynicVp.submit`."""
        self._thread.submit(fn, cancelled=cancelled)


class KernelVpState(NamedTuple):
    """What we keep of a VP, and what KVM does: its Hyper-V MSRs by index."""

    ours: VpState
    msrs: dict[int, int]


class KernelSynic:
    """The SynIC of every vCPU in `threads`, which are in VP order.

    `reset_msrs(vp_index)` gives the MSRs to write at power-on and reset, in
    order. Raises OSError when the host has no memory for the pages.
    """

    def __init__(
        self,
        vm: Vm,
        gsi: GsiTable,
        memory: GuestMemory,
        io: EdgeWatcher,
        threads: Sequence[VpThread],
        *,
        reset_msrs: Callable[[int], Iterable[tuple[int, int]]] = lambda vp_index: (),
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        self._vm = vm
        self._gsi = gsi
        self._io = io
        self._reset_msrs = reset_msrs
        # Guards the step from "not active" to "active" against lines opened meanwhile.
        self._lock = threading.Lock()
        self._waiting: list[KernelLine] = []
        self._vps: list[KernelVp] = []
        try:
            for thread in threads:
                self._vps.append(KernelVp(thread, memory, observer))
        except BaseException:
            self.close()
            raise
        has_eventfd = vm.check_extension(KVM_CAP_HYPERV_EVENTFD)
        self.signal_path: KernelSignalPath | None = KernelSignalPath(vm) if has_eventfd else None
        self.signal_path_missing = (
            "this kernel's KVM lacks KVM_CAP_HYPERV_EVENTFD: use --signal-path user, or Linux 4.17 or later"
        )

    def vp(self, vp_index: int) -> KernelVp | None:
        """See `seam.Synic.vp`. A VP that is not active yet is there already: its lines wait (S16)."""
        return self._vps[vp_index] if 0 <= vp_index < len(self._vps) else None

    def open_line(self, vp_index: int, sint: int, *, acks: bool) -> KernelLine:
        """See `seam.Synic.open_line`."""
        line = KernelLine(self._vm, self._gsi, self._io, vp_index, sint, acks=acks)
        with self._lock:
            if self._vps[vp_index].active:
                line.bind()
            else:
                self._waiting.append(line)
        return line

    def activate(self) -> None:
        """Enable SYNIC2 on every vCPU, bind waiting lines, write the power-on MSRs.

        Once, on the main thread: after KVM_SET_CPUID2, before any vCPU runs.
        Raises CapabilityMissing, KvmIoctlError.
        """
        if not self._vm.check_extension(KVM_CAP_HYPERV_SYNIC2):
            raise CapabilityMissing(
                "hv-synic needs KVM_CAP_HYPERV_SYNIC2, which this kernel's KVM lacks: use a kernel with"
                " CONFIG_KVM_HYPERV=y, or --synic user"
            )
        with self._lock:
            for vp in self._vps:
                vp.vcpu.enable_cap(KVM_CAP_HYPERV_SYNIC2)
                vp.active = True
            # KVM skips the EOM notification of routes that were set before their VP's SynIC was active (S16).
            self._gsi.recommit()
            waiting, self._waiting = self._waiting, []
            for line in waiting:
                line.bind()
        self._write_msrs()

    def _write_msrs(self) -> None:
        for vp in self._vps:
            vp.vcpu.set_msrs(self._reset_msrs(vp.vp_index))

    def handle_exit(self, vcpu: Vcpu, call: Callable[[int, int], int]) -> None:
        """KVM_EXIT_HYPERV of `vcpu`; `call(control, param)` answers hypercalls. The vCPU's thread.

        Raises HvkvmError for a kind of exit that no kernel we know has (S56).
        """
        hyperv = vcpu.run.hyperv
        kind = hyperv.type
        if kind == KVM_EXIT_HYPERV_HCALL:
            hcall = hyperv.u.hcall
            control, param = hcall.input, hcall.params[0]
            if control & _CODE_AND_FAST == HVCALL_SIGNAL_EVENT:
                control, param = self._slow_signal(vcpu, control, param)
            hcall.result = call(control, param)
        elif kind == KVM_EXIT_HYPERV_SYNIC:
            synic = hyperv.u.synic
            # All three values, not only that of `synic.msr`: they are the state now (S57).
            if self._vps[vcpu.index].update(synic.control, synic.evt_page, synic.msg_page):
                # A timer message that found the page off waits in KVM for an EOM, which a guest that never
                # got a message does not write: give it one, and KVM tries again (S58).
                vcpu.set_msrs(((HV_X64_MSR_EOM, 0),))
        elif kind == KVM_EXIT_HYPERV_SYNDBG:
            hyperv.u.syndbg.status = _NO_DEBUGGER
        else:
            raise HvkvmError(f"KVM_EXIT_HYPERV type {kind} on vCPU {vcpu.index} is not known; update hvkvm")

    def _slow_signal(self, vcpu: Vcpu, control: int, param: int) -> tuple[int, int]:
        """What a slow HvSignalEvent means: since 5.13 KVM has loaded the value, bit 16 still clear (S52).

        Older kernels pass the gpa, which is then what the guest has in its input
        register. If the value happens to equal the gpa, loading it again gives
        the same value, so the choice is right on both.
        """
        regs, sregs = vcpu.regs(), vcpu.sregs()
        gpa = (
            regs.rdx
            if sregs.efer & EFER_LMA and sregs.cs.l
            else (regs.rbx & 0xFFFFFFFF) << 32 | regs.rcx & 0xFFFFFFFF
        )
        return (control, param) if param == gpa else (control | HV_HYPERCALL_FAST_BIT, param)

    def reset(self) -> None:
        """See `seam.Synic.reset`. Raises KvmIoctlError."""
        for vp in self._vps:
            vp.reset()
        self._write_msrs()

    def save(self) -> tuple[KernelVpState, ...]:
        """Every VP, in VP order. All are outside KVM_RUN. Raises KvmIoctlError."""
        saved = []
        for vp in self._vps:
            msrs = {index for index, _value in self._reset_msrs(vp.vp_index)}
            saved.append(KernelVpState(vp.save(), vp.vcpu.msrs(sorted(msrs))))
        return tuple(saved)

    def load(self, states: tuple[KernelVpState, ...]) -> None:
        """Put it back behind a reset. ValueError: not made by this. KvmIoctlError for what KVM refuses.

        KVM's registers come after our pages, so that a timer that is due finds its slot.
        """
        if len(states) != len(self._vps):
            raise ValueError(f"{len(states)} VPs were saved, and there are {len(self._vps)}")
        for vp, state in zip(self._vps, states, strict=True):
            vp.load(state.ours)
            known = {index for index, _value in self._reset_msrs(vp.vp_index)}
            if unknown := set(state.msrs) - known:
                raise ValueError(f"MSR {min(unknown):#x} of VP {vp.vp_index} is none of these enlightenments")
            vp.vcpu.set_msrs(restore_order(state.msrs))

    def close(self) -> None:
        """See `seam.Synic.close`."""
        for vp in self._vps:
            vp.close()
