"""What the control plane asks of its host: values that `Server.take()` hands out, in order.

Why: the server does no I/O, so that the same code runs against a guest, against
the loopback client and under a state machine of random messages. Order is the
contract: whoever carries actions out does so one after the other. So a
`CloseChannel` ahead of a `SendMessage` has stopped the device's use of the ring
before the guest can read that its pages are its own again.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.vmbus.offer import Channel


class SendMessage(NamedTuple):
    """Post `payload` to SINT `sint` of VP `vp_index`, behind all earlier ones."""

    vp_index: int
    sint: int
    payload: bytes


class DropMessages(NamedTuple):
    """Forget the messages that were not delivered yet, and the interrupt page: their connection is over."""


class SharePage(NamedTuple):
    """A guest of version 0.13 or 1.1 contacts: use the interrupt page at `gpa` until the next `DropMessages`.

    Then call `Server.shared(self, status)`.
    """

    gpa: int
    version: int


class OpenChannel(NamedTuple):
    """Start the device on these rings, then call `Server.opened(channel, status)`.

    `pages` are PFNs of guest RAM: the guest-to-host ring is `pages[:split]`, the
    other one `pages[split:]`. Interrupts go to `target_vp` (VP_INVALID: none) by
    event flag `event_flag`, the guest's doorbell is `connection_id`; VMBUS_EVENT_CONNECTION_ID is the one of
    the interrupt page.
    """

    channel: Channel
    pages: array[int]
    split: int
    target_vp: int
    connection_id: int
    event_flag: int
    userdata: bytes


class CloseChannel(NamedTuple):
    """Stop the device's use of rings and GPADLs, then call `Server.closed(channel)`; at once or later."""

    channel: Channel


class RetargetChannel(NamedTuple):
    """Interrupt `target_vp` from now on, or as before; then call `Server.retargeted(self, status)`."""

    channel: Channel
    relid: int
    target_vp: int
    answers: bool
    """Whether the guest is told; `Server.retargeted` knows."""


class ReleaseGpadl(NamedTuple):
    """Stop using this GPADL of an open channel, then call `Server.gpadl_released(channel, gpadl_id)`."""

    channel: Channel
    gpadl_id: int


class ForgetChannel(NamedTuple):
    """This channel is gone for good, with the device behind it."""

    channel: Channel


class TlConnect(NamedTuple):
    """A guest program connects to a hvsock service: offer a channel, or `Server.refuse_connect(self)`."""

    endpoint_id: bytes
    service_id: bytes
    silo_id: bytes


Action = (
    SendMessage
    | DropMessages
    | SharePage
    | OpenChannel
    | CloseChannel
    | RetargetChannel
    | ReleaseGpadl
    | ForgetChannel
    | TlConnect
)
