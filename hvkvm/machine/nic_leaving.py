"""Takes a NIC from its guest gently: first its cable, and the device once the guest sends no more.

Why: when a device is rescinded, Linux waits for every packet that it has sent to be completed, without end
(`rndis_filter_halt_device`), and holds the lock meanwhile that whoever configures its network takes. So what
the guest has sent is completed, as if the wire had lost it, and until it hears of the rescind it must send
nothing more: one that is told that its link is down does not. Linux heeds that at once, but no sooner than
two seconds (LINKCHANGE_INT) after it heard of a link before; nothing tells us that it has. A guest that still
sends is left after LEAVE_SECONDS, and what comes later is not completed.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.devices.synth.netvsp import Netvsp
    from hvkvm.runtime.protocols import Delayer

LOOK_SECONDS = 0.01
QUIET_LOOKS = 5
"""So many looks in a row that find nothing, and the guest sends no more."""

HEED_SECONDS = 0.2
"""So long after it is told, the guest has heeded it, or will when AGAIN_SECONDS have passed."""

AGAIN_SECONDS = 2.5
"""So long after the guest heard of a link before, it has: LINKCHANGE_INT, and a little."""

LEAVE_SECONDS = 5.0


class Leaving:
    """`begin` once; `left()` when `device`, whose wire is stopped, may be rescinded, now or later."""

    def __init__(self, device: Netvsp, io: Delayer, left: Callable[[], object]) -> None:
        self._device = device
        self._io = io
        self._left = left
        self._quiet = 0
        now = monotonic()
        self._heeded = max(now + HEED_SECONDS, device.link_told + AGAIN_SECONDS)
        self._end = now + LEAVE_SECONDS

    def begin(self) -> None:
        """Pull the cable, and look after what the guest sends."""
        self._device.link(False)
        self._look()

    def _look(self) -> None:
        self._quiet += 1
        self._device.guard.run(self._finish)
        now = monotonic()
        sends = self._quiet < QUIET_LOOKS or now < self._heeded
        if self._device.in_use and sends and now < self._end:
            self._io.call_later(LOOK_SECONDS, self._look)
        else:
            self._left()

    def _finish(self) -> None:
        if self._device.finish():
            self._quiet = 0
