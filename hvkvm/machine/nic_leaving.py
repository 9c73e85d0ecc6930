"""Takes a NIC from its guest gently: first its cable, and the device once the guest sends no more.

Why: when a device is rescinded, Linux waits for every packet that it has sent to be completed, without end
(`rndis_filter_halt_device`), and holds the lock meanwhile that whoever configures its network takes. So what
the guest has sent is completed, as if the wire had lost it, and until it hears of the rescind it must send
nothing more: one that is told that its link is down does not. Linux heeds that at once, but no sooner than
two seconds (LINKCHANGE_INT) after it heard of a link before; that it has heard it says by giving the
indication back, that it has heeded it by nothing. A guest that still sends is left after LEAVE_SECONDS, and
what comes later is not completed.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.devices.synth.netvsp import Netvsp
    from hvkvm.runtime.protocols import Delayer, TimerHandle

LOOK_SECONDS = 0.01
QUIET_LOOKS = 5
"""So many looks in a row by which nothing was sent, and the guest sends no more."""

HEED_SECONDS = 0.2
"""So long after it has heard it, the guest has heeded it, or will when AGAIN_SECONDS have passed."""

AGAIN_SECONDS = 2.5
"""So long after the guest heard of a link before, it has: LINKCHANGE_INT, and a little."""

LEAVE_SECONDS = 5.0


class Leaving:
    """Of `device`, whose wire is to be stopped: `begin` then, once.

    `left()` comes when it may be rescinded, and in the same turn it has to be. Not while the machine rests,
    if the guest has opened it: `rest` and `go_on` say so.
    """

    def __init__(self, device: Netvsp, io: Delayer, left: Callable[[], object], *, resting: bool) -> None:
        self.waiting: list[Callable[[], object]] = []
        """Who waits for the end."""
        self._device = device
        self._io = io
        self._left = left
        self._begun = False
        self._resting = resting
        self._timer: TimerHandle | None = None
        self._quiet = self._packets = 0
        self._heeded = self._end = 0.0

    def begin(self) -> None:
        """Pull the cable, and see what the guest sends."""
        self._begun = True
        if self._device.in_use and self._resting:
            return
        self._wait(self._device.link_heard + AGAIN_SECONDS)

    def rest(self) -> None:
        """The guest heeds nothing until `go_on`."""
        self._resting = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def go_on(self) -> None:
        """Wait anew: the guest's time may have stood still. Nothing where it did not rest."""
        if self._resting:
            self._resting = False
            if self._begun:
                self._wait(monotonic() + AGAIN_SECONDS)

    def _wait(self, heeded: float) -> None:
        self._device.unplug()
        now = monotonic()
        self._quiet, self._packets = 0, self._device.packets
        self._heeded = max(now + HEED_SECONDS, heeded)
        self._end = now + LEAVE_SECONDS
        self._look()

    def _look(self) -> None:
        device, now = self._device, monotonic()
        before, self._packets = self._packets, device.packets
        self._quiet = self._quiet + 1 if self._packets == before else 0
        if device.link_waits:
            self._heeded = max(self._heeded, now + AGAIN_SECONDS)
        elif device.telling_link:
            self._heeded = max(self._heeded, now + HEED_SECONDS)
        sends = self._quiet < QUIET_LOOKS or now < self._heeded
        if device.in_use and sends and now < self._end:
            self._timer = self._io.call_later(LOOK_SECONDS, self._look)
        else:
            self._timer = None
            device.guard.run(device.finish)
            self._left()
