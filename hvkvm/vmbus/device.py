"""What a VMBus device is to the bus. Devices live in `devices.synth`, test devices in tests.

All calls come on the I/O loop; a device keeps no reference to `ChannelIo`
behind `close`. What one of them raises ends the device: its channel is
rescinded for the rest of the run, with the reason in what the machine tells and
in `VmbusHost.snapshot`. If the mistake is the caller's own, in a device that is not
hvkvm's, the error ends the machine's run too. A device that defers work runs it by a
`runtime.guard.Guard`, so that the same holds of it (`runtime.guard.Guarded`).

A device that has given guest memory to another thread takes its time to let go of
it: it keeps the `done` of `close`, `release_gpadl` or `rest`, and calls it once, on
the loop, when nothing touches that memory any more. Until then the bus does not
tell the guest that its memory is its own. One that has nothing in flight calls
`done` at once. A second call does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from hvkvm.abi.ring import Packet
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.gpadl import Gpadl
from hvkvm.vmbus.offer import Offer

Done = Callable[[], object]


class AnyDevice(Protocol):
    """What every device has."""

    @property
    def offer(self) -> Offer:
        """What the guest is offered."""
        ...

    def opened(self, io: ChannelIo) -> None:
        """The guest has opened the channel and knows it: packets may be sent."""
        ...

    def close(self, done: Done) -> None:
        """The channel is closed: the rings must not be touched once this has returned.

        `done()` when no other memory of the guest is touched for it either, GPADLs and what
        its packets named. It may be opened again behind that.
        """
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

        Such a device may also take from the ring, one last time, inside `close`.
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
class BusyDevice(Protocol):
    """A device whose work in flight touches guest memory, so that a machine at rest must wait for it."""

    def rest(self, done: Done) -> None:
        """The machine comes to rest, the rings are held already: `done()` once nothing is in flight.

        What ends meanwhile and cannot be sent is kept, and is part of what `save` gives. When
        the machine goes on, the device is called as when the guest rings.
        """
        ...


@runtime_checkable
class ResetDevice(Protocol):
    """A device that keeps something over the close of its channel."""

    def reset(self) -> None:
        """The machine is reset: take the power-on state. Its channels are closed, nothing is in flight."""
        ...


@runtime_checkable
class GpadlUser(Protocol):
    """A device that uses GPADLs besides its rings."""

    def release_gpadl(self, gpadl_id: int, done: Done) -> None:
        """The guest tears it down: `done()` when it is not touched any more."""
        ...


class SubChannels(Protocol):
    """What the bus gives a device that has sub-channels, for as long as it is offered."""

    def add(self, index: int) -> bool:
        """Offer the sub-channel `index`, from 1; its device is what `sub_channel(index)` gives.

        False while the primary channel is not open, or if it is offered already. Sub-channels
        go with the close of their primary, and are offered again only by a new call.
        """
        ...

    def remove(self, index: int) -> None:
        """Rescind it. Linux's drivers do not like that of a device that stays."""
        ...

    def gpadl(self, gpadl_id: int) -> Gpadl | None:
        """A GPADL that the guest made of the primary channel; None if there is none of this id."""
        ...


@runtime_checkable
class MultiChannel(Protocol):
    """The device of a primary channel that may have sub-channels."""

    def bind(self, sub_channels: SubChannels) -> None:
        """It has been added to a bus: what to offer sub-channels by."""
        ...

    def sub_channel(self, index: int) -> Device | StreamDevice:
        """A device for the sub-channel `index`, its offer the primary's with that `sub_channel_index`.

        ValueError for an index that this device never has: a saved machine may say anything.
        The state of a sub-channel is part of its primary's. So in a restored machine
        `load(io, None)` is called on a sub-channel's device that is a SavedDevice and was
        open, behind its primary's `load`.
        """
        ...
