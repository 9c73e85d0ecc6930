"""The host's messages on their way to the guest: one at a time, in order, for they share one slot.

A message leaves the outbox when the guest has it. Until then it is plain bytes, so
that a machine may be saved, or its guest gone, at any moment. What cannot be given
now (the message page is off, the host has no more files) keeps its place.

A message whose slot is taken waits for the EOM of its VP. Once in a while it is tried
without one: a Linux that crashes empties the slots of all VPs, and writes EOM on the VP
that it crashed on, which may be another.

Owner: `host.VmbusHost`, on the I/O loop.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from hvkvm.abi.hv_synic import HVMSG_VMBUS
from hvkvm.errors import RouteError, Stopped
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.vmbus.actions import SendMessage
from hvkvm.vmbus.open_channel import Route, SynicUser
from hvkvm.vmbus.report import Reports

MAX_OUTBOX = 64
"""While so many wait for the guest, no more of its requests are looked at."""

RETRY_SECONDS = 0.01
MOST_RETRY_SECONDS = 0.5
"""Between two tries to give the guest a message that cannot be given now; each wait is twice the last."""

LOOK_SECONDS = 1.0
"""Between two looks whether the slot of a message is free, though no EOM has said so."""


class Outbox:
    """`on_room()` hears of room. Completions come on the I/O loop, never within a call of ours."""

    def __init__(
        self,
        synic: SynicUser,
        call_later: CallLater,
        reports: Reports,
        on_room: Callable[[], object],
    ) -> None:
        self._synic = synic
        self._call_later = call_later
        self._reports = reports
        self._on_room = on_room
        self._messages: deque[SendMessage] = deque()
        self._route: Route | None = None
        self._route_target = (0, 0)
        self._route_number = 0
        self._in_flight = False
        self._look: TimerHandle | None = None  # while a message is in flight
        self._retry: TimerHandle | None = None
        self._retry_seconds = RETRY_SECONDS
        self.held = False
        """The machine is at rest: nothing is sent."""

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[SendMessage]:
        return iter(self._messages)

    @property
    def full(self) -> bool:
        """Whether the guest should take some of it first."""
        return len(self._messages) >= MAX_OUTBOX

    def append(self, message: SendMessage) -> None:
        """Behind the others; `pump` sends it."""
        self._messages.append(message)

    def pump(self) -> None:
        """Send what can be sent."""
        if self.held:
            return
        while self._messages and not self._in_flight and self._retry is None:
            message = self._messages[0]
            target = (message.vp_index, message.sint)
            if self._route is None or self._route_target != target:
                self._drop_route()
                on_complete = partial(self._completed, self._route_number)
                try:
                    self._route = self._synic.open_route(*target, on_complete)
                except RouteError as error:  # the target was checked: the host is short of something
                    self._try_again_later(str(error))
                    break
                self._route_target = target
            status = self._route.post(HVMSG_VMBUS, message.payload)
            if status:  # closed under us: what it was for is over
                self._reports.add("message dropped", os.strerror(-status))
                self._drop_route()
                self._messages.popleft()
                continue
            self._in_flight = True
            self._look_later()
        if not self.full:
            self._on_room()

    def _completed(self, number: int, status: int) -> None:
        """The guest has the message, or never will."""
        if number != self._route_number:
            return  # of a route that was given up meanwhile
        self._landed()
        if status == -errno.ENXIO:  # as the TLFS has it, what is posted waits for the guest's message page
            self._try_again_later("the guest's message page is off")
            return
        self._retry_seconds = RETRY_SECONDS
        self._messages.popleft()
        if status:
            self._reports.add("message dropped", os.strerror(-status))
        self.pump()

    def _look_later(self) -> None:
        with suppress(Stopped):
            self._look = self._call_later(LOOK_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        if self._route is not None and self._in_flight:
            if not self.held:
                self._route.retry()
            self._look_later()

    def _landed(self) -> None:
        """Nothing is in flight any more."""
        self._in_flight = False
        look, self._look = self._look, None
        if look is not None:
            look.cancel()

    def _try_again_later(self, why: str) -> None:
        """The message at the front cannot be given now. It keeps its place, and the outbox its bound."""
        self._reports.add("message waits", why)
        seconds = self._retry_seconds
        self._retry_seconds = min(2 * seconds, MOST_RETRY_SECONDS)
        try:
            self._retry = self._call_later(seconds, self._try_again)
        except Stopped:
            return

    def _try_again(self) -> None:
        self._retry = None
        self.pump()

    def clear(self) -> None:
        """Forget what the guest has not taken: it was of a connection that is over."""
        self._messages.clear()
        self._drop_route()
        self._retry_seconds = RETRY_SECONDS
        retry, self._retry = self._retry, None
        if retry is not None:
            retry.cancel()

    def _drop_route(self) -> None:
        """Give up the route and the message under way: a new kernel owes no EOM for an old message."""
        route, self._route = self._route, None
        self._route_number += 1
        self._landed()
        if route is not None:
            route.close()
