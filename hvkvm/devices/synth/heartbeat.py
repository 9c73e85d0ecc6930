"""Heartbeat: asks the guest every two seconds whether it lives.

Owner: the I/O loop.
"""

from __future__ import annotations

from hvkvm.abi import ic, vmbus
from hvkvm.devices.synth.ic import CallLater, IntegrationComponent, TimerLike

INTERVAL = 2.0
"""Seconds between two heartbeats."""


class Heartbeat(IntegrationComponent):
    """`beats` counts answers, `missed` how many intervals the last question has gone unanswered."""

    NAME = "heartbeat"
    INTERFACE = vmbus.HV_HEART_BEAT_GUID
    MESSAGE_VERSIONS = ((1, 0), (3, 0))

    def __init__(self, call_later: CallLater) -> None:
        super().__init__()
        self._call_later = call_later
        self._timer: TimerLike | None = None
        self._asked = 0
        self.beats = 0
        self.missed = 0

    @property
    def alive(self) -> bool:
        """Whether a driver is there and answered the last time."""
        return self.ready_for_requests and self.beats > 0 and self.missed < 2

    def negotiated(self) -> None:
        """Begin to ask."""
        self._asked = self.beats = 0
        self._beat()

    def _beat(self) -> None:
        if self._asked == self.beats:
            self.missed = 0
            self._asked += 1
            self.ask(ic.ICMSGTYPE_HEARTBEAT, ic.heartbeat_msg_data.pack(self._asked), self._answered)
        else:
            self.missed += 1
        self._timer = self._call_later(INTERVAL, self._beat)

    def _answered(self, status: int, _body: bytes) -> None:
        if status == ic.HV_S_OK:
            self.beats = self._asked
            self.missed = 0

    def left(self) -> None:
        """Stop asking."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
