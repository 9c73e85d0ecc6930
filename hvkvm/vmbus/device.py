"""What a VMBus device is to the bus. Devices live in `devices.synth`, test devices in tests.

All calls come on the I/O loop; a device keeps no reference to `ChannelIo`
behind `closed`.
"""

from __future__ import annotations

from typing import Protocol

from hvkvm.abi.ring import Packet
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.offer import Offer


class Device(Protocol):
    """The host side of one channel (a VSP)."""

    @property
    def offer(self) -> Offer:
        """What the guest is offered."""
        ...

    def opened(self, io: ChannelIo) -> None:
        """The guest has opened the channel and knows it: packets may be sent."""
        ...

    def received(self, packet: Packet) -> None:
        """A packet of the guest, copied; its bytes are hostile."""
        ...

    def ready(self) -> None:
        """The guest rang and the ring was drained: there may be room for what did not fit before."""
        ...

    def closed(self) -> None:
        """The channel is closed; the rings must not be touched any more."""
        ...
