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
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
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

        def reference() -> int:
            # What KVM's HV_X64_MSR_TIME_REF_COUNT counts: the VM's clock.
            return int(machine.vm.get_clock().clock) // 100

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
        self.timesync = TimeSync(machine.io.call_later, reference)
        self.keyboard = Keyboard()
        for device in (self.heartbeat, self.shutdown, self.timesync, self.keyboard):
            self.host.add(device)
        stack.callback(self.host.close)
        self.host.attach()
