"""A bus in one process, saved, and gone on with by another host."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hvkvm.state.codec import plain, restored
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.host import VmbusHost
from hvkvm.vmbus.saved_host import HostState


def through_json(state: Any) -> Any:
    return restored(type(state), json.loads(json.dumps(plain(state))), "it")


def swap(
    loop: Loopback,
    devices: list[Any],
    change: Callable[[Any], Any] = lambda tree: tree,
    *,
    at_rest: Callable[[], object] = lambda: None,
) -> None:
    """Save the host and its devices; another host with `devices` goes on. What was on its way is lost.

    `at_rest()` is what the loop does while the disks of a machine that stands still are made stable.
    """
    old = loop.host
    for _ in range(3):  # what vCPUs had left on the loop runs before the parts stop
        for _ in range(len(loop.deferred)):
            loop._run_deferred()
    rested: list[bool] = []
    old.stop(lambda: rested.append(True))
    while not rested:
        loop._run_deferred()
    at_rest()
    while loop.deferred:
        loop._run_deferred()
    tree = change(json.loads(json.dumps(plain(old.save()))))
    states = {
        device.offer.key: through_json(device.save())
        for _, device in old.devices
        if hasattr(device, "save") and not device.offer.sub_channel_index
    }
    synic = loop.synic
    for left in (synic.handlers, synic.events, synic.messages, synic.doorbells, loop.deferred, loop.timers):
        left.clear()
    host = loop.host = VmbusHost(
        synic, loop.memory, synic.vp_count, loop.call_soon, loop.call_later, observer=loop.notes
    )
    host.attach()
    for device in devices:
        host.add(device)
    state = restored(HostState, tree, "VMBus")
    host.load(state, {id(device): states[device.offer.key] for device in devices if hasattr(device, "load")})
    host.go_on()
