"""A device's code that raises ends that device alone, with its reason told once and kept for inspection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vsock_pairs import Make, from_host, ways

from hvkvm.abi import hvsock, ic, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.devices.synth.heartbeat import INTERVAL, Heartbeat
from hvkvm.observe.bus_text import bus_lines
from hvkvm.runtime.guard import MAX_TEXT, fault_text
from hvkvm.testing.ic_driver import IcDriver
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.channel_devices import MAX_ENDED
from hvkvm.vmbus.server import BusState

MAKER = "the device's own mistake"

pytestmark = pytest.mark.usefixtures("mistakes_are_ours")


def failing(echo: type[Any], where: str) -> Any:
    """An echo that raises in the callback `where`."""

    def raises(self: Any, *_: object) -> None:
        raise KeyError(MAKER)

    return type("Failing", (echo,), {where: raises})(2)


def two_open(loop: Loopback, device: Any, other: Any) -> tuple[Any, Any]:
    loop.host.add(device)
    loop.host.add(other)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    ours, theirs = loop.client.offers.values()
    loop.open(theirs)
    return ours, theirs


def told(loop: Loopback) -> list[str]:
    return [event.text for event in loop.notes.events if "failed" in event.text]  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["opened", "received", "ready", "close", "release_gpadl"])
def test_what_a_callback_raises_ends_that_device(loopback: Any, echo: Any, where: str) -> None:
    loop = loopback()
    device, other = failing(echo, where), echo(1)
    channel, living = two_open(loop, device, other)
    loop.open(channel)
    if where == "received":
        channel.opened.send(b"12345678")
    elif where == "close":
        loop.client.close(channel)
    elif where == "release_gpadl":
        extra = loop.client.post_gpadl(channel.relid, [60, 61])
        loop.run()
        loop.client.post(wire.GPADL_TEARDOWN, relid=channel.relid, gpadl=extra)
    loop.run()
    assert channel.rescinded
    (text,) = told(loop)
    assert text.startswith("device failed: echo2 (relid 1, ")
    assert f'KeyError: "{MAKER}" (test_vmbus_faults.py:' in text
    assert any(MAKER in line and "echo2: ended" in line for line in bus_lines(loop.host.snapshot()))
    # The guest leaves as Linux does, and the device beside it never noticed.
    loop.client.release(channel)
    loop.run()
    assert where == "close" or "closed" in device.log
    living.opened.send(b"abcdefgh")
    loop.run()
    assert [packet.payload for packet in living.received] == [b"abcdefgh"]
    assert [c["name"] for c in loop.host.snapshot()["channels"]] == ["echo1"]
    assert len(told(loop)) == 1


def test_a_device_that_failed_is_called_no_more_while_it_waits_to_be_ended(loopback: Any, echo: Any) -> None:
    loop = loopback()
    device = failing(echo, "ready")
    channel, _living = two_open(loop, device, echo(1))
    loop.open(channel)
    got = len(device.got)
    for _ in range(3):
        channel.opened.send(b"12345678")
        loop.synic.signal(channel.connection_id)
        loop._deliver_doorbell() if loop.synic.doorbells else None
    assert len(device.got) == got
    loop.run()
    assert channel.rescinded


def test_a_failing_timer_ends_its_device(loopback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loopback()
    device = Heartbeat(loop.call_later)
    driver = IcDriver(loop, device)
    driver.negotiate()
    monkeypatch.setattr(device, "ask", lambda *_: 1 // 0)
    driver.serve(lambda _body: (0, None))
    loop.advance(INTERVAL)
    loop.run()
    assert driver.channel.rescinded
    assert "ZeroDivisionError" in loop.host.snapshot()["ended"]["heartbeat"]
    assert not any(timer.active for timer in loop.timers)
    loop.advance(10 * INTERVAL)
    assert len(told(loop)) == 1


def test_what_a_callers_reply_raises_ends_the_device_it_asked(loopback: Any) -> None:
    loop = loopback()
    device = Heartbeat(loop.call_later)
    driver = IcDriver(loop, device)
    driver.negotiate()
    (payload,) = driver.requests()
    device.ask(1, b"", lambda _status, _body: 1 // 0)
    driver.answer(payload)
    (payload,) = driver.requests()
    driver.answer(payload)
    assert driver.channel.rescinded
    assert not device.ready_for_requests


def test_a_reply_that_raises_keeps_no_answer_from_the_others(loopback: Any) -> None:
    loop = loopback()
    device = Heartbeat(loop.call_later)
    driver = IcDriver(loop, device)
    driver.negotiate()
    heard: list[int] = []
    device.ask(1, b"", lambda _status, _body: 1 // 0)
    device.ask(1, b"", lambda status, _body: heard.append(status))
    driver.close()
    assert heard == [ic.HV_E_FAIL]
    assert not any(timer.active for timer in loop.timers)
    assert "ZeroDivisionError" in loop.host.snapshot()["ended"]["heartbeat"]


def test_what_a_stream_raises_ends_that_stream_alone(make_vsock: Make) -> None:
    bench = make_vsock()
    other, other_guest = from_host(bench, 1)
    program, guest = from_host(bench, 2)
    (connection,) = (c for c in bench.vsock.connections.live if "port 2" in c.offer.name)
    connection._to_guest = lambda: 1 // 0  # type: ignore[assignment, method-assign]
    program.outgoing += b"to nobody"
    bench.run(lambda: program.at_end or program.reset)
    bench.run()
    assert guest.state == "gone"
    assert "ZeroDivisionError" in bench.loopback.host.snapshot()["ended"]["vsock to guest port 2"]  # type: ignore[index]
    other_guest.outgoing += b"still here"
    bench.run(lambda: other.incoming == b"still here")


def test_whoever_raises_over_a_guests_connect_has_refused_it(loopback: Any) -> None:
    loop = loopback()
    loop.host.serve_connects(lambda _request: [].pop())
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    for number in range(100):
        loop.client.post(
            wire.TL_CONNECT_REQUEST,
            endpoint_id=hvsock.service_guid(0xC0000000 + number),
            service_id=hvsock.service_guid(5),
        )
        loop.run()
    assert loop.client.count(wire.TL_CONNECT_RESULT) == 100
    assert loop.host.snapshot()["connects_waiting"] == 0
    assert 1 <= len(told(loop)) < 20
    assert loop.host.server.state is BusState.CONNECTED


def test_whoever_raises_when_a_guest_leaves_does_not_keep_it(loopback: Any, echo: Any) -> None:
    loop = loopback()
    heard: list[int] = []
    loop.host.on_leave([].pop)
    loop.host.on_leave(lambda: heard.append(1))
    loop.host.add(echo(1))
    loop.connect(vmbus.VERSION_WIN10)
    loop.host.reset()
    assert heard == [1, 1]  # a contact ends what was before it, too
    loop.connect(vmbus.VERSION_WIN10)
    assert len(loop.client.offers) == 1


def test_the_reasons_that_are_kept_have_a_bound(loopback: Any, echo: Any) -> None:
    loop = loopback()
    for number in range(3 * MAX_ENDED):
        device = failing(echo, "opened")
        device.offer = device.offer._replace(name=f"echo{number}", instance=number.to_bytes(16, "little"))
        channel = loop.host.add(device)
        loop.host.devices.fail(channel, KeyError("x" * 1000))
        loop.run()
    ended = loop.host.snapshot()["ended"]
    assert list(ended) == [f"echo{number}" for number in range(2 * MAX_ENDED, 3 * MAX_ENDED)]
    assert all(len(text) <= MAX_TEXT + 80 for text in ended.values())
    assert loop.host.snapshot()["channels"] == []


def test_a_reason_is_one_line() -> None:
    def inner() -> None:
        raise ValueError("two\nlines")

    def outer(call: Callable[[], None]) -> str:
        try:
            call()
        except ValueError as error:
            return fault_text(error)
        return ""

    assert outer(inner).startswith("ValueError: two lines (test_vmbus_faults.py:")
    assert fault_text(OSError(24, "Too many open files")) == "OSError: [Errno 24] Too many open files"


@ways
def test_small_rings_carry_a_stream(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(pages=3)  # on less, Linux waits for room that its own ring never has
    program, guest = way(bench)
    program.outgoing += bytes(range(256)) * 100
    guest.outgoing += bytes(range(255, -1, -1)) * 100
    program.finish = guest.finish = True
    bench.run(lambda: program.at_end and guest.state == "gone")
    assert guest.incoming == bytes(range(256)) * 100
    assert program.incoming == bytes(range(255, -1, -1)) * 100
