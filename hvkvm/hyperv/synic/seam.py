"""What everything above a SynIC sees of it: the protocols that hide which one is below.

Routes, staging, connections and hypercalls use these names only. `synic.kernel`
implements them on KVM's own SynIC (HV_SINT routes, irqfd with resample,
KVM_EXIT_HYPERV); one in user space implements them on MSR exits and MSIs. A new
SynIC is right when the route and staging tests pass on it unchanged.

Status results are 0 or a negative errno, never exceptions: guests reach these
paths. Owner threads are said per method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class SynicVp(Protocol):
    """One virtual processor's side of the SynIC: its two pages and where it is worked on."""

    @property
    def vp_index(self) -> int: ...

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None:
        """Run `fn` once where this VP's message slots may be written, in order of submission (S25).

        For the kernel's SynIC that is the vCPU's thread outside KVM_RUN, where
        it cannot collide with KVM's own stimers. Exactly one of `fn` and
        `cancelled` is called, unless this raises Stopped. Any thread.
        """

    def post_message(self, sint: int, message: bytes) -> int:
        """Write one message (HV_MESSAGE_SIZE bytes) to the slot; raises no interrupt.

        0: written. -EAGAIN: the slot is taken, its pending flag is set (S26).
        -ENXIO: the message page is off (S9). Only from within `submit`.
        """

    def set_event_flag(self, sint: int, number: int) -> int:
        """Set one event flag, atomically against the guest and other hosts' threads (S35, S36).

        1: it was clear. 0: it was set already. -ENXIO: SynIC or page is off (S34).
        `number` is in 0..HV_EVENT_FLAGS_COUNT-1, checked by the caller. Any thread.
        """

    def snapshot(self) -> dict[str, Any] | None:
        """What it holds, for people; None while all is as at power-on. Any thread."""


class SintLine(Protocol):
    """The interrupt line of one (vp, sint), and its acknowledgement."""

    def pulse(self) -> int:
        """Raise the SINT's interrupt once: 0, or -errno (-ENXIO: closed, or the SynIC is not active).

        A masked SINT swallows it and nobody can tell (S20). Any thread.
        """

    def enable_acks(self) -> None:
        """Make `arm_ack` possible on a line opened without (S13). Idempotent. Raises OSError, HvkvmError."""

    def arm_ack(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` once, on the I/O loop, after the guest next says that a slot may be free (S29).

        It may come early (a stale EOM, an EOI of the vector) but must come if
        the EOM follows this call. Any thread; never calls `waiter` itself.
        Raises Stopped when the I/O loop is gone, OSError when the host has no memory for it.
        """

    def disarm_ack(self, waiter: Callable[[], None]) -> None:
        """Forget `waiter`, if it still waits. It may be running on the loop already. Any thread."""

    def close(self) -> None:
        """Let the line go, with all its fds. Idempotent. Not while holding a lock that a waiter takes."""


class SignalPath(Protocol):
    """A way to have HvSignalEvent on a connection answered without an exit (KVM_HYPERV_EVENTFD)."""

    def assign(self, conn_id: int, fd: int) -> int:
        """Tie the eventfd `fd` to `conn_id`: 0 or -errno (S41)."""

    def deassign(self, conn_id: int) -> int:
        """Untie it: 0 or -errno. Must come before the eventfd is closed (S43)."""


class Synic(Protocol):
    """A whole VM's SynIC."""

    @property
    def signal_path(self) -> SignalPath | None:
        """None where HvSignalEvent always comes to user space."""

    @property
    def signal_path_missing(self) -> str:
        """Why `signal_path` is None and what would help, in one line."""

    def vp(self, vp_index: int) -> SynicVp | None:
        """The VP with that index, or None: no such VP, or one without SynIC (S1, S10). Any thread."""

    def open_line(self, vp_index: int, sint: int, *, acks: bool) -> SintLine:
        """The line of (vp, sint), both checked by the caller. One at a time for each pair (S12).

        Raises OSError or HvkvmError; then nothing stays behind (S14). Any thread.
        """

    def activate(self) -> None:
        """Switch the SynIC on for every VP and bind lines that were opened before (S16). Main thread."""

    def reset(self) -> None:
        """Zero and unplace every page, enables off, MSRs to their reset values (S7).

        Every vCPU is outside KVM_RUN meanwhile; the caller sees to that.
        """

    def close(self) -> None:
        """Free the pages. Lines are closed before, vCPUs stopped. Idempotent."""
