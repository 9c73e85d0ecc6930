"""Sub-channels of one device: what it offers them by, bound to its primary channel.

Owner: `host.VmbusHost`, on the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hvkvm.vmbus.device import Device, MultiChannel, StreamDevice
from hvkvm.vmbus.gpadl import Gpadl
from hvkvm.vmbus.offer import Channel, ChannelState
from hvkvm.vmbus.server import Server


class Devices(Protocol):
    """What is needed of `channel_devices.ChannelDevices`."""

    def adopt(self, channel: Channel, device: Device | StreamDevice) -> None: ...
    def rescind(self, channel: Channel) -> None: ...


class BoundSubChannels:
    """See `device.SubChannels`."""

    def __init__(
        self,
        primary: Channel,
        device: MultiChannel,
        devices: Devices,
        server: Server,
        perform: Callable[[], None],
    ) -> None:
        self._primary = primary
        self._device = device
        self._devices = devices
        self._server = server
        self._perform = perform

    def add(self, index: int) -> bool:
        """See `device.SubChannels.add`."""
        if self._primary.state is not ChannelState.OPEN or self._primary.withdrawn:
            return False
        return self.offer(index)

    def offer(self, index: int) -> bool:
        """Offer it, whatever the primary is: for a saved machine. ValueError as of `sub_channel`."""
        here = self._server.channels.subs(self._primary)
        if any(one.offer.sub_channel_index == index and not one.withdrawn for one in here):
            return False  # asked for twice: the device is to know of one
        device = self._device.sub_channel(index)
        try:
            channel = self._server.offer(device.offer)
        except ValueError:
            return False
        self._devices.adopt(channel, device)
        self._perform()
        return True

    def remove(self, index: int) -> None:
        """See `device.SubChannels.remove`."""
        for channel in self._server.channels.subs(self._primary):
            if channel.offer.sub_channel_index == index and not channel.withdrawn:
                self._devices.rescind(channel)

    def gpadl(self, gpadl_id: int) -> Gpadl | None:
        """See `device.SubChannels.gpadl`."""
        return self._server.channels.gpadls.get(self._primary.relid, gpadl_id)
