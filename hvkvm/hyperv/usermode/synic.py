"""The SynIC in user space, as `synic.seam` wants it: VPs and their SINT lines.

`usermode.interface` makes one `UserSynic` and feeds it the guest's MSR writes;
routes, staging and connections above do not know which SynIC they have.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.hyperv.usermode.alarm import Alarms
from hvkvm.hyperv.usermode.stimer import Clock
from hvkvm.hyperv.usermode.vp import Loop, UserVp, UserVpState
from hvkvm.runtime.protocols import VpThread

if TYPE_CHECKING:
    from hvkvm.kvm.vm import Vm
    from hvkvm.memory.guest import GuestMemory


class UserLine:
    """The interrupt of one (vp, sint): an MSI, made anew for every pulse from what the SINT says then."""

    __slots__ = ("_closed", "_sint", "_vp")

    def __init__(self, vp: UserVp, sint: int) -> None:
        self._vp = vp
        self._sint = sint
        self._closed = False

    def pulse(self) -> int:
        """See `seam.SintLine.pulse`."""
        if self._closed or not self._vp.active:
            return -errno.ENXIO
        return self._vp.raise_sint(self._sint)

    def enable_acks(self) -> None:
        """See `seam.SintLine.enable_acks`: every EOM exits, so there is nothing to enable."""

    def arm_ack(self, waiter: Callable[[], None]) -> None:
        """See `seam.SintLine.arm_ack`. Never raises: an I/O loop that is gone shows at the EOM."""
        self._vp.arm_ack(waiter)

    def disarm_ack(self, waiter: Callable[[], None]) -> None:
        """See `seam.SintLine.disarm_ack`."""
        self._vp.disarm_ack(waiter)

    def close(self) -> None:
        """See `seam.SintLine.close`. It holds no fd; its users have disarmed their waiters."""
        self._closed = True


class UserSynic:
    """The SynIC of every vCPU in `threads`, in VP order. Raises OSError without memory for pages."""

    signal_path = None
    signal_path_missing = (
        "the SynIC in user space takes every HvSignalEvent as an exit; use --signal-path auto or user"
    )

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        io: Loop,
        threads: Sequence[VpThread],
        clock: Clock,
        *,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        self.vps: list[UserVp] = []
        self._alarms = Alarms(io)
        try:
            for thread in threads:
                self.vps.append(UserVp(vm, thread, memory, io, clock, self._alarms, observer))
        except BaseException:
            self.close()
            raise

    def vp(self, vp_index: int) -> UserVp | None:
        """See `seam.Synic.vp`."""
        return self.vps[vp_index] if 0 <= vp_index < len(self.vps) else None

    def open_line(self, vp_index: int, sint: int, *, acks: bool) -> UserLine:
        """See `seam.Synic.open_line`. Never fails."""
        return UserLine(self.vps[vp_index], sint)

    def activate(self) -> None:
        """See `seam.Synic.activate`: from now on lines raise and the guest's registers count."""
        for vp in self.vps:
            vp.active = True

    def reset(self) -> None:
        """See `seam.Synic.reset`."""
        for vp in self.vps:
            vp.reset()

    def hold(self) -> None:
        """Let no timer go off. vCPUs are paused."""
        for vp in self.vps:
            vp.hold()

    def go_on(self) -> None:
        """Undo `hold`."""
        for vp in self.vps:
            vp.go_on()

    def save(self) -> tuple[UserVpState, ...]:
        """Every VP, in VP order. Held."""
        return tuple(vp.save_all() for vp in self.vps)

    def load(self, states: tuple[UserVpState, ...]) -> None:
        """Put it back. Held, behind a reset. ValueError for what this SynIC cannot have been."""
        if len(states) != len(self.vps):
            raise ValueError(f"{len(states)} VPs were saved, and there are {len(self.vps)}")
        for vp, state in zip(self.vps, states, strict=True):
            vp.load_all(state)

    def close(self) -> None:
        """See `seam.Synic.close`."""
        for vp in self.vps:
            vp.close()
        self._alarms.close()
