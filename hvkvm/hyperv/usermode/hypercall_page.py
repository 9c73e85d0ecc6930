"""The hypercall page of a SynIC in user space, and the port behind it.

Its code is `endbr64; out HYPERCALL_PORT, eax; ret`: a port write exits to user
space on every KVM, needs no free register and changes none. RAX gets the result
here; RIP is left to KVM, which has stepped over the OUT already or does so at
the next entry, by KVM's flavour.

The page is an overlay: the RAM below comes back when the guest takes it away.
The port answers only an OUT from the page itself; any other is one to a port
without device. A hypercall needs protected mode and CPL 0, and is #UD without
(TLFS; S55). At CPL 3 the CPU refuses the OUT before that by #GP, unless the guest
gave leave by IOPL or a task's bitmap.

`handle_out` runs on the calling vCPU's thread; `place` on the thread of the one that
writes HV_X64_MSR_HYPERCALL, under the interface's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.board import HYPERCALL_PORT
from hvkvm.abi.kvm import KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS
from hvkvm.abi.tlfs import HvStatus
from hvkvm.abi.x86 import EFER_LMA, X86_CR0_PE, X86_EFLAGS_VM
from hvkvm.hyperv.synic.pages import Overlay

if TYPE_CHECKING:
    from hvkvm.abi.kvm_structs import kvm_regs, kvm_sregs
    from hvkvm.kvm.vcpu import Vcpu

CODE = b"\xf3\x0f\x1e\xfa\xe7" + bytes((HYPERCALL_PORT, 0xC3))
_OUT, _OUT_LENGTH = 4, 2
_RIPS = (_OUT, _OUT + _OUT_LENGTH)
"""Where RIP may be in the page at the exit: at the OUT (VMX, SVM) or behind it (KVM's emulator)."""

_PAGE = 0xFFF
_LOW = 0xFFFFFFFF
_UD = 6

Call = Callable[[int, int], int]


class HypercallPage:
    """The page, and who answers HYPERCALL_PORT. `call(control, param)` gives a hypercall's result."""

    def __init__(self, overlay: Overlay, sync_regs: int) -> None:
        self._overlay = overlay
        both = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS
        self._registers_come_along = both if sync_regs & both == both else 0
        # The last address whose translation was the page, and the page: guests call it at one address, whose
        # mapping stays. One that maps something else there finds that a hypercall too, until the page moves.
        self._seen: tuple[int, int | None] | None = None
        self.call: Call = _nothing_known

    def place(self, gpa: int | None) -> bool:
        """Show the page at `gpa` with fresh code, or nowhere; False when it cannot lie there."""
        if gpa is not None:
            # Over whatever a guest wrote into it at its last place.
            self._overlay.view[: len(CODE)] = CODE
        return self._overlay.place(gpa)

    def handle_out(self, vcpu: Vcpu) -> None:
        """An OUT of 4 bytes at HYPERCALL_PORT: perhaps a hypercall. The vCPU's own thread."""
        if self._overlay.gpa is None:
            return
        run = vcpu.run
        shared = run.kvm_valid_regs
        if shared:
            regs, sregs = run.s.regs.regs, run.s.regs.sregs
        else:
            regs, sregs = vcpu.regs(), vcpu.sregs()
        if not self._is_from_page(vcpu, regs, sregs):
            return
        # In virtual-8086 mode, which is CPL 3, a selector says nothing of that.
        if not sregs.cr0 & X86_CR0_PE or sregs.cs.selector & 3 or regs.rflags & X86_EFLAGS_VM:
            _raise_ud(vcpu)
            return
        if sregs.efer & EFER_LMA and sregs.cs.l:
            regs.rax = self.call(regs.rcx, regs.rdx)
        else:
            control = (regs.rdx & _LOW) << 32 | regs.rax & _LOW
            result = self.call(control, (regs.rbx & _LOW) << 32 | regs.rcx & _LOW)
            regs.rax, regs.rdx = result & _LOW, result >> 32
        if shared:
            run.kvm_dirty_regs = KVM_SYNC_X86_REGS
        else:
            vcpu.set_regs(regs)
            # A vCPU that makes hypercalls brings its registers along from now on: that costs each of its
            # exits less than reading and writing them costs a hypercall.
            run.kvm_valid_regs = self._registers_come_along

    def _is_from_page(self, vcpu: Vcpu, regs: kvm_regs, sregs: kvm_sregs) -> bool:
        rip: int = regs.rip
        if not (sregs.efer & EFER_LMA and sregs.cs.l):
            rip = rip + sregs.cs.base & _LOW
        if rip & _PAGE not in _RIPS:
            return False
        page = self._overlay.gpa
        if self._seen == (rip | _PAGE, page):
            return True
        gpa = vcpu.translate(rip)
        if gpa is None or gpa & ~_PAGE != page:
            return False
        self._seen = (rip | _PAGE, page)
        return True


def _raise_ud(vcpu: Vcpu) -> None:
    """Have the guest take #UD at the OUT, in place of it. The vCPU's thread, at the OUT's exit."""
    # Some flavours of KVM step over the OUT at the next KVM_RUN: let them, before RIP is put back.
    vcpu.complete_exit()
    regs = vcpu.regs()
    regs.rip -= _OUT_LENGTH
    vcpu.set_regs(regs)  # drops pending exceptions, so it comes first
    events = vcpu.vcpu_events()
    events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, _UD, 0
    events.flags = 0  # leave alone what others write: pending NMIs, SIPIs, SMIs
    vcpu.set_vcpu_events(events)


def _nothing_known(control: int, param: int) -> int:
    """A guest without SynIC has nothing to call."""
    return int(HvStatus.INVALID_HYPERCALL_CODE)
