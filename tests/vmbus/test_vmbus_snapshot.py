"""What `hvkvm ctl inspect` shows of the bus: plain values in every state, also of rings without sense."""

from __future__ import annotations

import json
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi.ring import WORD_WRITE_INDEX


def plain(value: Any) -> Any:
    """What becomes of it as JSON; TypeError for what is no plain value."""
    return json.loads(json.dumps(value))


def test_a_bus_without_a_guest(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo())
    state = plain(loop.host.snapshot())
    assert (state["state"], state["version"], state["gpadls"]) == ("disconnected", None, 0)
    (channel,) = state["channels"]
    assert (channel["name"], channel["relid"], channel["state"], channel["open"]) == (
        "echo1",
        0,
        "hidden",
        None,
    )


def test_an_open_channel_shows_its_rings(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = echo()
    loop.host.add(device)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    client = loop.client.by_interface(device.offer.interface)
    loop.open(client, out_pages=3, in_pages=4, vp_index=1)
    client.opened.send(b"12345678")
    loop.run()
    state = plain(loop.host.snapshot())
    assert (state["state"], state["version"]) == ("connected", "5.3")
    assert state["gpadls"] == 1
    (channel,) = state["channels"]
    assert channel["gpadls"] == {f"{client.gpadl:#x}": 7}
    assert (channel["target_vp"], channel["connection_id"]) == (1, client.connection_id)
    assert channel["interface"] == vmbus.guid_text(device.offer.interface)
    opened = channel["open"]
    assert (opened["interrupt_vp"], opened["interrupt_sint"]) == (1, 2)
    assert opened["signals"] == 1
    here, there = opened["from_guest"], opened["to_guest"]
    assert (here["size"], there["size"]) == (2 * 4096, 3 * 4096)
    # 16 bytes of descriptor, 8 of payload, 8 behind it, and the guest has read its answer.
    assert (here["packets"], here["write_index"], here["read_index"], here["free"]) == (1, 32, 32, 2 * 4096)
    assert (there["packets"], there["write_index"], there["free"]) == (1, 32, 3 * 4096)
    client.opened.writer.words[WORD_WRITE_INDEX] = 0xFFFFFFF8
    (channel,) = plain(loop.host.snapshot())["channels"]
    assert (channel["open"]["from_guest"]["free"], channel["open"]["from_guest"]["broken"]) == (None, "")


def test_complaints_are_counted_by_kind(loopback: Any, echo: Any) -> None:
    loop = loopback()
    loop.host.add(echo())
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    loop.client.post("CLOSECHANNEL", relid=77)
    loop.client.post("CLOSECHANNEL", relid=78)
    loop.run()
    assert plain(loop.host.snapshot())["complaints"] == {"CLOSECHANNEL ignored": 2}
