"""One message on its way from a host device to a guest's slot, and its completion.

A route with a completion callback has one staging area, so it carries one
message at a time:

    FREE --post--> BUSY --attempt, slot written--> POSTED --the loop's turn--> FREE, then the callback
                   BUSY --attempt, slot taken--> PENDING --guest's EOM--> BUSY, for another attempt

BUSY waits for the VP's own thread, PENDING for the guest, POSTED for the I/O
loop. A slot that is taken is tried again at each EOM until it is free, so every accepted
post gets one callback with its final status, on the I/O loop (S23); a
cancelled one gets -ECANCELED. The area is free before the callback runs, which may post
the next message (S24). Attempts are numbered, so that work and acks of an
earlier one find that they are stale (S31).

Any thread may post. `sint_route` alone makes these.
"""

from __future__ import annotations

import enum
import errno
import threading
from collections.abc import Callable
from functools import partial

from hvkvm.errors import Stopped
from hvkvm.hyperv.synic.seam import SintLine, SynicVp
from hvkvm.runtime.protocols import Deferrer


class State(enum.Enum):
    """Where a staged message is."""

    FREE = "free"
    BUSY = "queued to the vCPU"
    PENDING = "waiting for the guest's EOM"
    POSTED = "completing"


_FREE, _BUSY, _PENDING, _POSTED = State.FREE, State.BUSY, State.PENDING, State.POSTED


class Staging:
    """The staging area of one completion user.

    `on_complete(status)` gets 0 (the message is in the slot), -ENXIO (no message
    page), -ECANCELED (reset, closed, vCPU stopped) or the -errno of the
    interrupt, or of waiting for the guest's EOM. `drop` is called once: when this is
    closed and nothing is under way, so that the line outlives the message and its
    callback (S19, S22).
    """

    __slots__ = (
        "_closed",
        "_drop",
        "_io",
        "_line",
        "_lock",
        "_message",
        "_number",
        "_on_complete",
        "_sint",
        "_state",
        "_status",
        "_vp",
        "_waiter",
    )

    def __init__(
        self,
        vp: SynicVp,
        sint: int,
        line: SintLine,
        io: Deferrer,
        on_complete: Callable[[int], None],
        drop: Callable[[], None],
    ) -> None:
        self._vp = vp
        self._sint = sint
        self._line = line
        self._io = io
        self._on_complete = on_complete
        self._drop = drop
        self._lock = threading.Lock()
        self._state = _FREE
        self._closed = False
        self._number = 0
        self._message = b""
        self._status = 0
        self._waiter: Callable[[], None] | None = None

    @property
    def state(self) -> State:
        """For tests and dumps; may be old by the time it is read."""
        return self._state

    def post(self, message: bytes) -> int:
        """Accept `message` (a whole slot): 0, or -EAGAIN while another is under way, -ENXIO when closed.

        After 0 there will be one callback; after an error none (S22).
        """
        with self._lock:
            if self._closed:
                return -errno.ENXIO
            if self._state is not _FREE:
                return -errno.EAGAIN
            self._message = message
            number = self._next_attempt()
        self._submit(number)
        return 0

    def _next_attempt(self) -> int:
        """The number of the attempt that begins. Lock held."""
        self._state = _BUSY
        self._number += 1
        return self._number

    def _submit(self, number: int) -> None:
        cancel = partial(self._cancel, number)
        try:
            self._vp.submit(partial(self._attempt, number), cancel)
        except Stopped:
            cancel()

    def _attempt(self, number: int) -> None:
        """Try to deliver the message. Where the VP's slots may be written (S25)."""
        # Held throughout: an ack that comes during the attempt must find its outcome, or it would be lost.
        with self._lock:
            if self._state is not _BUSY or number != self._number:
                return
            status = self._vp.post_message(self._sint, self._message)
            if status == 0:
                status = self._line.pulse()
            elif status == -errno.EAGAIN:
                status = self._wait_for_ack(number)
                if status == 0:
                    return
            self._state, self._status = _POSTED, status
        self._schedule(number)

    def _wait_for_ack(self, number: int) -> int:
        """Lock held. 0, or the status of a message that is not tried again, since no ack will be heard."""
        if self._closed:
            return -errno.ECANCELED
        waiter = partial(self._acked, number)
        try:
            self._line.arm_ack(waiter)
        except Stopped:  # the I/O loop is gone
            return -errno.ECANCELED
        except OSError as error:
            return -(error.errno or errno.EIO)
        self._waiter = waiter
        self._state = _PENDING
        return 0

    def _acked(self, number: int) -> None:
        """The guest may have freed the slot: try again. I/O loop."""
        with self._lock:
            if self._state is not _PENDING or number != self._number:
                return
            self._waiter = None
            number = self._next_attempt()
        self._submit(number)

    def retry(self) -> None:
        """Try again what waits for the VP's EOM, which may never come: its slot may be free all the same.

        Any thread.
        """
        with self._lock:
            if self._state is not _PENDING:
                return
            waiter, self._waiter = self._waiter, None
            if waiter is not None:
                self._line.disarm_ack(waiter)
            number = self._next_attempt()
        self._submit(number)

    def _schedule(self, number: int) -> None:
        """Have the I/O loop complete the message, which is POSTED: nobody else moves it on from there.

        Lock not held: waking the loop lets it run, and it would stop at the lock
        at once. A loop that ends first cannot run the callback, but the route
        must not be held for ever.
        """
        try:
            self._io.call_soon(self._complete, number, cancelled=self._give_up)
        except Stopped:
            self._give_up()

    def _complete(self, number: int) -> None:
        """The one callback of a post, behind which it is forgotten already (S24). I/O loop."""
        if self._state is not _POSTED or number != self._number:
            return
        status = self._status
        closed = self._free()
        try:
            self._on_complete(status)
        finally:
            if closed:
                self._drop()

    def _give_up(self) -> None:
        """There is no loop to call back on."""
        if self._free():
            self._drop()

    def _free(self) -> bool:
        """Take the next message from here on. True when the line is to be dropped, once, by the caller."""
        with self._lock:
            self._state = _FREE
            self._message = b""
            waiter, self._waiter = self._waiter, None
            closed = self._closed
        if waiter is not None:
            self._line.disarm_ack(waiter)
        return closed  # close() found a message under way, and nothing was accepted since

    def _cancel(self, number: int) -> None:
        """The message will not be delivered (or not any more): complete it. Any thread."""
        with self._lock:
            if number != self._number or self._state not in (_BUSY, _PENDING):
                return
            self._state, self._status = _POSTED, -errno.ECANCELED
        self._schedule(number)

    def close(self, *, withdraw: bool = False) -> None:
        """Take no more posts. Idempotent. Any thread.

        A message that waits for the guest is cancelled; one that waits for the
        vCPU is still delivered, unless `withdraw`: a reset must not let it reach
        the guest's next life (S31).
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            number = self._number
            idle = self._state is _FREE
            # Here and now: an ack that comes next must not begin another attempt.
            cancelled = self._state is _PENDING or (withdraw and self._state is _BUSY)
            if cancelled:
                self._state, self._status = _POSTED, -errno.ECANCELED
        if idle:
            self._drop()
        elif cancelled:
            self._schedule(number)
