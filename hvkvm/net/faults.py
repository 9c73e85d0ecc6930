"""A wire that loses, damages, doubles, delays and reorders frames, and whose link flaps: by a seed.

What happens to the n-th frame of a direction depends on the seed and n alone. Frames are held back in a
bounded queue; one that finds it full is lost, as in a switch. The NIC is offered no offloads, since a damaged
frame must not be given a checksum that is right.

Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from random import Random
from time import monotonic
from typing import Any

from hvkvm.abi.virtio_net_hdr import PLAIN, parse
from hvkvm.net.base import TURN_FRAMES
from hvkvm.net.between import Between
from hvkvm.net.port import NO_OFFLOADS, Frame, Offloads
from hvkvm.net.segment import MAX_SEGMENTS, finish
from hvkvm.net.wire import Wire
from hvkvm.runtime.protocols import Loop
from hvkvm.tuples import NamedTuple

MAX_HELD = 1024
"""Frames of a direction that are on their way."""
DOWN_SECONDS = 0.2
"""How long a flap takes."""
REORDER_SECONDS = 0.005
"""How much later than it would a frame comes that others shall pass."""


class Faults(NamedTuple):
    """Shares from 0 to 1, and seconds. `flap` is the mean time between flaps of the link; 0: none."""

    loss: float = 0.0
    corrupt: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0
    flap: float = 0.0
    seed: int = 0


class Direction:
    """One way of a faulty wire: `give(frames)` takes what has arrived, and says how many it took."""

    def __init__(self, io: Loop, faults: Faults, name: str, give: Callable[[Sequence[Frame]], int]) -> None:
        self._io = io
        self._faults = faults
        self._random = Random(f"{faults.seed} {name}")
        self._give = give
        self._held: list[tuple[float, int, bytes]] = []
        self._number = 0
        self._timer: Any = None
        self._due = 0.0  # when the timer comes
        self._full = False
        self.running = False
        self.counts = dict.fromkeys(("lost", "corrupted", "duplicated", "reordered", "overrun"), 0)

    def take(self, frames: Sequence[Frame]) -> int:
        """Have `frames` meet their fate; how many of them, since to cut many is too much for a turn."""
        cut = taken = 0
        for frame in frames:
            if cut > MAX_SEGMENTS:
                break
            taken += 1
            data = b"".join(frame[1:])
            # No offload is offered, but a guest that was restored may have been offered some before.
            if frame[0] == PLAIN:
                self._decide(data)
                continue
            for whole in finish(parse(frame[0]), data):
                cut += 1
                self._decide(whole)
        self._arm()
        return taken

    def _decide(self, data: bytes) -> None:
        faults, draw, counts = self._faults, self._random.random, self.counts
        # As many numbers are drawn for each frame, whatever becomes of it.
        lost, corrupted, doubled, passed, spread, where = [draw() for _ in range(6)]
        if lost < faults.loss:
            counts["lost"] += 1
            return
        if corrupted < faults.corrupt and data:
            counts["corrupted"] += 1
            bit = int(where * len(data) * 8)
            made = bytearray(data)
            made[bit // 8] ^= 1 << bit % 8
            data = bytes(made)
        due = monotonic() + faults.delay + faults.jitter * spread
        if passed < faults.reorder:
            counts["reordered"] += 1
            due += REORDER_SECONDS
        self._hold(due, data)
        if doubled < faults.duplicate:
            counts["duplicated"] += 1
            self._hold(due, data)

    def _hold(self, due: float, data: bytes) -> None:
        if len(self._held) >= MAX_HELD:
            self.counts["overrun"] += 1
            return
        self._number += 1
        heapq.heappush(self._held, (due, self._number, data))

    def _arm(self) -> None:
        if not self._held or self._full or not self.running:
            return
        due = self._held[0][0]
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()  # what came last passes those before it
        self._due = due
        self._timer = self._io.call_later(max(0.0, due - monotonic()), self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        now = monotonic()
        due: list[tuple[float, int, bytes]] = []
        while self._held and self._held[0][0] <= now and len(due) < TURN_FRAMES:
            due.append(heapq.heappop(self._held))
        frames = [(memoryview(PLAIN), memoryview(data)) for _due, _number, data in due]
        taken = self._give(frames) if frames else 0
        for entry in due[taken:]:
            self._full = True
            heapq.heappush(self._held, entry)
        self._arm()

    def go_on(self) -> None:
        """There is room again, or the machine goes on."""
        self._full = False
        self._arm()

    def stop(self) -> None:
        """Let nothing arrive."""
        self.running = False
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


class FaultyWire(Between):
    """`below` with `faults`, both ways."""

    def __init__(self, io: Loop, below: Wire, faults: Faults) -> None:
        super().__init__(below)
        self.offloads = NO_OFFLOADS
        self.faults = faults
        self._io = io
        self._out = Direction(io, faults, "out", below.send)
        self._in = Direction(io, faults, "in", super().frames)
        self._random = Random(f"{faults.seed} link")
        self._flapper: Any = None
        self._plugged = True
        self.flaps = 0

    def start(self) -> None:
        """See `Port.start`."""
        super().plug(self._plugged)  # a flap may have been under way
        for way in (self._out, self._in):
            way.running = True
            self._io.call_soon(way.go_on)
        if self.faults.flap and self._flapper is None:
            self._io.call_soon(self._next_flap, self._random.expovariate(1 / self.faults.flap))
        super().start()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Port.stop`."""
        self._quiet()
        super().stop(done)

    def close(self) -> None:
        """See `Port.close`."""
        self._quiet()
        super().close()

    def send(self, frames: Sequence[Frame], queue: int = 0) -> int:
        """See `Port.send`: one queue for all. What finds no room further on is held, or lost."""
        taken = self._out.take(frames)
        if taken < len(frames):
            self._io.call_soon(super().writable)
        return taken

    def frames(self, frames: Sequence[Frame]) -> int:
        """See `Receiver.frames`."""
        taken = self._in.take(frames)
        if taken < len(frames):
            self._io.call_soon(self.below.resume)
        return taken

    def resume(self) -> None:
        """See `Port.resume`."""
        self._io.call_soon(self._in.go_on)

    def writable(self) -> None:
        """See `Receiver.writable`."""
        self._out.go_on()

    def set_offloads(self, wanted: Offloads) -> None:
        """See `Port.set_offloads`: there are none."""

    def plug(self, plugged: bool) -> None:
        """See `Wire`."""
        self._plugged = plugged
        super().plug(plugged)

    def inspect(self) -> Mapping[str, object]:
        """See `Port.inspect`."""
        faults = {
            f"{name}_{way}": count
            for way, direction in (("out", self._out), ("in", self._in))
            for name, count in direction.counts.items()
        }
        return {**super().inspect(), **faults, "flaps": self.flaps}

    def _next_flap(self, seconds: float) -> None:
        if self._out.running:
            self._flapper = self._io.call_later(seconds, self._down)

    def _down(self) -> None:
        self.flaps += 1
        super().plug(False)
        self._flapper = self._io.call_later(DOWN_SECONDS, self._up)

    def _up(self) -> None:
        super().plug(self._plugged)
        self._next_flap(self._random.expovariate(1 / self.faults.flap))

    def _quiet(self) -> None:
        for way in (self._out, self._in):
            way.stop()
        flapper, self._flapper = self._flapper, None
        if flapper is not None:
            flapper.cancel()
