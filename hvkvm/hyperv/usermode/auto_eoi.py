"""AutoEOI for guests that use it although it is declared deprecated: interrupts that need no EOI.

KVM's local APIC marks every interrupt that it delivers "in service" and has no
hook to end it at delivery; taking the mark away by KVM_SET_LAPIC would lose
interrupts that others raise between the reading and the writing. So an AutoEOI
interrupt goes round the APIC: on the VP's own thread, outside KVM_RUN, the vCPU
is told by KVM_SET_VCPU_EVENTS that it has just accepted the vector. That is what
AutoEOI means, and it touches nothing that another thread may write.

A CPU takes an interrupt only while it may: IF set, no shadow of STI or MOV SS,
no event being delivered, a priority above the APIC's. KVM reports no opening of
that window to a VMM that left the APIC to it. So what cannot be delivered is
tried again: after 1 ms, less and less often, every 10 ms at last. That is the
price, and it is paid only by guests that set the bit.

`raise_vector` may be called from any thread; the rest runs on the VP's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE
from hvkvm.errors import Stopped
from hvkvm.runtime.protocols import Delayer

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu

_APIC_PPR = 0xA0
_APIC_SPIV = 0xF0
_SPIV_ENABLED = 1  # bit 8: in the register's second byte

_FIRST_RETRY = 0.001
_LAST_RETRY = 0.010


class AutoEoi:
    """The AutoEOI interrupts that wait for one VP. `submit(fn, cancelled)` runs work on its thread."""

    __slots__ = ("_io", "_lock", "_retry", "_scheduled", "_submit", "_vcpu", "_waiting")

    def __init__(
        self, vcpu: Vcpu, submit: Callable[[Callable[[], None], Callable[[], None]], None], io: Delayer
    ) -> None:
        self._vcpu = vcpu
        self._submit = submit
        self._io = io
        self._lock = threading.Lock()
        self._waiting = 0  # one bit a vector, like the APIC's request register
        self._scheduled = False
        self._retry = _FIRST_RETRY  # seconds until the next attempt, if this one is in vain

    @property
    def waiting(self) -> bool:
        """Whether a vector has not been taken yet."""
        return bool(self._waiting)

    def raise_vector(self, vector: int) -> None:
        """Have the guest take `vector` soon; raised twice before it was taken, it is taken once."""
        with self._lock:
            self._waiting |= 1 << vector
            if self._scheduled:
                return
            self._scheduled = True
            self._retry = _FIRST_RETRY
        self._attempt_soon()

    def _attempt_soon(self) -> None:
        try:
            self._submit(self._attempt, self._forget)
        except Stopped:
            self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._scheduled = False

    def _attempt(self) -> None:
        """Deliver the highest vector, if the CPU takes one now; come again for what is left."""
        waiting = self._waiting
        highest = waiting.bit_length() - 1
        taken = bool(waiting) and self._deliver(highest)
        with self._lock:
            if taken:
                self._waiting &= ~(1 << highest)
                self._retry = _FIRST_RETRY
            if not self._waiting:
                self._scheduled = False
                return
            retry = self._retry
            if not taken:
                self._retry = min(retry * 2, _LAST_RETRY)
        try:
            self._io.call_later(retry, self._attempt_soon)
        except Stopped:
            self._forget()

    def _deliver(self, vector: int) -> bool:
        """Whether the vCPU has accepted `vector`, or never will."""
        vcpu = self._vcpu
        # As of the last KVM_RUN. If that ended in the middle of an instruction, KVM completes it first, and
        # none that exits changes IF.
        if not vcpu.run.if_flag:
            return False
        events = vcpu.vcpu_events()
        if (
            events.interrupt.injected
            or events.interrupt.shadow
            or events.exception.injected
            or events.exception.pending
            or events.nmi.injected
        ):
            return False
        state = vcpu.mp_state()
        if state not in (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED):
            return True  # a CPU that waits for INIT or SIPI drops interrupts, as its APIC does
        regs = vcpu.lapic().regs
        if not regs[_APIC_SPIV + 1] & _SPIV_ENABLED:
            return True  # so does an APIC that is off
        if vector >> 4 <= regs[_APIC_PPR] >> 4:
            return False
        events.interrupt.injected = 1
        events.interrupt.nr = vector
        events.interrupt.soft = 0
        events.flags = 0  # leave alone what others write: pending NMIs, SIPIs, SMIs
        vcpu.set_vcpu_events(events)
        if state == KVM_MP_STATE_HALTED:
            vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
        return True

    def go_on(self) -> None:
        """Try to deliver what waits. The VP is outside KVM_RUN."""
        with self._lock:
            if not self._waiting or self._scheduled:
                return
            self._scheduled = True
            self._retry = _FIRST_RETRY
        self._attempt_soon()

    def save(self) -> tuple[int, ...]:
        """The vectors that wait. The VP is outside KVM_RUN."""
        return tuple(vector for vector in range(256) if self._waiting >> vector & 1)

    def load(self, vectors: tuple[int, ...]) -> None:
        """Have these wait, and no others, until `go_on`. ValueError for what is no vector."""
        if not all(0 <= vector < 256 for vector in vectors):
            raise ValueError("an AutoEOI interrupt has no vector")
        with self._lock:
            self._waiting = sum({1 << vector for vector in vectors})

    def reset(self) -> None:
        """Nothing waits any more. The VP is outside KVM_RUN."""
        with self._lock:
            self._waiting = 0
