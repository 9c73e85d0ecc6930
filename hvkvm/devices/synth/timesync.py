"""Time: tells the guest the host's clock, to set it once and to follow it afterwards.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import time_ns

from hvkvm.abi import ic, vmbus
from hvkvm.devices.synth.ic import IcState, IntegrationComponent, Reply, Wanted
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.vmbus.channel_io import ChannelIo

INTERVAL = 5.0
"""Seconds between two samples; Linux's PTP clock takes one older than 600 s for stale."""


def host_time() -> int:
    """The host's clock in 100 ns units since 1601, UTC."""
    return time_ns() // 100 + ic.WLTIMEDELTA


class TimeSync(IntegrationComponent):
    """`reference()` is the partition's reference counter (HV_X64_MSR_TIME_REF_COUNT), in 100 ns."""

    NAME = "timesync"
    INTERFACE = vmbus.HV_TS_GUID
    MESSAGE_VERSIONS = ((1, 0), (3, 0), (4, 0))

    def __init__(
        self,
        call_later: CallLater,
        reference: Callable[[], int],
        clock: Callable[[], int] = host_time,
    ) -> None:
        super().__init__()
        self._call_later = call_later
        self._reference = reference
        self._clock = clock
        self._timer: TimerHandle | None = None
        self.sent = {"sync": 0, "sample": 0}
        """How often the guest was told the time, to set its clock and to follow it."""

    def negotiated(self) -> None:
        """Set the guest's clock, then send samples."""
        self.sync()
        self._timer = self._call_later(INTERVAL, self.guard.run, self._sample)

    def load(self, io: ChannelIo | None, state: IcState) -> None:
        """See `vmbus.device.SavedDevice`: the guest has slept, so its clock is set as it goes on."""
        self.load_frame(io, state)
        if self.ready_for_requests:
            self.negotiated()

    def sync(self, reply: Reply | None = None, wanted: Wanted | None = None) -> bool:
        """Have the guest set its clock to the host's now.

        False when no driver is there, or too many requests wait for it. `wanted` as in `ask`.
        """
        return self._tell(ic.ICTIMESYNCFLAG_SYNC, reply, wanted)

    def _sample(self) -> None:
        self._tell(ic.ICTIMESYNCFLAG_SAMPLE)
        self._timer = self._call_later(INTERVAL, self.guard.run, self._sample)

    def _tell(self, flags: int, reply: Reply | None = None, wanted: Wanted | None = None) -> bool:
        if self._sent is not None and flags == ic.ICTIMESYNCFLAG_SAMPLE:
            return False  # a time that waits is wrong when it goes
        # Made when it is sent: before 4.0 the guest takes it for the time at which it comes.
        asked = self.ask(ic.ICMSGTYPE_TIMESYNC, partial(self._now, flags), reply, wanted)
        self.sent["sync" if flags == ic.ICTIMESYNCFLAG_SYNC else "sample"] += asked
        return asked

    def _now(self, flags: int) -> bytes:
        if self.message_version is not None and self.message_version >= (4, 0):
            return ic.ictimesync_ref_data.pack(self._clock(), self._reference(), flags, 0, 1)
        return ic.ictimesync_data.pack(self._clock(), 0, 0, flags)

    def left(self) -> None:
        """Send no more."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
