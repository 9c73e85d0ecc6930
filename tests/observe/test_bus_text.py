"""A machine's inside as text: everything is there, and one thing has one line."""

from __future__ import annotations

from typing import Any

from hvkvm.observe.bus_text import bus_lines, inspect_lines

RING = {
    "packets": 3,
    "size": 12288,
    "write_index": 0x350,
    "read_index": 0x10,
    "free": 11456,
    "interrupt_mask": 1,
    "pending_send_sz": 64,
    "feature_bits": 1,
    "broken": "",
}
CHANNEL: dict[str, Any] = {
    "name": "heartbeat",
    "relid": 1,
    "state": "open",
    "withdrawn": False,
    "sub_channel_index": 0,
    "gpadls": {"0xe1e10": 8},
    "open": {
        "interrupt_vp": 0,
        "interrupt_sint": 2,
        "event_flag": 1,
        "doorbell": 0x2001,
        "signals": 9,
        "from_guest": RING,
        "to_guest": {**RING, "free": None, "broken": "write index 0xffff in a ring"},
    },
}
BUS: dict[str, Any] = {
    "state": "connected",
    "version": "5.3",
    "features": 9,
    "message_vp": 0,
    "message_sint": 2,
    "gpadls": 6,
    "gpadls_unfinished": 1,
    "complaints": {"GPADL refused": 2},
    "from_guest_waiting": 4,
    "to_guest_waiting": 5,
    "channels": [CHANNEL, {**CHANNEL, "relid": 0, "state": "hidden", "gpadls": {}, "open": None}],
}


def test_the_bus() -> None:
    head, gpadls, channel, from_guest, to_guest, hidden = bus_lines(BUS)
    assert head.startswith("vmbus: connected, version 5.3, features 0x9, messages to vp 0 sint 2, ")
    assert head.endswith("4 wait from the guest, 5 for it")
    assert gpadls == "  6 GPADLs, 1 of them unfinished; complaints: GPADL refused 2"
    assert channel.startswith(
        "  heartbeat: open, relid 1, GPADL 0xe1e10 of 8 pages, interrupts vp 0 by flag 1,"
    )
    assert channel.endswith("9 times, doorbell 0x2001")
    ring = "3 packets, write 0x350 read 0x10, {} of 12288 bytes free, mask 1, pending 64"
    assert from_guest == f"    from guest: {ring.format(11456)}"
    assert to_guest == f"    to guest: {ring.format('?')}, broken: write index 0xffff in a ring"
    assert hidden == "  heartbeat: hidden"


def test_a_machine() -> None:
    inside = {
        "vcpus": [
            {"name": "vcpu0", "state": "running guest", "exits": {"KVM_EXIT_IO": 7, "KVM_EXIT_HLT": 1}}
        ],
        "synic": {
            "routes": [{"vp": 0, "sint": 2, "routes": 1, "holders": 1, "messages": ["free"]}],
            "connections": {"message": ["0x1"], "event": {"0x2001": "KVM"}},
        },
        "vmbus": {**BUS, "channels": []},
        "devices": {"vss": {"driver": True, "state": "frozen"}},
        "pci": {"nvme": {"03": {"queues": {"1": "8 entries"}}}},
    }
    text = "\n".join(inspect_lines(inside))
    assert text.startswith("vcpu0: running guest; exits: IO 7, HLT 1\nsynic: vp 0, sint 2, routes 1,")
    assert "0x2001 KVM" in text
    assert text.endswith("\ndevices: vss: driver yes, state frozen\npci: nvme: 03: queues: 1: 8 entries")
    bare = {"vcpus": [], "synic": None, "vmbus": None, "devices": {}}
    assert inspect_lines(bare) == []
