"""The guest's messages on their way to the host: taken on vCPU threads, looked at on the I/O loop.

The queue is bounded: while the guest does not take what we send, what it sends is
left waiting, and then refused (S50). A new INITIATE_CONTACT always gets through,
since it makes all older messages moot.

Owner: `host.VmbusHost`. `post` may be called from any vCPU's thread; all else comes
on the I/O loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import HVMSG_VMBUS, hv_post_message_input
from hvkvm.abi.tlfs import HvStatus

MAX_INBOX = 256
"""Messages of the guest that may wait; Linux has a handful under way."""

_SUCCESS = int(HvStatus.SUCCESS)
_MALFORMED = int(HvStatus.INVALID_HYPERCALL_INPUT)
_FULL = int(HvStatus.INSUFFICIENT_BUFFERS)


class Inbox:
    """`wake()` has the I/O loop look into it; called once until `take` has found nothing."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._lock = threading.Lock()  # both of these
        self._messages: deque[wire.Message] = deque()
        self._scheduled = False

    def post(self, message: hv_post_message_input) -> int:
        """HvPostMessage: 3 malformed, 19 too many wait, else 0 and the rest later (S50)."""
        if message.message_type != HVMSG_VMBUS:
            return _MALFORMED
        parsed = wire.parse(bytes(message.payload)[: message.payload_size])
        if parsed is None:
            return _MALFORMED
        kind = parsed.kind.type
        with self._lock:
            # What is before a contact belongs to a connection that ends with it; an UNLOAD that finds
            # the queue full may come from a crashing kernel, which has little patience.
            if kind == wire.INITIATE_CONTACT:
                self._messages.clear()
            elif len(self._messages) >= MAX_INBOX:
                if kind != wire.UNLOAD:
                    return _FULL
                self._messages.clear()
            self._messages.append(parsed)
            if self._scheduled:
                return _SUCCESS
            self._scheduled = True
        self._wake()
        return _SUCCESS

    def take(self, *, crowded: bool, held: bool) -> wire.Message | None:
        """The next one; None while `held`, or while our answers are `crowded` and it is no new contact.

        After None, `resume` or the next message calls `wake` again.
        """
        with self._lock:
            waiting = crowded and (not self._messages or self._messages[0].kind.type != wire.INITIATE_CONTACT)
            if held or waiting or not self._messages:
                self._scheduled = False
                return None
            return self._messages.popleft()

    def resume(self) -> None:
        """What kept messages waiting may be over."""
        with self._lock:
            if self._scheduled or not self._messages:
                return
            self._scheduled = True
        self._wake()

    def clear(self) -> None:
        """Forget all of them: their guest is gone."""
        with self._lock:
            self._messages.clear()

    def save(self) -> tuple[bytes, ...]:
        """Their payloads."""
        with self._lock:
            return tuple(message.payload for message in self._messages)

    def load(self, payloads: Iterable[bytes]) -> None:
        """Take saved ones, at most MAX_INBOX. ValueError for what is no message."""
        for _, payload in zip(range(MAX_INBOX), payloads, strict=False):
            message = wire.parse(payload)
            if message is None:
                raise ValueError("a message of the guest that waits is none")
            self._messages.append(message)

    def __len__(self) -> int:
        return len(self._messages)
