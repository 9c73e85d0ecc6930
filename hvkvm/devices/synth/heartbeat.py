"""Heartbeat: asks the guest every two seconds whether it lives.

Owner: the I/O loop.
"""

from __future__ import annotations

from hvkvm.abi import ic, vmbus
from hvkvm.devices.synth.ic import IcState, IntegrationComponent
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo

INTERVAL = 2.0
"""Seconds between two heartbeats."""

_MOST = (1 << 63) - 1


class HeartbeatState(NamedTuple):
    """The counts."""

    frame: IcState
    asked: int
    beats: int
    missed: int


class Heartbeat(IntegrationComponent):
    """`beats` counts good answers, `missed` the intervals since without one.

    A guest that answers badly is asked again; one that does not answer has its question still.
    """

    NAME = "heartbeat"
    INTERFACE = vmbus.HV_HEART_BEAT_GUID
    MESSAGE_VERSIONS = ((1, 0), (3, 0))
    State = HeartbeatState

    def __init__(self, call_later: CallLater) -> None:
        super().__init__()
        self._call_later = call_later
        self._timer: TimerHandle | None = None
        self._asked = 0
        self._unanswered = False
        self.beats = 0
        self.missed = 0

    @property
    def alive(self) -> bool:
        """Whether a driver is there and answered the last time."""
        return self.ready_for_requests and self.beats > 0 and self.missed < 2

    def negotiated(self) -> None:
        """Begin to ask."""
        self._asked = self.beats = self.missed = 0
        self._unanswered = False
        self._beat()

    def save(self) -> HeartbeatState:
        """See `vmbus.device.SavedDevice`."""
        return HeartbeatState(self.save_frame(), self._asked, self.beats, self.missed)

    def load(self, io: ChannelIo | None, state: HeartbeatState) -> None:
        """See `vmbus.device.SavedDevice`: the next beat comes when the guest goes on."""
        self.load_frame(io, state.frame)
        if not self.ready_for_requests:
            return
        self._asked, self.beats, self.missed = state.asked & _MOST, max(0, state.beats), max(0, state.missed)
        self._timer = self._call_later(INTERVAL, self.guard.run, self._beat)

    def _beat(self) -> None:
        if self._unanswered:
            self.missed += 1
        else:
            self._asked += 1
            body = ic.heartbeat_msg_data.pack(self._asked)
            self._unanswered = True
            if not self.ask(ic.ICMSGTYPE_HEARTBEAT, body, self._answered):
                self._unanswered = False
        self._timer = self._call_later(INTERVAL, self.guard.run, self._beat)

    def _answered(self, status: int, _body: bytes) -> None:
        self._unanswered = False
        if status == ic.HV_S_OK:
            self.beats += 1
            self.missed = 0
        else:
            self.missed += 1

    def left(self) -> None:
        """Stop asking."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
