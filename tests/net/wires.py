"""A wire whose other end is the test: what was sent is kept, and what the test says arrives."""

from __future__ import annotations

from hvkvm.net.base import BasePort


class TestWire(BasePort):
    """`room` frames are taken at most; without end where None."""

    __test__ = False
    kind = "test"

    def __init__(self, loop, *, room=None, **options):
        super().__init__(loop, 9000, **options)
        self.room = room
        self.sent = []
        self.closed = False

    def arrive(self, frames):
        """On the loop."""
        self._deliver(frames)

    def writable(self, room):
        """On the loop: there is room for so many."""
        self.room = room
        self._writable()

    def _transmit(self, frames, _queue):
        taken = len(frames) if self.room is None else min(self.room, len(frames))
        if self.room is not None:
            self.room -= taken
        self.sent += [(bytes(frame[0]), b"".join(frame[1:])) for frame in frames[:taken]]
        return taken

    def _read_on(self):
        pass

    def _read_off(self):
        pass

    def close(self):
        self.closed = True
