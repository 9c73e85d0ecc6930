"""One VP's SynIC in user space: its SINTs, its timers, its interrupts and the guest's EOM.

Owner: the VP's thread, on which the guest's MSR writes arrive and message slots
are written. `raise_sint`, event flags, `raise_vector` and acks' arming come from any
thread. `usermode.synic` makes these.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi.hv_synic import (
    HV_SYNIC_FIRST_VALID_VECTOR,
    HV_SYNIC_SINT_AUTO_EOI,
    HV_SYNIC_SINT_COUNT,
    HV_SYNIC_SINT_MASKED,
    HV_SYNIC_SINT_POLLING,
    HV_SYNIC_SINT_RESET,
    HV_SYNIC_SINT_VECTOR_MASK,
)
from hvkvm.abi.tlfs import HV_STIMER_COUNT
from hvkvm.errors import KvmIoctlError, Stopped
from hvkvm.events import Observer
from hvkvm.hyperv.synic.vp import VpState, VpSynic
from hvkvm.hyperv.usermode.alarm import Alarms
from hvkvm.hyperv.usermode.auto_eoi import AutoEoi
from hvkvm.hyperv.usermode.stimer import Clock, Stimer, StimerState
from hvkvm.memory.overlay import OverlayPage
from hvkvm.runtime.protocols import Deferrer, Delayer, EdgeWatcher, VpThread
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.vm import Vm
    from hvkvm.memory.guest import GuestMemory

_MSI_ADDRESS = 0xFEE00000
_MSI_DESTINATION_SHIFT = 12
_FOR_NOW = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENOSPC)
_RAISE_AGAIN = 0.001
"""Seconds until an interrupt is raised again that the host had no means to raise."""
_SILENT = HV_SYNIC_SINT_MASKED | HV_SYNIC_SINT_POLLING

Waiter = Callable[[], None]


class Loop(EdgeWatcher, Deferrer, Delayer, Protocol):
    """What is needed of the I/O loop."""


class UserVpState(NamedTuple):
    """A VP whose SynIC is all ours."""

    synic: VpState
    sints: tuple[int, ...]
    stimers: tuple[StimerState, ...]
    auto_eoi: tuple[int, ...]
    """The vectors of AutoEOI interrupts that the CPU has not taken."""


class UserVp(VpSynic):
    """The VP of `thread`. Raises OSError when the host has no memory for its pages."""

    __slots__ = (
        "_ack_lock",
        "_auto_eoi",
        "_io",
        "_msi_address",
        "_raised_later",
        "_sints",
        "_thread",
        "_vm",
        "_waiters",
        "stimers",
    )

    def __init__(
        self,
        vm: Vm,
        thread: VpThread,
        memory: GuestMemory,
        io: Loop,
        clock: Clock,
        alarms: Alarms,
        observer: Observer,
    ) -> None:
        message = OverlayPage(memory)
        try:
            event = OverlayPage(memory)
        except BaseException:
            message.close()
            raise
        index = thread.vcpu.index
        super().__init__(index, message, event, observer=observer)
        self._vm = vm
        self._thread = thread
        self._io = io
        self._msi_address = _MSI_ADDRESS | index << _MSI_DESTINATION_SHIFT
        self._sints = [HV_SYNIC_SINT_RESET] * HV_SYNIC_SINT_COUNT
        self._auto_eoi = AutoEoi(thread.vcpu, self.submit, io)
        # Guards the next two; never held while a waiter runs.
        self._ack_lock = threading.Lock()
        self._raised_later: set[int] = set()
        self._waiters: list[Waiter] = []
        self.stimers = [Stimer(timer, self, clock, alarms.make) for timer in range(HV_STIMER_COUNT)]

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None:
        """See `seam.SynicVp.submit`: on the VP's thread, where its timers' messages are written too."""
        self._thread.submit(fn, cancelled=cancelled)

    # Registers. The VP's thread; False is the guest's #GP.

    def sint(self, number: int) -> int:
        """HV_X64_MSR_SINTn."""
        return self._sints[number]

    def set_sint(self, number: int, value: int) -> bool:
        """A vector below 16 is refused unless the SINT is silent anyway."""
        if value & HV_SYNIC_SINT_VECTOR_MASK < HV_SYNIC_FIRST_VALID_VECTOR and not value & _SILENT:
            return False
        self._sints[number] = value
        return True

    def set_registers(self, scontrol: int, siefp: int, simp: int) -> bool:
        """See `VpSynic.update`; what waits for a message page goes out when it comes on (S58)."""
        if not self.active:
            return False
        if self.update(scontrol, siefp, simp):
            self._retry_stimers()
        return True

    def eom(self) -> None:
        """The guest wrote EOM: timers first, which are here, then whoever waits for a slot."""
        self._retry_stimers()
        if not self._waiters:
            return
        with self._ack_lock:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            try:
                self._io.call_soon(waiter)
            except Stopped:
                return  # the machine is ending; closing its routes cancels what waits

    def _retry_stimers(self) -> None:
        for stimer in self.stimers:
            if stimer.pending:
                stimer.retry()

    # Interrupts. Any thread.

    def raise_sint(self, sint: int) -> int:
        """Interrupt the VP through `sint`: 0 or -errno. Masked or polled, it is silence and 0 (S20)."""
        value = self._sints[sint]
        if value & _SILENT:
            return 0
        vector = value & HV_SYNIC_SINT_VECTOR_MASK
        if value & HV_SYNIC_SINT_AUTO_EOI:
            self._auto_eoi.raise_vector(vector)
            return 0
        return self.raise_vector(vector)

    def raise_vector(self, vector: int) -> int:
        """A fixed, edge-triggered interrupt to the VP's APIC: 0 or -errno. An APIC that is off drops it.

        One that the host cannot raise for want of something is raised a little later: a guest does not look
        for messages that it was not told of.
        """
        try:
            self._vm.signal_msi(self._msi_address, vector)
        except KvmIoctlError as error:
            if error.errno not in _FOR_NOW:
                return -(error.errno or errno.EIO)
            with self._ack_lock:
                if vector in self._raised_later:
                    return 0
                self._raised_later.add(vector)
            with suppress(Stopped):
                self._io.call_later(_RAISE_AGAIN, self._raise_again, vector)
        return 0

    def _raise_again(self, vector: int) -> None:
        with self._ack_lock:
            self._raised_later.discard(vector)
        self.raise_vector(vector)

    def _sint_text(self, number: int) -> str:
        """See `VpSynic._sint_text`."""
        from hvkvm.hyperv.synic_text import sint

        value = self._sints[number]
        return "" if value == HV_SYNIC_SINT_RESET else sint(value)

    def _timer_texts(self) -> dict[str, str]:
        """See `VpSynic._timer_texts`."""
        return {str(timer.index): text for timer in self.stimers if (text := timer.described())}

    @property
    def auto_eoi_waiting(self) -> bool:
        """Whether an AutoEOI interrupt waits for the CPU to take it."""
        return self._auto_eoi.waiting

    # Acknowledgements. Any thread.

    def arm_ack(self, waiter: Waiter) -> None:
        """Have `waiter` called on the I/O loop after the next EOM, once."""
        with self._ack_lock:
            self._waiters.append(waiter)

    def disarm_ack(self, waiter: Waiter) -> None:
        """Forget `waiter`, if it still waits."""
        with self._ack_lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def hold(self) -> None:
        """Let no timer go off until `go_on`. The vCPU is paused."""
        for stimer in self.stimers:
            stimer.hold()

    def go_on(self) -> None:
        """Let timers go off, and AutoEOI interrupts in. The vCPU is paused."""
        for stimer in self.stimers:
            stimer.go_on()
        self._auto_eoi.go_on()

    def save_all(self) -> UserVpState:
        """Registers, pages and timers. Held."""
        timers = tuple(stimer.save() for stimer in self.stimers)
        return UserVpState(self.save(), tuple(self._sints), timers, self._auto_eoi.save())

    def load_all(self, state: UserVpState) -> None:
        """Put them back. Held, behind a reset. ValueError for a VP that cannot be; OSError as `update`."""
        if len(state.sints) != HV_SYNIC_SINT_COUNT or len(state.stimers) != HV_STIMER_COUNT:
            raise ValueError(f"VP {self.vp_index} has another number of SINTs or timers")
        if not all(0 <= sint < 1 << 64 for sint in state.sints):
            raise ValueError(f"VP {self.vp_index} has a SINT that is no 64-bit number")
        if not all(self.set_sint(number, value) for number, value in enumerate(state.sints)):
            raise ValueError(f"VP {self.vp_index} has a SINT with a vector that no guest can set")
        for stimer, timer in zip(self.stimers, state.stimers, strict=True):
            stimer.load(timer)
        self._auto_eoi.load(state.auto_eoi)
        self.load(state.synic)

    def reset(self) -> None:
        """See `VpSynic.reset`; SINTs masked, timers stopped, nothing waits."""
        for stimer in self.stimers:
            stimer.reset()
        self._auto_eoi.reset()
        self._sints = [HV_SYNIC_SINT_RESET] * HV_SYNIC_SINT_COUNT
        super().reset()

    def close(self) -> None:
        """See `VpSynic.close`; the host timers go too."""
        for stimer in self.stimers:
            stimer.close()
        super().close()
