"""Channels of a connection: offer, rescind, open, close, move.

Why: this is where the guest's and the host's wishes cross. Every request of the
guest that has an answer gets exactly one, also for a channel that is going or
gone, since Linux waits for most of them without a time limit. An answer that
says "your memory is your own again" waits until the device has stopped.

Owner: `server.Server`, and so the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.vmbus_messages import Message
from hvkvm.vmbus.actions import (
    Action,
    CloseChannel,
    ForgetChannel,
    OpenChannel,
    RetargetChannel,
)
from hvkvm.vmbus.gpadl import GpadlTable, PageCheck
from hvkvm.vmbus.gpadl_requests import GpadlRequests
from hvkvm.vmbus.offer import Channel, ChannelState, Offer
from hvkvm.vmbus.opening import Opening
from hvkvm.vmbus.report import Reports


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
        """In the order of their offers. What an offer or a rescind needs of them is found without a look at
        each: a guest may have two thousand, and as many connections that come and go."""
        self._of_device: dict[tuple[bytes, bytes], list[Channel]] = {}
        self._hidden: dict[Channel, None] = {}  # those that may be; which of them are is looked at
        self.by_relid: dict[int, Channel] = {}
        self.offering = False
        """Whether the guest has asked for offers, so that new ones are told at once."""
        self.opening = Opening(self.all, self.gpadls, vp_count)
        self.gpadl_requests = GpadlRequests(self.gpadls, self.by_relid, send, emit, self._end, reports)
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
        alike = self.of_key(offer)
        if any(not channel.withdrawn for channel in alike):
            raise ValueError(f"{offer.name}: offered already")
        if len(self.all) >= vmbus.MAX_RELID:
            raise ValueError(f"{offer.name}: a bus has at most {vmbus.MAX_RELID} channels")
        for before in alike:
            if before.broken:
                self.withdraw(before)
        channel = Channel(offer)
        self.enter(channel)
        if self.offering:
            self.offer_hidden()
        return channel

    def enter(self, channel: Channel) -> None:
        """Have one more, of which no guest knows."""
        self.all.append(channel)
        self._of_device.setdefault(channel.offer.key[:2], []).append(channel)
        self._hidden[channel] = None

    def sort(self, place: Callable[[Channel], int]) -> None:
        """Have them, and so their offers, in this order."""
        self.all.sort(key=place)
        self._hidden = {channel: None for channel in self.all if channel in self._hidden}

    def _drop(self, channel: Channel) -> None:
        """Have it no more."""
        self.all.remove(channel)
        self._hidden.pop(channel, None)
        device = channel.offer.key[:2]
        alike = self._of_device[device]
        alike.remove(channel)
        if not alike:
            del self._of_device[device]

    def of_key(self, offer: Offer) -> list[Channel]:
        """The channels of this key, those included that are going."""
        key = offer.key
        return [channel for channel in self._of_device.get(key[:2], ()) if channel.offer.key == key]

    def withdraw(self, channel: Channel, *, broken: bool = False) -> None:
        """Rescind; sub-channels go before their primary. Idempotent.

        With `broken` a primary is offered again to the next connection, and else no more.
        """
        if channel not in self._of_device.get(channel.offer.key[:2], ()):
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
        alike = self._of_device.get(channel.offer.key[:2], ())
        return [one for one in alike if one.offer.sub_channel_index]

    def primary(self, channel: Channel) -> Channel:
        """The primary of a sub-channel; `channel` if it is one, or has none any more."""
        alike = self._of_device.get(channel.offer.key[:2], ())
        return next((c for c in alike if not c.offer.sub_channel_index and not c.withdrawn), channel)

    def offer_hidden(self) -> None:
        """Tell the guest every channel that it may know and does not."""
        for channel in list(self._hidden):
            if channel.state is not ChannelState.HIDDEN:  # a restore has given it its place
                del self._hidden[channel]
                continue
            if any(one.withdrawn for one in self.of_key(channel.offer)):  # it, or one that is going
                continue
            relid = self._free_relid()
            if relid is None:
                return
            del self._hidden[channel]
            self.opening.number(channel, relid)
            channel.released = False
            channel.state = ChannelState.OFFERED
            self.by_relid[relid] = channel
            self._send(channel.offer_message())

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
        self.gpadl_requests.let_all_go(channel)
        if channel.released:
            self._release(channel)

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
        every = list(self.all)
        self.all.clear()
        self._of_device.clear()
        self._hidden.clear()
        for channel in every:
            channel.state = ChannelState.HIDDEN
            channel.relid = 0
            channel.released = False
            if channel.broken:
                channel.withdrawn = channel.broken = False
            if channel.withdrawn:
                self._emit(ForgetChannel(channel))
            else:
                self.enter(channel)

    def _release(self, channel: Channel) -> None:
        """The relid is free again."""
        self.gpadl_requests.drop_channel(channel)
        del self.by_relid[channel.relid]
        channel.relid = 0
        channel.state = ChannelState.HIDDEN
        self._hidden[channel] = None
        if channel.withdrawn:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        if not channel.broken:
            self._drop(channel)
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
        why = self.opening.why_not(channel, message)
        if channel is None or why:
            if channel is None or not channel.withdrawn:  # else our RESCIND crossed it: no mistake
                self._reports.add("OPENCHANNEL refused", f"relid {relid}: {why}")
            status = vmbus.STATUS_INVALID_PARAMETER
            self._send(wire.OPENCHANNEL_RESULT, relid=relid, openid=openid, status=status)
            return
        channel.state = ChannelState.OPENING
        self._emit(self.opening.request(channel, message))

    def reopen(self, message: Message) -> OpenChannel | str:
        """What to open again after a restore, by the rules of `on_open`; or why it cannot have been open."""
        channel = self.by_relid.get(message["relid"])
        why = self.opening.why_not(channel, message)
        if channel is None or why:
            return why
        channel.state = ChannelState.OPEN
        return self.opening.request(channel, message)

    def on_close(self, message: Message) -> None:
        """CLOSECHANNEL has no answer; a device that starts is stopped, and its open is answered first."""
        channel = self.by_relid.get(message["relid"])
        if channel is not None and channel.state in (ChannelState.OPENING, ChannelState.OPEN):
            self._end(channel)
        elif channel is None or not channel.withdrawn:  # a withdrawn one was stopped by us
            self._reports.add("CLOSECHANNEL ignored", f"relid {message['relid']} is not open")

    def _end(self, channel: Channel) -> None:
        """Stop it, for something that the guest did."""
        if channel.state is ChannelState.OPENING:
            self._answer_open(channel, vmbus.STATUS_UNSUCCESSFUL)
        self.stop(channel)

    def on_modify(self, message: Message, answers: bool) -> None:
        """MODIFYCHANNEL: another VP. `answers`: whether this version has a response."""
        channel, target = self.by_relid.get(message["relid"]), message["target_vp"]
        good = (
            channel is not None and channel.state is ChannelState.OPEN and self.opening.valid_target(target)
        )
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
