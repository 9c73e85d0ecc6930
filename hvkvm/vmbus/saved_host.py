"""The state of a whole host: the connection, the messages that wait both ways, and who was open.

What a file says is checked as it is put back; `saved` has the connection's own part.
Rings are guest RAM, and devices keep their own state.

Owner: `host.VmbusHost`, while the machine is at rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hvkvm.abi.hv_synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT, HV_SYNIC_SINT_COUNT
from hvkvm.errors import StateError
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.actions import SendMessage
from hvkvm.vmbus.channel_devices import ChannelDevices
from hvkvm.vmbus.device import MultiChannel, SavedDevice
from hvkvm.vmbus.inbox import Inbox
from hvkvm.vmbus.offer import Channel, ChannelState
from hvkvm.vmbus.outbox import Outbox
from hvkvm.vmbus.saved import ServerState, load_server, save_server
from hvkvm.vmbus.server import Server
from hvkvm.vmbus.sub_channels import BoundSubChannels


class SavedMessage(NamedTuple):
    """A message that the guest has not taken."""

    vp_index: int
    sint: int
    payload: bytes


class HostState(NamedTuple):
    """The connection, the messages that wait both ways, and whose devices know of their open channels."""

    server: ServerState
    inbox: tuple[bytes, ...]
    outbox: tuple[SavedMessage, ...]
    started: tuple[int, ...]
    """Relids."""


def save_host(server: Server, inbox: Inbox, outbox: Outbox, devices: ChannelDevices) -> HostState:
    """Everything but the rings and the devices. StateError while a channel is being opened or closed."""
    for channel in server.channels.all:
        if channel.state in (ChannelState.OPENING, ChannelState.CLOSING):
            raise StateError(f"VMBus: {channel.offer.name} is {channel.state.value}; save again")
    return HostState(
        save_server(server), inbox.save(), tuple(SavedMessage(*m) for m in outbox), devices.started
    )


def load_host(
    state: HostState,
    server: Server,
    inbox: Inbox,
    outbox: Outbox,
    devices: ChannelDevices,
    states: Mapping[int, Any],
) -> list[Channel]:
    """Put it back, all held; the channels that have no device here. ValueError, or one of OPEN_FAILURES.

    `states` has the states of the devices here, by their id().
    """
    _offer_sub_channels(state.server, server, devices)
    opens, strangers = load_server(server, state.server)
    unknown = set(strangers)
    if server.interrupt_page:
        devices.shared.open(server.interrupt_page)
    started = frozenset(state.started)
    # A sub-channel's state is in its primary's, which therefore comes first.
    for request in sorted(opens, key=lambda request: request.channel.offer.sub_channel_index):
        if request.channel not in unknown:
            device = devices.of(request.channel)
            devices.reopen(request, request.channel.relid in started, states.get(id(device)))
    for channel, device in devices:
        closed = devices.opened(channel) is None and id(device) in states
        if closed and isinstance(device, SavedDevice):
            device.load(None, states[id(device)])
    inbox.load(state.inbox)
    for vp_index, sint, payload in state.outbox:
        if not server.valid_vp(vp_index) or not 0 <= sint < HV_SYNIC_SINT_COUNT:
            raise ValueError(f"a message waits for SINT {sint} of VP {vp_index}")
        outbox.append(SendMessage(vp_index, sint, payload[:HV_MESSAGE_PAYLOAD_BYTE_COUNT]))
    return strangers


def _offer_sub_channels(state: ServerState, server: Server, devices: ChannelDevices) -> None:
    """Make what the guest was offered beside the primaries that are here and were open."""
    is_open = {
        (one.offer.interface, one.offer.instance)
        for one in state.channels
        if not one.offer.sub_channel_index and one.state == ChannelState.OPEN.value
    }
    primaries = {
        channel.offer.key[:2]: (channel, device)
        for channel, device in devices
        if isinstance(device, MultiChannel) and channel.offer.key[:2] in is_open
    }
    for saved in state.channels:
        offer = saved.offer
        found = primaries.get((offer.interface, offer.instance))
        if found is None or saved.withdrawn or offer.sub_channel_index < 1:
            continue
        channel, device = found
        with suppress(ValueError):  # it then has no device here, and is rescinded
            BoundSubChannels(channel, device, devices, server, lambda: None).offer(offer.sub_channel_index)
