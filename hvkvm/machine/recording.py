"""Has a machine's bus recorded, where the configuration asks for it.

Made by `Machine` when the bus is there and before vCPUs run; closed when they have ended.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm import __version__
from hvkvm.errors import ConfigError
from hvkvm.record.recorder import Recorder

if TYPE_CHECKING:
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.platform import Platform


def record(platform: Platform, hyperv: Hyperv, bus: Bus | None, stack: ExitStack) -> None:
    """Open the files that `--record` names. ConfigError."""
    config = platform.config
    for spec in config.record:
        if bus is None:
            raise ConfigError(f"--record {spec.file}: there is no bus to record; add --vmbus on")
        facts = {
            "hvkvm": __version__,
            "cpus": config.cpus,
            "memory": config.memory,
            "vmbus_max_version": config.vmbus_max_version,
            "synic": hyperv.offered.synic,
            "depth": spec.depth,
            "devices": list(bus.devices),
        }
        recorder = Recorder(spec.file, spec.depth, facts, observer=platform.observer)
        stack.callback(recorder.close)
        bus.host.listen(recorder)
        if hyperv.partition is not None:
            hyperv.partition.hypercalls.listeners.append(recorder.hypercall)
