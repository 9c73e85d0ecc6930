"""The machine's VMBus: the host on its partition, and the utility devices.

Made by `Machine` when the configuration asks for it, before vCPUs run;
afterwards everything happens on the I/O loop.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm.abi.vmbus import HOST_VERSIONS
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vsock import Vsock
from hvkvm.devices.synth.vss import Vss
from hvkvm.errors import ConfigError
from hvkvm.machine.config import VMBUS_VERSIONS
from hvkvm.vmbus.host import VmbusHost

if TYPE_CHECKING:
    from hvkvm.machine.machine import Machine


class Bus:
    """The bus and its devices. ConfigError without a SynIC."""

    def __init__(self, machine: Machine, stack: ExitStack) -> None:
        if machine.partition is None:
            raise ConfigError(
                f"--vmbus on: needs the SynIC, which --hv {machine.config.hv} leaves out; add synic to --hv"
            )

        self.host = VmbusHost(
            machine.partition,
            machine.memory,
            machine.config.cpus,
            machine.io.call_soon,
            max_version=HOST_VERSIONS[VMBUS_VERSIONS.index(machine.config.vmbus_max_version)],
            observer=machine.observer,
        )
        self.heartbeat = Heartbeat(machine.io.call_later)
        self.shutdown = Shutdown()
        self.timesync = TimeSync(machine.io.call_later, machine.reference_time)
        self.kvp = Kvp()
        self.vss = Vss(machine.io.call_later)
        self.keyboard = Keyboard()
        for device in (self.heartbeat, self.shutdown, self.timesync, self.kvp, self.vss, self.keyboard):
            self.host.add(device)
        stack.callback(self.host.close)
        self.vsock = Vsock(self.host, machine.io, machine.config.vsock, observer=machine.observer)
        stack.callback(self.vsock.close)
        self.vsock.start()
        self.host.attach()
