"""A NIC that is taken away: the cable first, and nothing that the guest has sent stays uncompleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.abi.rndis import RNDIS_STATUS_MEDIA_CONNECT as UP
from hvkvm.abi.rndis import RNDIS_STATUS_MEDIA_DISCONNECT as DOWN
from hvkvm.devices.synth import netvsp
from hvkvm.machine import nic_leaving
from hvkvm.machine.bus import Bus
from hvkvm.machine.nic_leaving import AGAIN_SECONDS, HEED_SECONDS, LEAVE_SECONDS
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.nics import Nics
from hvkvm.net.base import BasePort
from hvkvm.net.port import ALL_OFFLOADS, Frame
from hvkvm.testing.netvsc_driver import NetvscDriver, data_message
from hvkvm.testing.vmbus_loopback import Loopback

FRAME = bytes.fromhex("020000000001020304050607") + b"\x88\xb5".ljust(48, b"x")
FOR_GUEST = bytes.fromhex("ffffffffffff020000000001") + b"\x88\xb5".ljust(1400, b"y")
STEP = 0.005


class Wire(BasePort):
    """It takes everything, or nothing, and is closed once."""

    kind = "test"

    def __init__(self, io: Any) -> None:
        super().__init__(io, 1500, offloads=ALL_OFFLOADS)
        self.full = False
        self.closed = 0

    def _transmit(self, frames: Sequence[Frame], _queue: int) -> int:
        return 0 if self.full else len(frames)

    def _read_on(self) -> None:
        pass

    def _read_off(self) -> None:
        pass

    def inspect(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        self.closed += 1

    def bring(self, frame: bytes) -> None:
        self._deliver([(memoryview(bytes(12)), memoryview(frame))])


class World:
    """A machine's NICs on the loopback's bus, one of them with a wire and a guest; time passes by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = loop = Loopback(pages=list(range(64, 1020)), vp_count=2)
        loop.now = 1000.0
        for module in (netvsp, nic_leaving):
            monkeypatch.setattr(module, "monotonic", lambda: loop.now)
        self.io = SimpleNamespace(call_later=loop.call_later, call_soon=loop.call_soon, in_loop=lambda: True)
        config = SimpleNamespace(nets=(), cpus=2)
        platform: Any = SimpleNamespace(config=config, io=self.io, memory=loop.memory, observer=None)
        bus: Any = type("Buses", (), {"add": Bus.add, "remove": Bus.remove})()
        bus.host, bus.devices = loop.host, {}
        self.nics = Nics(platform, bus, "vm", ExitStack())
        self.nics.start()
        self.wire = Wire(self.io)
        self.nic = self.nics.add(NicSpec("user", queues=1), self.wire).device
        self.driver = NetvscDriver(loop)
        self.removed: list[float] = []
        """When: empty until it is, in seconds since the order."""

    def boot(self) -> None:
        self.driver.start(send_pages=24 * 6144 // 4096)
        self.loop.run()

    def remove(self) -> None:
        begun = self.loop.now
        self.nics.remove("net0", lambda: self.removed.append(self.loop.now - begun))

    def pass_time(self, seconds: float, and_do: Callable[[], object] = lambda: None) -> None:
        """In small steps, with all that it sets off, until the NIC has been removed."""
        end = self.loop.now + seconds
        while self.loop.now < end and not self.removed:
            and_do()
            self.loop.advance(STEP)
            self.loop.run()

    def rest(self) -> None:
        done: list[int] = []
        self.nics.stop(lambda: self.loop.host.stop(lambda: done.append(1)))
        self.loop.run()
        assert done

    def go_on(self) -> None:
        self.loop.host.go_on()
        self.nics.start()
        self.loop.run()

    def send(self) -> Any:
        return self.driver.send_pages_of(data_message(FRAME))

    def completed(self, ident: Any) -> bool:
        return ident in [done for done, _payload in self.driver.completions]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Its guest heard of its link long ago."""
    world = World(monkeypatch)
    world.boot()
    world.pass_time(2 * AGAIN_SECONDS)
    assert world.driver.indications[-1:] == [UP]
    yield world
    world.nics.close()
    assert world.wire.closed == 1
    assert not world.nics.leaving
    world.loop.close()


def test_the_guest_hears_that_its_link_is_down_and_is_given_time_to_heed_it(world: World) -> None:
    world.remove()
    world.pass_time(HEED_SECONDS * 0.9)
    assert world.driver.indications[-1] == DOWN
    assert not world.removed
    world.pass_time(HEED_SECONDS)
    assert world.removed
    assert world.wire.closed == 1
    assert "net0" not in world.nics.nics


def test_one_that_has_just_heard_of_a_link_is_given_more(world: World) -> None:
    world.nic.link(False)
    world.loop.run()
    world.pass_time(0.5)
    world.remove()
    world.pass_time(AGAIN_SECONDS - 0.6)
    assert not world.removed
    world.pass_time(0.2)
    assert world.removed


@pytest.mark.parametrize("full", [False, True])
def test_what_the_guest_sends_meanwhile_is_completed_and_it_is_left_at_last(world: World, full: bool) -> None:
    world.wire.full = full
    idents = [world.send()]
    world.remove()
    world.pass_time(2 * LEAVE_SECONDS, lambda: idents.append(world.send()))
    assert LEAVE_SECONDS <= world.removed[0] <= LEAVE_SECONDS + 0.1
    assert all(world.completed(ident) for ident in idents)


def test_a_nic_that_no_guest_has_goes_at_once(world: World) -> None:
    world.driver.leave()
    world.loop.run()
    world.remove()
    assert world.removed == [0]


def test_removed_twice_it_is_gone_for_both(world: World) -> None:
    world.remove()
    world.pass_time(0.1)
    world.remove()
    world.pass_time(1)
    assert len(world.removed) == 2


def test_the_clock_runs_from_when_the_guest_has_heard_it(world: World) -> None:
    """One without room or time hears it later, and one that is still told of another link later yet."""
    world.driver.complete = False
    world.nic.link(False)
    world.loop.run()
    world.nic.link(True)
    world.pass_time(1)
    world.remove()
    world.pass_time(1)
    assert (world.driver.indications[-2:], world.removed) == ([UP, DOWN], []), "of before"
    world.driver.complete_all()
    world.loop.run()  # that it is up is told by no word: it is not
    world.pass_time(AGAIN_SECONDS * 0.9)
    assert not world.removed
    world.pass_time(0.5)
    assert world.removed


def test_a_guest_that_takes_no_word_is_left_at_last(world: World) -> None:
    world.driver.complete = False
    world.remove()
    world.pass_time(LEAVE_SECONDS * 0.95)
    assert not world.removed
    world.pass_time(LEAVE_SECONDS * 0.1)
    assert world.removed


def test_a_rest_on_the_way_counts_for_nothing_and_plugs_no_cable_in(world: World) -> None:
    world.remove()
    world.pass_time(0.05)
    world.rest()
    world.pass_time(2 * LEAVE_SECONDS)
    assert not world.removed
    world.go_on()
    world.wire.bring(FOR_GUEST)
    ident = world.send()
    world.pass_time(AGAIN_SECONDS * 0.95)
    assert (world.removed, world.driver.indications[-1], world.driver.received) == ([], DOWN, [])
    assert world.completed(ident)
    world.pass_time(AGAIN_SECONDS * 0.1)
    assert world.removed


def test_one_that_is_removed_at_rest_leaves_when_the_machine_goes_on(world: World) -> None:
    world.rest()
    world.remove()
    world.pass_time(2 * LEAVE_SECONDS)
    assert not world.removed
    assert world.driver.indications[-1] == UP
    world.go_on()
    world.pass_time(0.05)
    assert world.driver.indications[-1] == DOWN
    world.pass_time(AGAIN_SECONDS)
    assert world.removed


def test_a_run_that_ends_on_the_way_closes_the_wire_once(world: World) -> None:
    world.remove()
    world.pass_time(0.05)
    world.rest()
