"""How a guest opens a channel: what an OPENCHANNEL may ask for, and the signals that an open channel has.

Why: by the connection's version, a channel's doorbell and event flag are the bus's
only ones (0.13), the channel's own, or the guest's choice (6.0). A restore holds a
saved channel to the same rules.

Owner: `channels.Channels`, and so the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hvkvm.abi import vmbus
from hvkvm.abi.vmbus_messages import Message
from hvkvm.vmbus.actions import OpenChannel
from hvkvm.vmbus.gpadl import GpadlTable
from hvkvm.vmbus.offer import Channel, ChannelState

MIN_RING_PAGES = 2
"""A control page and one of data."""


class Opening:
    """The rules for the channels `every` of one host, whose guest's GPADLs are in `gpadls`."""

    def __init__(self, every: Sequence[Channel], gpadls: GpadlTable, vp_count: int) -> None:
        self.version = 0
        """The connection's."""
        self.guest_signals = False
        """Whether the guest chooses connection ids and event flags when it opens (6.0)."""
        self._every = every
        self._gpadls = gpadls
        self._vp_count = vp_count

    def number(self, channel: Channel, relid: int) -> None:
        """Give a channel its relid, and the signals that go with it: see `interrupt_page` for old guests."""
        channel.relid = relid
        channel.event_flag = 0 if self.version < vmbus.VERSION_WIN8 else relid
        channel.connection_id = (
            vmbus.VMBUS_EVENT_CONNECTION_ID if self.version < vmbus.VERSION_WIN7 else _own_id(relid)
        )

    def valid_target(self, vp_index: int) -> bool:
        """Whether a channel may interrupt this VP, or asks for no interrupts."""
        return vp_index < self._vp_count or vp_index == vmbus.VP_INVALID

    def why_not(self, channel: Channel | None, message: Message) -> str:
        """Why an OPENCHANNEL cannot be granted; empty if it can."""
        if channel is None:
            return "no such channel"
        if channel.withdrawn or channel.state is not ChannelState.OFFERED:
            return f"the channel is {channel.state.value}{' and withdrawn' * channel.withdrawn}"
        pages = self._ring_pages(channel, message)
        if pages is None:
            return f"GPADL {message['ring_gpadl']:#x} is no whole pages of this channel"
        if not MIN_RING_PAGES <= message["downstream_page_offset"] <= len(pages) - MIN_RING_PAGES:
            return f"ring split at page {message['downstream_page_offset']} of {len(pages)}"
        if not self.valid_target(self._target(message)):
            return f"no VP {message['target_vp']}"
        if self.guest_signals and "connection_id" in message.values:
            return self._why_not_signals(channel, message["connection_id"], message["event_flag"])
        return ""

    def request(self, channel: Channel, message: Message) -> OpenChannel:
        """Note in `channel` how it is opened, which `why_not` has granted; what its device is to be told."""
        channel.openid = message["openid"]
        channel.ring_gpadl = message["ring_gpadl"]
        channel.split = message["downstream_page_offset"]
        channel.target_vp = self._target(message)
        self.number(channel, channel.relid)
        if self.guest_signals and "connection_id" in message.values:
            channel.connection_id = message["connection_id"] or channel.connection_id
            channel.event_flag = message["event_flag"]
        return OpenChannel(
            channel,
            self._ring_pages(channel, message) or array("Q"),
            channel.split,
            channel.target_vp,
            channel.connection_id,
            channel.event_flag,
            message["userdata"],
        )

    def _ring_pages(self, channel: Channel, message: Message) -> array[int] | None:
        gpadl = self._gpadls.get(channel.relid, message["ring_gpadl"])
        return gpadl.ring_pages() if gpadl is not None else None

    def _why_not_signals(self, channel: Channel, connection_id: int, event_flag: int) -> str:
        if event_flag > vmbus.MAX_RELID:
            return f"event flag {event_flag}"
        if not connection_id:
            return ""
        # The ids that we give are reserved for their channels, also those that are not offered or open yet.
        of_another = _own_id(0) <= connection_id <= _own_id(vmbus.MAX_RELID)
        of_another = of_another and connection_id != _own_id(channel.relid)
        taken = any(c is not channel and c.in_use and c.connection_id == connection_id for c in self._every)
        low = connection_id <= vmbus.VMBUS_MESSAGE_CONNECTION_ID_4
        if low or connection_id >> 24 or of_another or taken:
            return f"connection id {connection_id:#x} is not the guest's to choose"
        return ""

    def _target(self, message: Message) -> int:
        """The VP that an OPENCHANNEL names; before 2.4 it names none, and the boot VP is meant."""
        target: int = message["target_vp"]
        return 0 if self.version < vmbus.VERSION_WIN8 else target


def _own_id(relid: int) -> int:
    """The doorbell that a channel has of us."""
    return vmbus.CHANNEL_CONNECTION_ID_BASE | relid
