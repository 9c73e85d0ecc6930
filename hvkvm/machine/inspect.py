"""A running machine as plain values, for `hvkvm ctl info` and `inspect` and for dumps.

Reads what others own without stopping them: each number is right for its own
moment. Runs no code on vCPU threads, so it never waits. Any thread.
"""

from __future__ import annotations

import os
from collections import Counter
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.parts import Parts
    from hvkvm.machine.platform import Platform
    from hvkvm.runtime.vcpu_thread import VcpuThread

DEVICES = ("heartbeat", "shutdown", "timesync", "kvp", "vss", "keyboard")
"""Attributes of `Parts.bus` that are devices."""

_SHOWN = ("alive", "beats", "missed", "sent", "state", "frozen", "events", "leds", "waiting")


def info(parts: Parts) -> dict[str, Any]:
    """What the machine is, how long it runs and how often it left the guest."""
    from hvkvm import __version__

    lifecycle, offered = parts.lifecycle, parts.hyperv.offered
    return {
        "name": parts.name,
        "pid": os.getpid(),
        "hvkvm": __version__,
        "uptime": round(0.0 if lifecycle.started_at is None else monotonic() - lifecycle.started_at, 3),
        "resets": lifecycle.resets,
        "outcome": None if lifecycle.outcome is None else str(lifecycle.outcome),
        "features": str(offered.features),
        "synic": offered.synic,
        "synic_reason": offered.choice.why,
        "vmbus_version": None if parts.bus is None else parts.bus.host.snapshot()["version"],
        "config": config(parts.platform.config),
        "exits": exit_counts(parts.platform),
    }


def config(config: MachineConfig) -> dict[str, Any]:
    """The configuration as plain values: paths are text, files a table."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_field_defaults"):  # a structured option
            defaults = value._field_defaults
            return {key: plain(one) for key, one in value._asdict().items() if one != defaults.get(key, ...)}  # type: ignore[attr-defined]
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, bool | int | float | str | None) else str(value)

    return {key: plain(value) for key, value in config._asdict().items()}


def inspect(parts: Parts) -> dict[str, Any]:
    """vCPUs, the SynIC with each VP's, its routes and connections, the bus with its channels and rings, the
    devices, PCI and NICs.
    """
    return {
        "vcpus": [_vcpu(thread) for thread in parts.platform.threads],
        "synic": None if parts.hyperv.partition is None else parts.hyperv.partition.snapshot(),
        "vmbus": None if parts.bus is None else parts.bus.host.snapshot(),
        "devices": devices(parts.bus),
        "pci": None if parts.pci is None else parts.pci.inspect(),
        "network": {} if parts.nics is None else parts.nics.inspect(),
    }


def beyond_the_bus(parts: Parts) -> dict[str, Any]:
    """What a dump shows besides VMBus: PCI and its queues, and the wires of the NICs."""
    found: dict[str, Any] = {} if parts.pci is None else {"pci": parts.pci.inspect()}
    if parts.nics is not None and parts.nics.nics:
        found["wires"] = {name: nic.wire.inspect() for name, nic in list(parts.nics.nics.items())}
    return found


def exit_counts(platform: Platform) -> dict[str, int]:
    """Exits of all vCPUs so far, by the C name of the reason. Any thread."""
    from hvkvm.kvm.exit_names import exit_name

    total: Counter[str] = Counter()
    for thread in platform.threads:
        total.update({exit_name(reason): count for reason, count in list(thread.exit_counts.items())})
    return dict(total)


def _vcpu(thread: VcpuThread) -> dict[str, Any]:
    from hvkvm.kvm.exit_names import exit_name

    exits = {exit_name(reason): count for reason, count in list(thread.exit_counts.items())}
    last = [exit_name(reason) for reason in list(thread.last_exits)]
    return {"name": thread.name, "state": thread.state, "last_exits": last, "exits": exits}


def devices(bus: Bus | None) -> dict[str, Any]:
    """The devices on the bus: whether a driver is there, the versions it chose, and what they count."""
    if bus is None:
        return {}
    connections = bus.vsock.connections
    vsock = {"service": bus.vsock.service, **connections.counters._asdict()}
    vsock["connections"] = connections.describe()
    others = {
        name: entry.device.inspect() for name, entry in list(bus.devices.items()) if name not in DEVICES
    }
    return {**{name: _device(getattr(bus, name)) for name in DEVICES}, "vsock": vsock, **others}


def _device(device: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": device.ready_for_requests}
    for key in ("frame_version", "message_version"):
        if hasattr(device, key):
            version = getattr(device, key)
            found[key] = None if version is None else f"{version[0]}.{version[1]}"
    return found | {key: getattr(device, key) for key in _SHOWN if hasattr(device, key)}
