"""The control socket's requests to the guest, against a driver in the loopback that does as the test says."""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack, unpack_from
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.abi import ic, kvp, vss
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.ic import MAX_WAITING, IntegrationComponent
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vss import Vss
from hvkvm.machine import control_guest
from hvkvm.testing.ic_driver import IcDriver
from hvkvm.testing.vmbus_loopback import Loopback

E_FAIL = ic.HV_E_FAIL


class Answers:
    """What a client would be told; stands for `control_socket.Answer`."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.wanted = True

    def ok(self, result: object = None) -> None:
        self.told.append(("ok", result))

    def fail(self, kind: str, text: str) -> None:
        self.told.append((kind, text))


class NoTimer:
    def cancel(self) -> None:
        pass


def never(_seconds: float, _fn: object, *_args: object) -> NoTimer:
    return NoTimer()


class World:
    """A machine with one device on its bus, and the guest's driver."""

    def __init__(self, loop: Loopback, name: str, device: IntegrationComponent, version: ic.Version) -> None:
        self.loop = loop
        self.waits: list[tuple[object, int | None]] = []
        self.parts = SimpleNamespace(
            bus=SimpleNamespace(**{name: device}), lifecycle=SimpleNamespace(resets=5)
        )
        wait = lambda answer, resets: self.waits.append((answer, resets))  # noqa: E731
        self.requests = control_guest.requests(self.parts, wait)  # type: ignore[arg-type]
        self.driver = IcDriver(loop, device, version)

    def ask(self, do: str, **more: Any) -> Answers:
        answer = Answers()
        self.requests[do]({"do": do, **more}, answer)  # type: ignore[arg-type]
        self.loop.run()
        return answer

    def pending(self) -> bytes:
        (payload,) = self.driver.requests()
        return payload


@pytest.fixture
def loop() -> Iterator[Loopback]:
    loop = Loopback()
    yield loop
    loop.close()


def made(loop: Loopback, name: str) -> World:
    devices: dict[str, tuple[IntegrationComponent, ic.Version]] = {
        "heartbeat": (Heartbeat(never), (3, 0)),
        "shutdown": (Shutdown(), (3, 2)),
        "timesync": (TimeSync(never, lambda: 7), (4, 0)),
        "kvp": (Kvp(), (4, 0)),
        "vss": (Vss(), (5, 0)),
    }
    return World(loop, name, *devices[name])


CALLS: list[tuple[str, str, dict[str, str]]] = [
    ("heartbeat", "heartbeat", {}),
    ("shutdown", "shutdown", {"what": "reboot"}),
    ("timesync", "time", {"what": "sync"}),
    ("kvp", "kvp", {"what": "list", "pool": "auto"}),
    ("vss", "freeze", {}),
    ("vss", "thaw", {}),
]


@pytest.mark.parametrize(("name", "do", "more"), CALLS)
def test_without_bus_device_or_driver_the_answer_says_so(
    loop: Loopback, name: str, do: str, more: dict[str, str]
) -> None:
    world = made(loop, name)
    ((kind, text),) = world.ask(do, **more).told
    assert kind == "guest"
    assert control_guest.MODULES[name] in text
    world.parts.bus = SimpleNamespace()
    assert world.ask(do, **more).told == [("absent", f"this VM has no {name} device")]
    world.parts.bus = None
    assert world.ask(do, **more).told == [("absent", "this VM has no VMBus; start it with --vmbus on")]


@pytest.mark.parametrize(("name", "do", "more"), [call for call in CALLS if call[1] != "heartbeat"])
def test_a_guest_that_leaves_is_an_answer(loop: Loopback, name: str, do: str, more: dict[str, str]) -> None:
    world = made(loop, name)
    world.driver.negotiate()
    world.driver.requests()  # a first SYNC, say
    answer = world.ask(do, **more)
    assert answer.told == []
    world.driver.close()
    ((kind, text),) = answer.told
    assert kind == "guest"
    assert text


@pytest.mark.parametrize(("what", "flags"), [("power-off", 1), ("reboot", 3), ("hibernate", 4)])
def test_shutdown_is_told_when_the_guest_has_accepted(loop: Loopback, what: str, flags: int) -> None:
    world = made(loop, "shutdown")
    world.driver.negotiate()
    answer = world.ask("shutdown", what=what)
    payload = world.pending()
    assert unpack_from("<I", payload, 36) == (flags,)
    assert answer.told == []
    world.driver.answer(payload)
    assert answer.told == [("ok", {"accepted": True})]
    answer = world.ask("shutdown", what=what)
    world.driver.answer(world.pending(), status=E_FAIL)
    ((kind, text),) = answer.told
    assert (kind, text.startswith(f"the guest refuses to {what}: ")) == ("guest", True)


@pytest.mark.parametrize(("what", "resets"), [("power-off", None), ("reboot", 5)])
def test_who_waits_for_a_shutdown_is_told_later(loop: Loopback, what: str, resets: int | None) -> None:
    world = made(loop, "shutdown")
    world.driver.negotiate()
    answer = world.ask("shutdown", what=what, wait=True)
    payload = world.pending()
    world.parts.lifecycle.resets = 6  # what counts is what was before the request
    world.driver.answer(payload)
    assert answer.told == []
    assert world.waits == [(answer, resets)]
    refused = world.ask("shutdown", what=what, wait=True)
    world.driver.answer(world.pending(), status=E_FAIL)
    assert refused.told[0][0] == "guest"
    assert len(world.waits) == 1


def test_too_many_requests_are_refused_at_once(loop: Loopback) -> None:
    world = made(loop, "shutdown")
    world.driver.negotiate()
    told = [world.ask("shutdown", what="reboot") for _ in range(MAX_WAITING + 5)]
    full = [answer for answer in told if answer.told]
    assert len(full) == 4  # one is under way, MAX_WAITING wait
    assert all(answer.told[0][0] == "guest" and "too many" in answer.told[0][1] for answer in full)


@pytest.mark.parametrize(
    ("name", "do", "more"),
    [
        ("shutdown", "shutdown", {"what": "power-off"}),
        ("timesync", "time", {"what": "sync"}),
        *[
            ("kvp", "kvp", {"what": what, "pool": "external", "key": "k", "value": "v"})
            for what in ("get", "set", "delete", "list")
        ],
    ],
)
def test_what_nobody_waits_for_is_not_sent(loop: Loopback, name: str, do: str, more: dict[str, str]) -> None:
    """A guest whose driver hung met all that its operator had given up meanwhile, power-offs among it."""
    world = made(loop, name)
    world.driver.negotiate()
    first = world.ask(do, **more)
    queued = [world.ask(do, **more) for _ in range(5)]
    for answer in (first, *queued[:4]):
        answer.wanted = False
    seen = world.driver.serve(lambda _body: (E_FAIL, None))
    assert seen == 2, "what was on its way, and what is wanted"
    assert len(queued[4].told) == 1


def test_what_nobody_waits_for_takes_no_room(loop: Loopback) -> None:
    world = made(loop, "shutdown")
    world.driver.negotiate()
    given_up = [world.ask("shutdown", what="reboot") for _ in range(MAX_WAITING + 1)]
    for answer in given_up:
        answer.wanted = False
    assert world.ask("shutdown", what="reboot").told == []


def test_a_list_that_nobody_waits_for_ends(loop: Loopback) -> None:
    world = made(loop, "kvp")
    world.driver.negotiate()
    answer = world.ask("kvp", what="list", pool="guest")

    def daemon(body: bytes) -> tuple[int, bytes]:
        answer.wanted = False
        return 0, pair(body, 8, "a", "1")

    assert world.driver.serve(daemon) == 1


def test_time(loop: Loopback) -> None:
    world = made(loop, "timesync")
    assert world.ask("time", what="show").told[0][1]["driver"] is False
    world.driver.negotiate()
    world.driver.answer(world.pending())
    shown = world.ask("time", what="show").told[0][1]
    assert (shown["version"], shown["sent"]) == ("4.0", {"sync": 1, "sample": 0})
    answer = world.ask("time", what="sync")
    payload = world.pending()
    assert payload[44] == ic.ICTIMESYNCFLAG_SYNC
    assert answer.told == []
    world.driver.answer(payload)
    assert answer.told[0][1]["sent"] == {"sync": 2, "sample": 0}
    answer = world.ask("time", what="sync")
    world.driver.answer(world.pending(), status=E_FAIL)
    assert answer.told[0][0] == "guest"


def test_heartbeats(loop: Loopback) -> None:
    world = made(loop, "heartbeat")
    world.driver.negotiate()
    assert world.ask("heartbeat").told == [("ok", {"alive": False, "beats": 0, "missed": 0})]
    payload = world.pending()
    world.driver.answer(payload, pack("<Q", 2))
    assert world.ask("heartbeat").told == [("ok", {"alive": True, "beats": 1, "missed": 0})]


def pair(body: bytes, at: int, key: str, value: str) -> bytes:
    raw_key, raw = (f"{word}\0".encode("utf-16-le") for word in (key, value))
    packed = kvp.hv_kvp_exchg_msg_value.pack(kvp.REG_SZ, len(raw_key), len(raw), raw_key, raw)
    return body[:at] + packed + body[at + len(packed) :]


@pytest.mark.parametrize("pool", list(control_guest.POOLS))
def test_key_value_pairs_are_read(loop: Loopback, pool: str) -> None:
    world = made(loop, "kvp")
    world.driver.negotiate()
    facts = [("a", "1"), ("b", "2"), ("c", "3")]

    def daemon(body: bytes) -> tuple[int, bytes | None]:
        assert tuple(body[:2]) == (kvp.KVP_OP_ENUMERATE, control_guest.POOLS[pool])
        (index,) = unpack_from("<I", body, 4)
        return (ic.HV_S_CONT, None) if index == len(facts) else (0, pair(body, 8, *facts[index]))

    def asked(**more: str) -> tuple[str, object]:
        answer = world.ask("kvp", pool=pool, **more)
        world.driver.serve(daemon)
        (told,) = answer.told
        return told

    assert asked(what="get", key="b") == ("ok", {"pairs": [["b", "2"]], "note": ""})
    assert asked(what="get", key="z") == ("missing", f"z: no such key in the pool {pool}")
    assert asked(what="list") == ("ok", {"pairs": [list(fact) for fact in facts], "note": ""})


def test_key_value_pairs_are_written(loop: Loopback) -> None:
    world = made(loop, "kvp")
    world.driver.negotiate()
    answer = world.ask("kvp", what="set", pool="external", key="a", value="b")
    payload = world.pending()
    assert tuple(payload[28:30]) == (kvp.KVP_OP_SET, kvp.KVP_POOL_EXTERNAL)
    world.driver.answer(payload)
    assert answer.told == [("ok", {"pairs": [], "note": ""})]
    answer = world.ask("kvp", what="delete", pool="guest", key="a")
    payload = world.pending()
    assert tuple(payload[28:30]) == (kvp.KVP_OP_DELETE, kvp.KVP_POOL_GUEST)
    world.driver.answer(payload, status=ic.HV_S_CONT)
    assert answer.told == [("missing", "a: no such key in the pool guest")]
    for what, more in (("get", {}), ("delete", {}), ("set", {"value": ""})):
        ((kind, text),) = world.ask("kvp", what=what, pool="guest", key="k" * 300, **more).told
        assert (kind, "255 fit" in text) == ("guest", True)
    ((kind, text),) = world.ask("kvp", what="set", pool="guest", key="k", value="v" * 1024).told
    assert (kind, "1023 fit" in text) == ("guest", True)


def test_freeze_and_thaw(loop: Loopback) -> None:
    world = made(loop, "vss")
    world.driver.negotiate()
    for do, operation, state in (
        ("freeze", vss.VSS_OP_FREEZE, "frozen"),
        ("thaw", vss.VSS_OP_THAW, "thawed"),
    ):
        answer = world.ask(do)
        payload = world.pending()
        assert payload[28] == operation
        assert answer.told == []
        world.driver.answer(payload)
        assert answer.told == [("ok", {"state": state})]


def test_a_freeze_that_nobody_waits_for_any_more_is_undone(loop: Loopback) -> None:
    world = made(loop, "vss")
    world.driver.negotiate()
    answer = world.ask("freeze")
    payload = world.pending()
    answer.wanted = False  # its client's patience, or the client itself, has ended
    world.driver.answer(payload)
    loop.run()
    assert world.pending()[28] == vss.VSS_OP_THAW
