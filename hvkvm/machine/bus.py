"""The machine's VMBus: the host on its partition, and the utility devices.

A `part.Part`. Made by `Machine` when the configuration asks for it, before
vCPUs run; afterwards everything happens on the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi.vmbus import HOST_VERSIONS
from hvkvm.devices.synth.heartbeat import Heartbeat, HeartbeatState
from hvkvm.devices.synth.ic import IcState
from hvkvm.devices.synth.keyboard import Keyboard, KeyboardState
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vsock import Vsock
from hvkvm.devices.synth.vss import Vss, VssState
from hvkvm.errors import StateError
from hvkvm.machine.config import VMBUS_VERSIONS
from hvkvm.vmbus.host import HostState, VmbusHost
from hvkvm.vmbus.open_channel import OPEN_FAILURES

if TYPE_CHECKING:
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.platform import Platform


class BusState(NamedTuple):
    """The host, and each device. Streams of hvsock are not kept: they are reset when the guest goes on."""

    host: HostState
    heartbeat: HeartbeatState
    shutdown: IcState
    timesync: IcState
    kvp: IcState
    vss: VssState
    keyboard: KeyboardState


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
        self.heartbeat = Heartbeat(io.call_later)
        self.shutdown = Shutdown()
        self.timesync = TimeSync(io.call_later, hyperv.reference_time)
        self.kvp = Kvp()
        self.vss = Vss(io.call_later)
        self.keyboard = Keyboard()
        for device in (self.heartbeat, self.shutdown, self.timesync, self.kvp, self.vss, self.keyboard):
            self.host.add(device)
        stack.callback(self.host.close)
        self.vsock = Vsock(self.host, io, config.vsock, observer=platform.observer)
        stack.callback(self.vsock.close)
        self.vsock.start()
        self.host.attach()

    def start(self) -> None:
        """See `Part.start`."""
        self.host.go_on()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`. Streams and devices find no room in their rings until the machine goes on."""
        self.host.hold()
        done()

    def reset(self) -> None:
        """See `Part.reset`: every channel closed, every device offered anew."""
        self.host.reset()

    def save(self) -> BusState:
        """See `Part.save`."""
        return BusState(
            self.host.save(),
            self.heartbeat.save(),
            self.shutdown.save(),
            self.timesync.save(),
            self.kvp.save(),
            self.vss.save(),
            self.keyboard.save(),
        )

    def load(self, state: BusState) -> None:
        """See `Part.load`."""
        states = {
            id(self.heartbeat): state.heartbeat,
            id(self.shutdown): state.shutdown,
            id(self.timesync): state.timesync,
            id(self.kvp): state.kvp,
            id(self.vss): state.vss,
            id(self.keyboard): state.keyboard,
        }
        try:
            self.host.load(state.host, states)
        except (ValueError, *OPEN_FAILURES) as error:
            raise StateError(f"{self.name}: {error}") from None
