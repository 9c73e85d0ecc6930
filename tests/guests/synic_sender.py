"""A device's side of one SINT, for `synic_recorder`. Owner: the I/O loop, but for `send`."""

from __future__ import annotations

from collections import deque

from guest_machine import Guest


class Sender:
    """A device on one SINT: one message after the other."""

    def __init__(self, guest: Guest, vp: int, sint: int) -> None:
        self._io = guest.machine.platform.io
        self.route = guest.partition.open_route(vp, sint, self._complete)
        self._queue: deque[tuple[int, bytes]] = deque()
        self._under_way = False
        self.sent = 0
        self.failed: tuple[int, ...] = ()

    def send(self, message_type: int, payload: bytes) -> None:
        """Queue a message; the I/O loop sends it."""
        self._io.call_soon(self._add, (message_type, payload))

    def _add(self, message: tuple[int, bytes]) -> None:
        self._queue.append(message)
        self._next()

    def _next(self) -> None:
        if not self._under_way and self._queue:
            self._under_way = self.route.post(*self._queue[0]) == 0

    def _complete(self, status: int) -> None:
        self._under_way = False
        self._queue.popleft()
        if status == 0:
            self.sent += 1
        else:
            self.failed += (status,)
        self._next()
