"""What a VMBus device is to the bus. Devices live in `devices.synth`, test devices in tests.

All calls come on the I/O loop; a device keeps no reference to `ChannelIo`
behind `closed`. What one of them raises ends the device: its channel is
rescinded for the rest of the run, with the reason in what the machine tells and
in `VmbusHost.snapshot`. A device that defers work runs it by a `guard.Guard`, so
that the same holds of it (`guard.Guarded`).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from hvkvm.abi.ring import Packet
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.offer import Offer


class AnyDevice(Protocol):
    """What every device has."""

    @property
    def offer(self) -> Offer:
        """What the guest is offered."""
        ...

    def opened(self, io: ChannelIo) -> None:
        """The guest has opened the channel and knows it: packets may be sent."""
        ...

    def closed(self) -> None:
        """The channel is closed; the rings must not be touched any more."""
        ...


class Device(AnyDevice, Protocol):
    """The host side of one channel (a VSP), which is given its packets."""

    def received(self, packet: Packet) -> None:
        """A packet of the guest, copied; its bytes are hostile."""
        ...

    def ready(self) -> None:
        """The guest rang and the ring was drained: there may be room for what did not fit before."""
        ...


@runtime_checkable
class StreamDevice(AnyDevice, Protocol):
    """A device that takes its packets from the ring by itself, so that their bytes need no copy."""

    def rung(self) -> None:
        """The guest rang, or the device asked by `ChannelIo.again`: inside a batch.

        Such a device may also take from the ring, one last time, inside `closed`.
        """
        ...


@runtime_checkable
class SavedDevice(Protocol):
    """A device that goes on in a machine that was restored. One that does not is rescinded there."""

    State: type[Any]
    """A NamedTuple that `state.codec` can write."""

    def save(self) -> Any:
        """What the guest could tell apart. The machine is at rest."""
        ...

    def load(self, io: ChannelIo | None, state: Any) -> None:
        """Be what `save` gave, with `io` where the channel was open: in place of `opened`.

        ValueError for what it cannot have been. Nothing can be sent before the machine goes on.
        """
        ...


@runtime_checkable
class GpadlUser(Protocol):
    """A device that uses GPADLs besides its rings."""

    def release_gpadl(self, gpadl_id: int) -> None:
        """The guest tears it down: it must not be touched any more when this returns."""
        ...
