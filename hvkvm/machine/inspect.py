"""A running machine as plain values, for `hvkvm ctl info` and `inspect` and for dumps.

Reads what others own without stopping them: each number is right for its own
moment. Runs no code on vCPU threads, so it never waits. Any thread.
"""

from __future__ import annotations

import os
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvkvm.machine.machine import Machine
    from hvkvm.runtime.vcpu_thread import VcpuThread

DEVICES = ("heartbeat", "shutdown", "timesync", "kvp", "vss", "keyboard")
"""Attributes of `machine.bus` that are devices."""

_SHOWN = ("alive", "beats", "missed", "sent", "state", "frozen", "events", "leds", "waiting")


def info(machine: Machine) -> dict[str, Any]:
    """What the machine is, how long it runs and how often it left the guest."""
    from hvkvm import __version__

    choice = machine.synic_choice
    return {
        "name": machine.name,
        "pid": os.getpid(),
        "hvkvm": __version__,
        "uptime": round(0.0 if machine.started_at is None else monotonic() - machine.started_at, 3),
        "resets": machine.resets,
        "outcome": None if machine.outcome is None else str(machine.outcome),
        "features": str(machine.features),
        "synic": choice.synic if machine.features else None,
        "synic_reason": choice.why,
        "vmbus_version": None if machine.bus is None else machine.bus.host.snapshot()["version"],
        "config": config(machine),
        "exits": machine.exit_counts(),
    }


def config(machine: Machine) -> dict[str, Any]:
    """The configuration as plain values: paths are text, files a table."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, bool | int | float | str | None) else str(value)

    return {key: plain(value) for key, value in machine.config._asdict().items()}


def inspect(machine: Machine) -> dict[str, Any]:
    """vCPUs, the SynIC's routes and connections, the bus with its channels and rings, the devices."""
    return {
        "vcpus": [_vcpu(thread) for thread in machine.threads],
        "synic": None if machine.partition is None else machine.partition.snapshot(),
        "vmbus": None if machine.bus is None else machine.bus.host.snapshot(),
        "devices": devices(machine),
    }


def _vcpu(thread: VcpuThread) -> dict[str, Any]:
    from hvkvm.kvm.exits import exit_name

    exits = {exit_name(reason): count for reason, count in list(thread.exit_counts.items())}
    last = [exit_name(reason) for reason in list(thread.last_exits)]
    return {"name": thread.name, "state": thread.state, "last_exits": last, "exits": exits}


def devices(machine: Machine) -> dict[str, Any]:
    """The devices on the bus: whether a driver is there, the versions it chose, and what they count."""
    bus = machine.bus
    if bus is None:
        return {}
    head, *connections = bus.vsock.describe()
    vsock = {"service": head.removeprefix("vsock "), **bus.vsock.counters._asdict()}
    vsock["connections"] = connections
    return {**{name: _device(getattr(bus, name)) for name in DEVICES}, "vsock": vsock}


def _device(device: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": device.ready_for_requests}
    for key in ("frame_version", "message_version"):
        if hasattr(device, key):
            version = getattr(device, key)
            found[key] = None if version is None else f"{version[0]}.{version[1]}"
    return found | {key: getattr(device, key) for key in _SHOWN if hasattr(device, key)}
