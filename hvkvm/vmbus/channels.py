"""Channels of a connection: offer, rescind, open, close, move, and their GPADLs.

Why: this is where the guest's and the host's wishes cross. Every request of the
guest that has an answer gets exactly one, also for a channel that is going or
gone, since Linux waits for most of them without a time limit. An answer that
says "your memory is your own again" waits until the device has stopped.

Owner: `server.Server`, and so the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.vmbus_messages import Message
from hvkvm.vmbus.actions import (
    Action,
    CloseChannel,
    ForgetChannel,
    OpenChannel,
    ReleaseGpadl,
    RetargetChannel,
)
from hvkvm.vmbus.gpadl import Finished, GpadlTable, PageCheck
from hvkvm.vmbus.offer import Channel, ChannelState, Offer
from hvkvm.vmbus.report import Reports

MIN_RING_PAGES = 2
"""A control page and one of data."""


class Channels:
    """All channels of one host and, while a guest is connected, its view of them.

    `send(type, **fields)` queues a message to the guest, `emit(action)` an action.
    """

    def __init__(
        self,
        contains: PageCheck,
        vp_count: int,
        send: Callable[..., None],
        emit: Callable[[Action], None],
        reports: Reports,
    ) -> None:
        self.gpadls = GpadlTable(contains)
        self.all: list[Channel] = []
        self.by_relid: dict[int, Channel] = {}
        self.offering = False
        """Whether the guest has asked for offers, so that new ones are told at once."""
        self.guest_signals = False
        """Whether the guest chooses connection ids and event flags when it opens (6.0)."""
        self.version = 0
        """The connection's."""
        self._vp_count = vp_count
        self._send: Callable[..., None] = send
        self._emit = emit
        self._reports = reports
        self.last_relid = 0
        self._closing = 0  # channels in that state: a connection may end with hundreds of them

    # The host's wishes.

    def add(self, offer: Offer) -> Channel:
        """A new channel; told to the guest once it asks, or once it has released one of the same key.

        ValueError if the host itself offers the key twice, or more than relids there are.
        """
        if any(c.offer.key == offer.key and not c.withdrawn for c in self.all):
            raise ValueError(f"{offer.name}: offered already")
        if len(self.all) >= vmbus.MAX_RELID:
            raise ValueError(f"{offer.name}: a bus has at most {vmbus.MAX_RELID} channels")
        for before in [c for c in self.all if c.broken and c.offer.key == offer.key]:
            self.withdraw(before)
        channel = Channel(offer)
        self.all.append(channel)
        if self.offering:
            self.offer_hidden()
        return channel

    def withdraw(self, channel: Channel, *, broken: bool = False) -> None:
        """Rescind; sub-channels go before their primary. Idempotent.

        With `broken` a primary is offered again to the next connection, and else no more.
        """
        if channel not in self.all:
            return
        channel.broken = broken and (channel.broken or not channel.withdrawn)
        if channel.withdrawn:
            if not channel.broken and channel.state is ChannelState.HIDDEN:
                self._forget(channel)
            return
        for sub in self.subs(channel):
            self.withdraw(sub)
        channel.withdrawn = True
        if channel.state is ChannelState.HIDDEN:
            self._forget(channel)
            return
        if channel.state is ChannelState.OPENING:
            self._answer_open(channel, vmbus.STATUS_NO_SUCH_DEVICE)
        self.stop(channel)
        if self.offering:  # else the guest that knew it is leaving, and the next must not be told
            self._send(wire.RESCIND_CHANNELOFFER, relid=channel.relid)

    def subs(self, channel: Channel) -> list[Channel]:
        """The sub-channels of a primary channel, those included that are going."""
        if channel.offer.sub_channel_index:
            return []
        key = channel.offer.key[:2]
        return [c for c in self.all if c.offer.sub_channel_index and c.offer.key[:2] == key]

    def primary(self, channel: Channel) -> Channel:
        """The primary of a sub-channel; `channel` if it is one, or has none any more."""
        key = (*channel.offer.key[:2], 0)
        return next((c for c in self.all if c.offer.key == key and not c.withdrawn), channel)

    def offer_hidden(self) -> None:
        """Tell the guest every channel that it may know and does not."""
        going = {c.offer.key for c in self.all if c.withdrawn}
        for channel in self.all:
            if channel.state is not ChannelState.HIDDEN or channel.withdrawn or channel.offer.key in going:
                continue
            relid = self._free_relid()
            if relid is None:
                return
            self.number(channel, relid)
            channel.released = False
            channel.state = ChannelState.OFFERED
            self.by_relid[relid] = channel
            self._send(channel.offer_message())

    def number(self, channel: Channel, relid: int) -> None:
        """Give a channel its relid, and the signals that go with it: see `interrupt_page` for old guests."""
        channel.relid = relid
        channel.event_flag = 0 if self.version < vmbus.VERSION_WIN8 else relid
        own = vmbus.CHANNEL_CONNECTION_ID_BASE | relid
        channel.connection_id = vmbus.VMBUS_EVENT_CONNECTION_ID if self.version < vmbus.VERSION_WIN7 else own

    def _free_relid(self) -> int | None:
        """The next free relid, round robin: an old one comes back as late as possible."""
        for step in range(1, vmbus.MAX_RELID + 1):
            relid = (self.last_relid + step - 1) % vmbus.MAX_RELID + 1
            if relid not in self.by_relid:
                self.last_relid = relid
                return relid
        return None

    def opened(self, channel: Channel, status: int) -> None:
        """The device has started (status 0) or not. Ignored if the channel was closed meanwhile."""
        if channel.state is not ChannelState.OPENING:
            return
        channel.state = ChannelState.OFFERED if status else ChannelState.OPEN
        self._answer_open(channel, status)

    def closed(self, channel: Channel) -> None:
        """The device has stopped: what waited for that is answered."""
        if channel.state is not ChannelState.CLOSING:
            return
        channel.state = ChannelState.OFFERED
        self._closing -= 1
        held, channel.held_torndown = channel.held_torndown, []
        for gpadl_id in held:
            self.gpadls.drop(channel.relid, gpadl_id)
            self._send(wire.GPADL_TORNDOWN, gpadl=gpadl_id)
        if channel.released:
            self._release(channel)

    def gpadl_released(self, channel: Channel, gpadl_id: int) -> None:
        """The device of an open channel has let go of this one: answer its teardown.

        If the channel is being closed by now, that answers it.
        """
        if gpadl_id in channel.held_torndown and channel.state is not ChannelState.CLOSING:
            channel.held_torndown.remove(gpadl_id)
            self.gpadls.drop(channel.relid, gpadl_id)
            self._send(wire.GPADL_TORNDOWN, gpadl=gpadl_id)

    def stop(self, channel: Channel) -> None:
        """Ask the device to stop if it runs. Its sub-channels are rescinded ahead of it."""
        if channel.state in (ChannelState.OPENING, ChannelState.OPEN):
            if self.offering:
                for sub in self.subs(channel):
                    self.withdraw(sub)
            channel.state = ChannelState.CLOSING
            self._closing += 1
            self._emit(CloseChannel(channel))

    def stop_all(self) -> None:
        """The connection is over: stop every device, forget GPADLs and held answers."""
        self.offering = False
        for channel in self.all:
            channel.held_torndown.clear()
            channel.withdrawn = channel.withdrawn or channel.offer.sub_channel_index > 0
            self.stop(channel)
        self.gpadls.clear()

    @property
    def stopping(self) -> bool:
        """Whether a device is still to stop."""
        return self._closing > 0

    def hide_all(self) -> None:
        """After `stop_all` and the last `closed`: no guest knows any channel; withdrawn ones are gone.

        What the guest of before broke is as new.
        """
        self.by_relid.clear()
        for channel in list(self.all):
            channel.state = ChannelState.HIDDEN
            channel.relid = 0
            channel.released = False
            if channel.broken:
                channel.withdrawn = channel.broken = False
            elif channel.withdrawn:
                self.all.remove(channel)
                self._emit(ForgetChannel(channel))

    def _release(self, channel: Channel) -> None:
        """The relid is free again; Linux tears no GPADL down for a rescinded channel, so they go here."""
        for gpadl_id in self.gpadls.drop_channel(channel.relid):
            self._finish_gpadl(Finished(gpadl_id, channel.relid, None, "the relid was released"))
        del self.by_relid[channel.relid]
        channel.relid = 0
        channel.state = ChannelState.HIDDEN
        if channel.withdrawn:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        if not channel.broken:
            self.all.remove(channel)
            self._emit(ForgetChannel(channel))
        if self.offering:
            self.offer_hidden()

    # The guest's wishes.

    def _answer_open(self, channel: Channel, status: int) -> None:
        self._send(wire.OPENCHANNEL_RESULT, relid=channel.relid, openid=channel.openid, status=status)

    def on_open(self, message: Message) -> None:
        """OPENCHANNEL: start the device, or answer with a status."""
        relid, openid = message["relid"], message["openid"]
        channel = self.by_relid.get(relid)
        why = self._why_not_open(channel, message)
        if channel is None or why:
            if channel is None or not channel.withdrawn:  # else our RESCIND crossed it: no mistake
                self._reports.add("OPENCHANNEL refused", f"relid {relid}: {why}")
            status = vmbus.STATUS_INVALID_PARAMETER
            self._send(wire.OPENCHANNEL_RESULT, relid=relid, openid=openid, status=status)
            return
        channel.openid = openid
        channel.state = ChannelState.OPENING
        self._emit(self._request(channel, message))

    def reopen(self, message: Message) -> OpenChannel | str:
        """What to open again after a restore, by the rules of `on_open`; or why it cannot have been open."""
        channel = self.by_relid.get(message["relid"])
        why = self._why_not_open(channel, message)
        if channel is None or why:
            return why
        channel.openid = message["openid"]
        channel.state = ChannelState.OPEN
        return self._request(channel, message)

    def _request(self, channel: Channel, message: Message) -> OpenChannel:
        """Note how `channel` is opened, which `_why_not_open` has found right."""
        gpadl = self.gpadls.get(channel.relid, message["ring_gpadl"])
        pages = gpadl.ring_pages() if gpadl is not None else None
        channel.ring_gpadl = message["ring_gpadl"]
        channel.split = message["downstream_page_offset"]
        channel.target_vp = self._target(message)
        self.number(channel, channel.relid)
        if self.guest_signals and "connection_id" in message.values:
            channel.connection_id = message["connection_id"] or channel.connection_id
            channel.event_flag = message["event_flag"]
        return OpenChannel(
            channel,
            pages or array("Q"),
            channel.split,
            channel.target_vp,
            channel.connection_id,
            channel.event_flag,
            message["userdata"],
        )

    def _why_not_open(self, channel: Channel | None, message: Message) -> str:
        if channel is None:
            return "no such channel"
        if channel.withdrawn or channel.state is not ChannelState.OFFERED:
            return f"the channel is {channel.state.value}{' and withdrawn' * channel.withdrawn}"
        gpadl = self.gpadls.get(channel.relid, message["ring_gpadl"])
        pages = gpadl.ring_pages() if gpadl is not None else None
        if pages is None:
            return f"GPADL {message['ring_gpadl']:#x} is no whole pages of this channel"
        if not MIN_RING_PAGES <= message["downstream_page_offset"] <= len(pages) - MIN_RING_PAGES:
            return f"ring split at page {message['downstream_page_offset']} of {len(pages)}"
        if not self.valid_target(self._target(message)):
            return f"no VP {message['target_vp']}"
        if self.guest_signals and "connection_id" in message.values:
            return self._why_not_signals(channel, message["connection_id"], message["event_flag"])
        return ""

    def _why_not_signals(self, channel: Channel, connection_id: int, event_flag: int) -> str:
        if event_flag > vmbus.MAX_RELID:
            return f"event flag {event_flag}"
        if not connection_id:
            return ""
        taken = any(c is not channel and c.relid and c.connection_id == connection_id for c in self.all)
        if connection_id <= vmbus.VMBUS_MESSAGE_CONNECTION_ID_4 or connection_id >> 24 or taken:
            return f"connection id {connection_id:#x} is not the guest's to choose"
        return ""

    def _target(self, message: Message) -> int:
        """The VP that an OPENCHANNEL names; before 2.4 it names none, and the boot VP is meant."""
        target: int = message["target_vp"]
        return 0 if self.version < vmbus.VERSION_WIN8 else target

    def valid_target(self, vp_index: int) -> bool:
        """Whether a channel may interrupt this VP, or asks for no interrupts."""
        return vp_index < self._vp_count or vp_index == vmbus.VP_INVALID

    def on_close(self, message: Message) -> None:
        """CLOSECHANNEL has no answer; a device that starts is stopped, and its open is answered first."""
        channel = self.by_relid.get(message["relid"])
        if channel is not None and channel.state is ChannelState.OPENING:
            self._answer_open(channel, vmbus.STATUS_UNSUCCESSFUL)
        if channel is not None and channel.state in (ChannelState.OPENING, ChannelState.OPEN):
            self.stop(channel)
        elif channel is None or not channel.withdrawn:  # a withdrawn one was stopped by us
            self._reports.add("CLOSECHANNEL ignored", f"relid {message['relid']} is not open")

    def on_modify(self, message: Message, answers: bool) -> None:
        """MODIFYCHANNEL: another VP. `answers`: whether this version has a response."""
        channel, target = self.by_relid.get(message["relid"]), message["target_vp"]
        good = channel is not None and channel.state is ChannelState.OPEN and self.valid_target(target)
        if good and channel is not None:
            self._emit(RetargetChannel(channel, channel.relid, target, answers))
            return
        if channel is None or not channel.withdrawn:
            self._reports.add("MODIFYCHANNEL refused", f"relid {message['relid']} to VP {target}")
        if answers:
            status = vmbus.STATUS_INVALID_PARAMETER
            self._send(wire.MODIFYCHANNEL_RESPONSE, relid=message["relid"], status=status)

    def retargeted(self, request: RetargetChannel, status: int) -> None:
        """The host interrupts the new VP, or (status not 0) the old one still."""
        channel = request.channel
        if not status and self.by_relid.get(request.relid) is channel:
            channel.target_vp = request.target_vp
        if request.answers:
            self._send(wire.MODIFYCHANNEL_RESPONSE, relid=request.relid, status=status)

    def on_released(self, message: Message) -> None:
        """RELID_RELEASED: the relid may be used again, once the device has stopped."""
        channel = self.by_relid.get(message["relid"])
        if channel is None or channel.released:
            self._reports.add("RELID_RELEASED ignored", f"relid {message['relid']} is not in use")
        elif channel.state is ChannelState.CLOSING:
            channel.released = True
        elif channel.state is ChannelState.OFFERED:
            self._release(channel)
        else:
            self._reports.add("RELID_RELEASED ignored", f"{channel} is in use")

    def on_gpadl_header(self, message: Message) -> None:
        """GPADL_HEADER: answered when all of it is here, or at once if it can never be valid (S59)."""
        relid, gpadl_id = message["relid"], message["gpadl"]
        channel = self.by_relid.get(relid)
        if channel is None or channel.released:
            self._finish_gpadl(Finished(gpadl_id, relid, None, "no such channel"))
            return
        self._finish_gpadl(
            self.gpadls.header(relid, gpadl_id, message["range_buflen"], message["rangecount"], message.tail)
        )

    def on_gpadl_body(self, message: Message) -> None:
        """GPADL_BODY (S60)."""
        done = self.gpadls.body(message["gpadl"], message.tail)
        if isinstance(done, str):
            self._reports.add("GPADL_BODY ignored", f"GPADL {message['gpadl']:#x}: {done}")
        else:
            self._finish_gpadl(done)

    def _finish_gpadl(self, done: Finished | None) -> None:
        if done is None:
            return
        if done.gpadl is None:
            self._reports.add("GPADL refused", f"GPADL {done.gpadl_id:#x} of relid {done.relid}: {done.why}")
        status = vmbus.STATUS_UNSUCCESSFUL if done.gpadl is None else vmbus.STATUS_SUCCESS
        answer: dict[str, Any] = {"relid": done.relid, "gpadl": done.gpadl_id, "status": status}
        self._send(wire.GPADL_CREATED, **answer)

    def on_gpadl_teardown(self, message: Message) -> None:
        """GPADL_TEARDOWN is always answered, for unknown ones too, but not before the device let go of it."""
        relid, gpadl_id = message["relid"], message["gpadl"]
        channel = self.by_relid.get(relid)
        if self.gpadls.abandon(relid, gpadl_id):
            # Its header waits for an answer too.
            self._send(wire.GPADL_CREATED, relid=relid, gpadl=gpadl_id, status=vmbus.STATUS_UNSUCCESSFUL)
        if channel is not None and channel.in_use and self.gpadls.get(relid, gpadl_id) is not None:
            if gpadl_id in channel.held_torndown:
                self._reports.add("GPADL_TEARDOWN repeated", f"GPADL {gpadl_id:#x} of {channel}")
                return
            if channel.ring_gpadl == gpadl_id and channel.state is not ChannelState.CLOSING:
                self._reports.add("GPADL_TEARDOWN of an open ring", f"{channel} is closed")
                if channel.state is ChannelState.OPENING:
                    self._answer_open(channel, vmbus.STATUS_UNSUCCESSFUL)
                self.stop(channel)
            channel.held_torndown.append(gpadl_id)
            if channel.state is not ChannelState.CLOSING:
                self._emit(ReleaseGpadl(channel, gpadl_id))
            return
        self.gpadls.drop(relid, gpadl_id)
        self._send(wire.GPADL_TORNDOWN, gpadl=gpadl_id)
