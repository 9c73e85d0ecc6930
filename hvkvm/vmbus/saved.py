"""The state of a VMBus host as it is written to a file, and put back into one that was just made.

What a guest has done is replayed through the code that took it from the guest: a
GPADL is described anew, an open channel is checked as an OPENCHANNEL is. So a made-up
state can bring about nothing that a guest could not.

Messages under way are bytes. Rings are guest RAM. Devices keep their own state. A
channel whose device is not there any more (a stream of hvsock above all) is
rescinded as soon as the guest goes on.

Owner: the I/O loop, or whoever makes the machine; while it is at rest.
"""

from __future__ import annotations

from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import HV_SYNIC_SINT_COUNT
from hvkvm.abi.vmbus import GUID_BYTES
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.actions import OpenChannel
from hvkvm.vmbus.channels import Channels
from hvkvm.vmbus.offer import Channel, ChannelState, Offer
from hvkvm.vmbus.server import BusState, Server

_USER_DEFINED_BYTES = 120


class SavedGpadl(NamedTuple):
    """A GPADL, or the part of one that has come: `data` of the `need` bytes that its header claimed."""

    relid: int
    gpadl_id: int
    need: int
    rangecount: int
    data: bytes


class SavedOffer(NamedTuple):
    """What the guest was offered: see `offer.Offer`."""

    interface: bytes
    instance: bytes
    name: str
    flags: int
    user_defined: bytes
    sub_channel_index: int
    mmio_megabytes: int
    mmio_megabytes_optional: int


class SavedChannel(NamedTuple):
    """A channel: see `offer.Channel`."""

    offer: SavedOffer
    relid: int
    state: str
    withdrawn: bool
    broken: bool
    openid: int
    ring_gpadl: int
    split: int
    target_vp: int
    connection_id: int
    event_flag: int


class SavedConnect(NamedTuple):
    """A hvsock connect that the host has not answered; it is refused when the guest goes on."""

    endpoint_id: bytes
    service_id: bytes
    silo_id: bytes


class ServerState(NamedTuple):
    """A connection, and every channel."""

    connected: bool
    version: int
    features: int
    client_id: bytes
    interrupt_page: int
    target: tuple[int, int]
    offering: bool
    last_relid: int
    connects: tuple[SavedConnect, ...]
    gpadls: tuple[SavedGpadl, ...]
    channels: tuple[SavedChannel, ...]


def save_server(server: Server) -> ServerState:
    """Everything of `server`, which has no action left to take."""
    channels = server.channels
    return ServerState(
        server.state is BusState.CONNECTED,
        server.version,
        server.features,
        server.client_id,
        server.interrupt_page,
        server.target,
        channels.offering,
        channels.last_relid,
        tuple(SavedConnect(*request) for request in server.tl_connects),
        tuple(SavedGpadl(*described) for described in channels.gpadls.described()),
        tuple(_save_channel(channel) for channel in channels.all),
    )


def _save_channel(channel: Channel) -> SavedChannel:
    return SavedChannel(
        SavedOffer(*channel.offer),
        channel.relid,
        channel.state.value,
        channel.withdrawn,
        channel.broken,
        channel.openid,
        channel.ring_gpadl,
        channel.split,
        channel.target_vp,
        channel.connection_id,
        channel.event_flag,
    )


def load_server(server: Server, state: ServerState) -> tuple[list[OpenChannel], list[Channel]]:
    """Put `state` into a server that knows its own devices and no guest yet.

    What must be opened, and which channels have no device here. ValueError for a
    connection that cannot be.
    """
    _put_in_order(server.channels, state.channels)
    if not state.connected:
        return [], []
    if state.version not in server.versions or state.features & ~vmbus.HOST_FEATURES:
        raise ValueError(f"its connection speaks {state.version:#x}, which this host does not")
    vp_index, sint = state.target
    if not server.valid_vp(vp_index) or not 0 <= sint < HV_SYNIC_SINT_COUNT:
        raise ValueError(f"its messages go to SINT {sint} of VP {vp_index}, which is not there")
    page = state.interrupt_page
    old = state.version < vmbus.VERSION_WIN8
    if server.why_not_page(page) if old else page:
        raise ValueError(f"its connection has an interrupt page at {page:#x}, which it cannot")
    server.connect(state.version, state.features, state.client_id, state.target, page)
    channels = server.channels
    channels.offering = state.offering
    channels.last_relid = state.last_relid % (vmbus.MAX_RELID + 1)
    strangers = [_place(channels, saved) for saved in state.channels]
    for gpadl in state.gpadls:
        _describe(channels, gpadl)
    opens = [_open(channels, saved) for saved in state.channels if saved.state == ChannelState.OPEN.value]
    for request in state.connects:
        server.restore_connect(*request)
    return opens, [channel for channel in strangers if channel is not None]


def _put_in_order(channels: Channels, saved: tuple[SavedChannel, ...]) -> None:
    """Have channels in the order that they had: guests that boot again name their disks by that of offers.

    Devices that came while the machine ran were made in another order here.
    """
    offers = [channel.offer for channel in saved if not channel.withdrawn]
    order = {(one.interface, one.instance, one.sub_channel_index): place for place, one in enumerate(offers)}
    channels.sort(lambda channel: order.get(channel.offer.key, len(order)))


def _place(channels: Channels, saved: SavedChannel) -> Channel | None:
    """Give a saved channel to the device that it was of; the channel itself if that is not here."""
    offer = _offer(saved.offer)
    channel = None
    if not saved.withdrawn:
        free = (c for c in channels.of_key(offer) if c.state is ChannelState.HIDDEN)
        channel = next(free, None)
    stranger = channel is None
    if channel is None:
        channel = Channel(offer)
        channels.enter(channel)
    if len(channels.all) > 2 * vmbus.MAX_RELID:
        raise ValueError("it has more channels than a bus can have")
    known = {state.value for state in (ChannelState.HIDDEN, ChannelState.OFFERED, ChannelState.OPEN)}
    hidden = saved.state == ChannelState.HIDDEN.value
    right = saved.state in known and (hidden or 0 < saved.relid <= vmbus.MAX_RELID)
    if not right or (not hidden and saved.relid in channels.by_relid):
        raise ValueError(f"its channel {offer.name!r} has relid {saved.relid} and is {saved.state[:20]}")
    channel.withdrawn, channel.broken = saved.withdrawn, saved.broken
    if not hidden:
        channels.opening.number(channel, saved.relid)
        channel.state = ChannelState.OFFERED
        channels.by_relid[saved.relid] = channel
    return channel if stranger else None


def _offer(saved: SavedOffer) -> Offer:
    sizes = (saved.mmio_megabytes, saved.mmio_megabytes_optional, saved.flags, saved.sub_channel_index)
    if not all(0 <= size <= 0xFFFF for size in sizes) or len(saved.user_defined) > _USER_DEFINED_BYTES:
        raise ValueError(f"its offer {saved.name[:40]!r} does not fit in a message")
    if len(saved.interface) != GUID_BYTES or len(saved.instance) != GUID_BYTES:
        raise ValueError(f"its offer {saved.name[:40]!r} has no GUIDs")
    return Offer(*saved)


def _describe(channels: Channels, saved: SavedGpadl) -> None:
    channel = channels.by_relid.get(saved.relid)
    if channel is None or not (0 <= saved.need <= 0xFFFF_FFFF and 0 <= saved.gpadl_id <= 0xFFFF_FFFF):
        raise ValueError(f"its GPADL {saved.gpadl_id:#x} is of no channel")
    done = channels.gpadls.header(
        saved.relid, saved.gpadl_id, saved.need, saved.rangecount, saved.data[: saved.need]
    )
    if done is not None and done.gpadl is None:
        raise ValueError(f"its GPADL {saved.gpadl_id:#x}: {done.why}")


def _open(channels: Channels, saved: SavedChannel) -> OpenChannel:
    """The open channel again, by the rules for OPENCHANNEL."""
    values: dict[str, Any] = {
        "relid": saved.relid,
        "openid": saved.openid,
        "ring_gpadl": saved.ring_gpadl,
        "target_vp": saved.target_vp,
        "downstream_page_offset": saved.split,
        "userdata": b"",
    }
    if channels.opening.guest_signals:
        values |= {"connection_id": saved.connection_id, "event_flag": saved.event_flag}
    if not all(0 <= value <= 0xFFFF_FFFF for value in values.values() if isinstance(value, int)):
        raise ValueError(f"its channel {saved.relid} was opened with no message that there is")
    request = channels.reopen(wire.Message(wire.KINDS[wire.OPENCHANNEL], values))
    if isinstance(request, str):
        raise ValueError(f"its open channel {saved.relid}: {request}")
    return request
