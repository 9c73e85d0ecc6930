"""The machine's VMBus: the host on its partition, and the devices on it, each by its name.

A `part.Part`. Made by `Machine` when the configuration asks for it, before
vCPUs run; afterwards everything happens on the I/O loop. Devices may be added and
removed at any time. A saved machine has the state of each under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from hvkvm.abi.vmbus import HOST_VERSIONS
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vsock import Vsock
from hvkvm.devices.synth.vsock_saved import SavedStream
from hvkvm.devices.synth.vss import Vss
from hvkvm.errors import StateError
from hvkvm.machine.config import VMBUS_VERSIONS
from hvkvm.state.codec import restored
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.device import Device, ResetDevice, SavedDevice, StreamDevice
from hvkvm.vmbus.host import VmbusHost
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.open_channel import OPEN_FAILURES
from hvkvm.vmbus.saved_host import HostState

if TYPE_CHECKING:
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.platform import Platform

D = TypeVar("D", bound=Device | StreamDevice)


class BusState(NamedTuple):
    """The host, and each device. Of hvsock's streams a command's are kept; others are reset in the guest."""

    host: HostState
    devices: dict[str, Any]
    """By name, in the order in which they were added: the device's own `State`."""
    streams: tuple[SavedStream, ...]


class BusDevice(NamedTuple):
    """A device on the bus, and its primary channel."""

    device: Any
    channel: Channel


class Bus:
    """The bus and its devices. ConfigError without a SynIC."""

    name = "VMBus"
    State = BusState

    def __init__(self, platform: Platform, hyperv: Hyperv, stack: ExitStack) -> None:
        config, io = platform.config, platform.io
        self.host = VmbusHost(
            hyperv.require_synic("--vmbus on", "needs"),
            platform.memory,
            config.cpus,
            io.call_soon,
            io.call_later,
            max_version=HOST_VERSIONS[VMBUS_VERSIONS.index(config.vmbus_max_version)],
            observer=platform.observer,
        )
        self.host.devices.on_callers_error = io.on_fault
        self.devices: dict[str, BusDevice] = {}
        """By name, in the order in which they were added."""
        self.heartbeat = self.add("heartbeat", Heartbeat(io.call_later))
        self.shutdown = self.add("shutdown", Shutdown())
        self.timesync = self.add("timesync", TimeSync(io.call_later, hyperv.reference_time))
        self.kvp = self.add("kvp", Kvp())
        self.vss = self.add("vss", Vss(io.call_later))
        self.keyboard = self.add("keyboard", Keyboard())
        stack.callback(self.host.close)
        self.vsock = Vsock(self.host, io, config.vsock, observer=platform.observer)
        stack.callback(self.vsock.close)
        self.vsock.start()
        self.host.attach()

    def add(self, name: str, device: D) -> D:
        """Offer `device`, to a guest that runs too; it is returned. ValueError: the name or GUIDs are taken.

        What is added before a saved machine is loaded is expected there by this name.
        """
        if name in self.devices:
            raise ValueError(f"the bus has a device {name}")
        self.devices[name] = BusDevice(device, self.host.add(device))
        return device

    def remove(self, name: str, done: Callable[[], object] = lambda: None) -> None:
        """Take a device away from the guest. KeyError if there is none of that name.

        `done()`, at once or later, when it touches no guest memory any more. The name is free at once.
        """
        self.host.remove(self.devices.pop(name).channel, done)

    def start(self) -> None:
        """See `Part.start`."""
        self.host.go_on()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`. Streams and devices find no room in their rings until the machine goes on."""
        self.host.stop(done)

    def reset(self) -> None:
        """See `Part.reset`: every channel closed, every device offered anew."""
        self.host.reset()
        for entry in self.devices.values():
            if isinstance(entry.device, ResetDevice):
                entry.device.reset()

    def save(self) -> BusState:
        """See `Part.save`."""
        host = self.host.save()
        states = {
            name: entry.device.save()
            for name, entry in self.devices.items()
            if isinstance(entry.device, SavedDevice)
        }
        return BusState(host, states, self.vsock.save())

    def load(self, state: BusState) -> None:
        """See `Part.load`. The machine has to have the devices that were saved, and no others."""
        here = {
            name: entry.device
            for name, entry in self.devices.items()
            if isinstance(entry.device, SavedDevice)
        }
        for missing in sorted(set(state.devices) - set(here)):
            raise StateError(f"{self.name}: it has a device {missing[:40]!r}, and this machine has not")
        for extra in sorted(set(here) - set(state.devices)):
            raise StateError(f"{self.name}: this machine has a device {extra!r}, and it has not")
        states = {
            id(device): restored(device.State, state.devices[name], f"{self.name}.devices[{name!r}]")
            for name, device in here.items()
        }
        try:
            states |= self.vsock.restore(state.streams)
            self.host.load(state.host, states)
        except (ValueError, StateError, *OPEN_FAILURES) as error:
            raise StateError(f"{self.name}: {error}") from None
