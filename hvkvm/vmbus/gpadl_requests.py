"""GPADL messages: each is answered once, and a teardown only when no device touches the pages any more.

Why: Linux waits for these answers without a time limit, and takes GPADL_TORNDOWN
to say that the pages are its own again. So a teardown of what a channel uses is
held until the device has let go of it, or has stopped.

Owner: `channels.Channels`, and so the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.vmbus_messages import Message
from hvkvm.vmbus.actions import Action, ReleaseGpadl
from hvkvm.vmbus.gpadl import Finished, GpadlTable
from hvkvm.vmbus.offer import Channel, ChannelState
from hvkvm.vmbus.report import Reports


class GpadlRequests:
    """What a guest asks of `gpadls`, the GPADLs of the channels in `by_relid`.

    `send(type, **fields)` queues a message to the guest, `emit(action)` an action; `close(channel)` ends
    one whose ring the guest takes away.
    """

    def __init__(
        self,
        gpadls: GpadlTable,
        by_relid: Mapping[int, Channel],
        send: Callable[..., None],
        emit: Callable[[Action], None],
        close: Callable[[Channel], None],
        reports: Reports,
    ) -> None:
        self._gpadls = gpadls
        self._by_relid = by_relid
        self._send: Callable[..., None] = send
        self._emit = emit
        self._close = close
        self._reports = reports

    # The guest's messages.

    def on_header(self, message: Message) -> None:
        """GPADL_HEADER: answered when all of it is here, or at once if it can never be valid (S59)."""
        relid, gpadl_id = message["relid"], message["gpadl"]
        channel = self._by_relid.get(relid)
        if channel is None or channel.released:
            self._finish(Finished(gpadl_id, relid, None, "no such channel"))
            return
        self._finish(
            self._gpadls.header(relid, gpadl_id, message["range_buflen"], message["rangecount"], message.tail)
        )

    def on_body(self, message: Message) -> None:
        """GPADL_BODY (S60)."""
        done = self._gpadls.body(message["gpadl"], message.tail)
        if isinstance(done, str):
            self._reports.add("GPADL_BODY ignored", f"GPADL {message['gpadl']:#x}: {done}")
        else:
            self._finish(done)

    def on_teardown(self, message: Message) -> None:
        """GPADL_TEARDOWN is always answered, for unknown ones too, but not before the device let go of it."""
        relid, gpadl_id = message["relid"], message["gpadl"]
        channel = self._by_relid.get(relid)
        if self._gpadls.abandon(relid, gpadl_id):
            # Its header waits for an answer too.
            self._send(wire.GPADL_CREATED, relid=relid, gpadl=gpadl_id, status=vmbus.STATUS_UNSUCCESSFUL)
        if channel is None or not channel.in_use or self._gpadls.get(relid, gpadl_id) is None:
            self._torn_down(relid, gpadl_id)
            return
        if gpadl_id in channel.held_torndown:
            self._reports.add("GPADL_TEARDOWN repeated", f"GPADL {gpadl_id:#x} of {channel}")
            return
        if channel.ring_gpadl == gpadl_id and channel.state is not ChannelState.CLOSING:
            self._reports.add("GPADL_TEARDOWN of an open ring", f"{channel} is closed")
            self._close(channel)
        channel.held_torndown.append(gpadl_id)
        if channel.state is not ChannelState.CLOSING:
            self._emit(ReleaseGpadl(channel, gpadl_id))

    # What happens to a channel.

    def let_go(self, channel: Channel, gpadl_id: int) -> None:
        """The device of an open channel has let go of this one: answer its teardown.

        If the channel is being closed by now, that answers it.
        """
        if gpadl_id in channel.held_torndown and channel.state is not ChannelState.CLOSING:
            channel.held_torndown.remove(gpadl_id)
            self._torn_down(channel.relid, gpadl_id)

    def let_all_go(self, channel: Channel) -> None:
        """The device has stopped: answer each teardown that waited for that."""
        held, channel.held_torndown = channel.held_torndown, []
        for gpadl_id in held:
            self._torn_down(channel.relid, gpadl_id)

    def drop_channel(self, channel: Channel) -> None:
        """The relid is given back. Linux tears no GPADL down for a rescinded channel, so they go here."""
        for gpadl_id in self._gpadls.drop_channel(channel.relid):
            self._finish(Finished(gpadl_id, channel.relid, None, "the relid was released"))

    # Answers.

    def _torn_down(self, relid: int, gpadl_id: int) -> None:
        self._gpadls.drop(relid, gpadl_id)
        self._send(wire.GPADL_TORNDOWN, gpadl=gpadl_id)

    def _finish(self, done: Finished | None) -> None:
        if done is None:
            return
        status = vmbus.STATUS_SUCCESS
        if done.gpadl is None:
            status = vmbus.STATUS_UNSUCCESSFUL
            self._reports.add("GPADL refused", f"GPADL {done.gpadl_id:#x} of relid {done.relid}: {done.why}")
        self._send(wire.GPADL_CREATED, relid=done.relid, gpadl=done.gpadl_id, status=status)
