"""A running machine's inside as text for people: what `hvkvm ctl inspect` and dumps print.

Takes the plain values of `machine.inspect`, which may have come by a socket. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvkvm.observe import tree

Values = Mapping[str, Any]

MOST_FLAGS = 16
"""Event flags of a SINT that are named."""


def inspect_lines(inside: Values) -> list[str]:
    """All of `machine.inspect.inspect`."""
    found = []
    for vcpu in inside["vcpus"]:
        exits = ", ".join(f"{_short(name)} {count}" for name, count in vcpu["exits"].items())
        found.append(f"{vcpu['name']}: {vcpu['state']}; exits: {exits or 'none'}")
    if inside["synic"] is not None:
        found += synic_lines(inside["synic"])
    if inside["vmbus"] is not None:
        found += bus_lines(inside["vmbus"]) + device_lines(inside["devices"])
    if inside.get("pci"):
        found += tree.lines({"pci": inside["pci"]})
    if inside.get("network"):
        found += tree.lines({"network": inside["network"]})
    return found


def _short(exit_name: str) -> str:
    return exit_name.removeprefix("KVM_EXIT_")


def synic_lines(synic: Values) -> list[str]:
    """`Partition.snapshot`: each VP, a line for each SINT in use, then the connections."""
    lines = [line for vp in synic.get("vps", ()) for line in _vp_lines(vp)]
    lines += [tree.lines(route)[0] for route in synic["routes"]]
    lines += tree.lines({"connections": synic["connections"]})
    return [f"synic: {line}" for line in lines]


def _vp_lines(vp: Values) -> list[str]:
    """A VP's pages, then each SINT and timer of which there is something to say."""
    pages = f"message page {vp['messages_at'] or 'off'}, event page {vp['events_at'] or 'off'}"
    found = [f"vp {vp['vp']}: {'on' if vp['on'] else 'off'}, {pages}"]
    for number, sint in vp["sints"].items():
        words = [sint["register"]] if "register" in sint else []
        if "message" in sint:
            words.append(f"{sint['message']} in its slot{' and another waits' * sint['pending']}")
        if flags := sint.get("flags"):
            more = f" and {len(flags) - MOST_FLAGS} more" if len(flags) > MOST_FLAGS else ""
            words.append(f"event flags {' '.join(map(str, flags[:MOST_FLAGS]))}{more} set")
        found.append(f"  sint {number}: {', '.join(words)}")
    return found + [f"  synthetic timer {number}: {text}" for number, text in vp["timers"].items()]


def bus_lines(bus: Values) -> list[str]:
    """`VmbusHost.snapshot`: the connection, then each channel, and the rings of an open one."""
    complaints = ", ".join(f"{kind} {count}" for kind, count in bus["complaints"].items())
    head = f"vmbus: {bus['state']}, version {bus['version'] or 'none'}, features {bus['features']:#x}"
    if bus.get("interrupt_page"):
        head += f", interrupt page {bus['interrupt_page']:#x}"
    head += f", messages to vp {bus['message_vp']} sint {bus['message_sint']}"
    head += f", {bus['from_guest_waiting']} wait from the guest, {bus['to_guest_waiting']} for it"
    gpadls = f"  {bus['gpadls']} GPADLs, {bus['gpadls_unfinished']} of them unfinished"
    found = [head, f"{gpadls}; complaints: {complaints or 'none'}"]
    for channel in bus["channels"]:
        found += _channel_lines(channel)
    ended: Values = bus.get("ended") or {}
    return found + [f"  {name}: ended by its own fault: {why}" for name, why in ended.items()]


def _channel_lines(channel: Values) -> list[str]:
    index = channel["sub_channel_index"]
    head = f"  {channel['name']}{f'.{index}' if index else ''}: {channel['state']}"
    head += ", withdrawn" if channel["withdrawn"] else ""
    if channel["relid"]:
        head += f", relid {channel['relid']}"
    gpadls = ", ".join(f"GPADL {gpadl} of {pages} pages" for gpadl, pages in channel["gpadls"].items())
    head += f", {gpadls}" if gpadls else ""
    opened = channel["open"]
    if opened is None:
        return [head]
    target = "no vp" if opened["interrupt_vp"] is None else f"vp {opened['interrupt_vp']}"
    head += f", interrupts {target} by flag {opened['event_flag']}, {opened['signals']} times"
    head += f", doorbell {opened['doorbell']:#x}"
    return [
        head,
        f"    from guest: {_ring(opened['from_guest'])}",
        f"    to guest: {_ring(opened['to_guest'])}",
    ]


def _ring(ring: Values) -> str:
    free = "?" if ring["free"] is None else ring["free"]
    text = f"{ring['packets']} packets, write {ring['write_index']:#x} read {ring['read_index']:#x}"
    text += f", {free} of {ring['size']} bytes free, mask {ring['interrupt_mask']}"
    text += f", pending {ring['pending_send_sz']}"
    return f"{text}, broken: {ring['broken']}" if ring["broken"] else text


def device_lines(devices: Values) -> list[str]:
    """`machine.inspect.devices`."""
    return tree.lines({"devices": devices})
