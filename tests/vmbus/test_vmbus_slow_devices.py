"""Devices that take their time: the guest is told that its memory is its own when they say so, not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.pending import Pending
from hvkvm.vmbus.server import BusState

Done = Callable[[], object]


def slow(echo: type[Any]) -> type[Any]:
    """An echo that keeps every `done` for the test to call."""

    class Slow(echo):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.dones: list[Done] = []

        def close(self, done: Done) -> None:
            super().close(lambda: None)
            self.dones.append(done)

        def release_gpadl(self, gpadl_id: int, done: Done) -> None:
            self.log.append(f"release {gpadl_id:#x}")
            self.dones.append(done)

        def rest(self, done: Done) -> None:
            self.log.append("rest")
            self.dones.append(done)

    return Slow


def opened(loop: Loopback, device: Any, version: int = vmbus.VERSION_WIN10_V5_3) -> Any:
    loop.host.add(device)
    loop.connect(version)
    channel = loop.client.by_interface(device.offer.interface)
    loop.open(channel)
    return channel


def test_the_ring_is_the_guests_again_when_the_device_is_done(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = slow(echo)()
    channel = opened(loop, device)
    loop.client.close(channel)
    loop.client.reclaim(channel)
    loop.run()
    assert device.log == ["opened", "closed"]
    assert loop.client.count(wire.GPADL_TORNDOWN) == 0
    (done,) = device.dones
    done()
    done()  # a second call does nothing
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == 1
    loop.open(channel)
    assert device.log == ["opened", "closed", "opened"]
    assert not loop.notes.events


def test_a_gpadl_is_the_guests_again_when_the_device_is_done(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = slow(echo)()
    channel = opened(loop, device)
    extra = loop.client.post_gpadl(channel.relid, [60, 61])
    loop.run()
    for _ in range(2):  # asked again, it is still one question
        loop.client.post(wire.GPADL_TEARDOWN, relid=channel.relid, gpadl=extra)
        loop.run()
    assert device.log == ["opened", f"release {extra:#x}"]
    assert loop.client.count(wire.GPADL_TORNDOWN) == 0
    device.dones.pop()()
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == 1
    assert loop.host.server.reports.counts == {"GPADL_TEARDOWN repeated": 1}


def test_a_close_answers_for_a_gpadl_that_is_still_released(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = slow(echo)()
    channel = opened(loop, device)
    extra = loop.client.post_gpadl(channel.relid, [60, 61])
    loop.client.post(wire.GPADL_TEARDOWN, relid=channel.relid, gpadl=extra)
    loop.run()
    loop.client.close(channel)
    loop.run()
    release, close = device.dones
    release()
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == 0
    close()
    loop.run()
    torn_down = [m["gpadl"] for m in loop.client.messages if m.kind.type == wire.GPADL_TORNDOWN]
    assert torn_down == [extra, channel.gpadl]


def test_a_late_release_does_not_answer_for_the_next_guest(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = slow(echo)()
    channel = opened(loop, device)
    extra = loop.client.post_gpadl(channel.relid, [60, 61])
    loop.client.post(wire.GPADL_TEARDOWN, relid=channel.relid, gpadl=extra)
    loop.run()
    (stale,) = device.dones
    loop.client.contact(vmbus.VERSION_WIN10_V5_3)
    loop.run()
    device.dones[1]()
    loop.run()
    loop.client.post(wire.REQUESTOFFERS)
    loop.run()
    channel = loop.client.by_interface(device.offer.interface)
    loop.open(channel)
    header = {"range_buflen": 16, "rangecount": 1, "relid": channel.relid, "gpadl": extra}
    loop.client.post(wire.GPADL_HEADER, **header, tail=bytes.fromhex("00100000000000003c00000000000000"))
    loop.client.post(wire.GPADL_TEARDOWN, relid=channel.relid, gpadl=extra)
    loop.run()
    torn_down = loop.client.count(wire.GPADL_TORNDOWN)
    stale()
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == torn_down
    device.dones[-1]()
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == torn_down + 1


@pytest.mark.parametrize("leaves_by", ["contact", "unload"])
def test_a_new_kernel_is_answered_behind_the_last_device(loopback: Any, echo: Any, leaves_by: str) -> None:
    loop = loopback()
    device = slow(echo)()
    opened(loop, device)
    answer = wire.VERSION_RESPONSE if leaves_by == "contact" else wire.UNLOAD_RESPONSE
    if leaves_by == "contact":
        loop.client.contact(vmbus.VERSION_WIN10_V5_3)
    else:
        loop.client.post(wire.UNLOAD)
    loop.run()
    assert loop.client.count(answer) == 0
    assert loop.host.server.state is BusState.RESETTING
    device.dones.pop()()
    loop.run()
    assert loop.client.count(answer) == 1


def test_a_removed_device_says_when_it_has_let_go(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = slow(echo)()
    channel = opened(loop, device)
    gone: list[int] = []
    loop.host.remove(loop.host.server.channels.all[0], lambda: gone.append(1))
    loop.run()
    assert channel.rescinded
    assert not gone
    device.dones.pop()()
    assert gone == [1]
    loop.client.release(channel)
    loop.run()
    assert list(loop.host.devices) == []
    loop.host.remove(loop.host.add(echo(9)), lambda: gone.append(2))
    assert gone == [1, 2]


def test_rest_waits_for_what_is_in_flight_and_for_what_is_being_closed(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device, other = slow(echo)(1), slow(echo)(2)
    channel = opened(loop, device)
    loop.host.add(other)
    loop.run()
    loop.client.close(channel)
    loop.client.reclaim(channel)
    loop.run()
    rested: list[int] = []
    loop.host.stop(lambda: rested.append(1))
    loop.run()
    close, rest = device.dones
    (other_rest,) = other.dones
    rest()
    close()
    assert not rested
    other_rest()
    assert rested == [1]
    # The answer waits with everything else for the machine to go on.
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == 0
    loop.host.go_on()
    loop.run()
    assert loop.client.count(wire.GPADL_TORNDOWN) == 1


def test_a_reset_at_rest_closes_everything_there_and_then(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = echo()
    channel = opened(loop, device)
    loop.host.stop(lambda: None)
    loop.host.reset()
    assert device.log == ["opened", "closed"]
    assert loop.host.server.state is BusState.DISCONNECTED
    assert loop.synic.events == {}
    loop.host.go_on()
    loop.run()
    assert not channel.rescinded
    loop.connect(vmbus.VERSION_WIN10)
    assert len(loop.client.offers) == 1


@pytest.mark.usefixtures("mistakes_are_ours")
def test_what_rest_raises_ends_that_device(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = type("Failing", (echo,), {"rest": lambda _self, _done: 1 // 0})()
    channel = opened(loop, device)
    rested: list[int] = []
    loop.host.stop(lambda: rested.append(1))
    assert rested == [1]
    loop.host.go_on()
    loop.run()
    assert channel.rescinded
    assert "ZeroDivisionError" in loop.host.snapshot()["ended"]["echo1"]


def test_pending_runs_what_waits_once_and_in_order() -> None:
    pending = Pending()
    log: list[str] = []
    first, second = (pending.begin(lambda name=name: log.append(name)) for name in ("first", "second"))
    pending.when_none(lambda: log.append("rest"))
    pending.when_none(lambda: log.append("rest too"))
    second()
    second()
    assert log == ["second"]
    first()
    assert log == ["second", "first", "rest", "rest too"]
    pending.when_none(lambda: log.append("at once"))
    assert log[-1] == "at once"
