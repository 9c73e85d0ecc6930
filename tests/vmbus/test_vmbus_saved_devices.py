"""Each kind of device, restored from changed states: they are refused by name, or no device fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pytest
from netvsp_lan import Lan
from saved_bus import swap
from saved_mutations import NUMBERS, mutate, places
from storvsp_bench import Bench

from hvkvm.abi import keyboard as keys
from hvkvm.abi import vmbus
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vss import Vss
from hvkvm.errors import StateError
from hvkvm.state.codec import plain, restored
from hvkvm.testing.ic_driver import IcDriver
from hvkvm.testing.netvsc_driver import data_message
from hvkvm.testing.vmbus_loopback import Loopback


class World(Protocol):
    """A guest and its device; `another` makes a device of the same kind, `use` has the guest use it."""

    loop: Loopback
    device: Any

    def another(self) -> Any: ...

    def use(self, device: Any) -> None: ...


FRAME = b"\x02\x03\x04\x05\x06\x07" + bytes(94)


class IcWorld:
    VERSIONS = {"heartbeat": (3, 0), "shutdown": (3, 2), "timesync": (4, 0), "kvp": (4, 0), "vss": (5, 0)}

    def __init__(self, name: str, answered: bool) -> None:
        self.loop = Loopback(vp_count=2)
        self.name = name
        self.device = self.another()
        self.driver = IcDriver(self.loop, self.device, self.VERSIONS[name])
        self.driver.negotiate()
        if answered:
            self.driver.serve(lambda _body: (0, None))

    def another(self) -> Any:
        later = self.loop.call_later
        make: dict[str, Callable[[], Any]] = {
            "heartbeat": lambda: Heartbeat(later),
            "shutdown": Shutdown,
            "timesync": lambda: TimeSync(later, lambda: 7),
            "kvp": Kvp,
            "vss": lambda: Vss(later),
        }
        return make[self.name]()

    def use(self, device: Any) -> None:
        for _ in range(4):
            for payload in self.driver.requests()[-1:]:
                self.driver.answer(payload)
            device.ask(3, bytes(8))
            self.loop.advance(6)
            self.loop.run()


class KeyboardWorld:
    def __init__(self, answered: bool) -> None:
        self.loop = Loopback(vp_count=2)
        self.device = self.another()
        self.loop.host.add(self.device)
        self.loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.channel = self.loop.client.by_interface(Keyboard.INTERFACE)
        self.loop.open(self.channel, out_pages=2, in_pages=2)
        request = keys.protocol_request.pack(keys.SYNTH_KBD_PROTOCOL_REQUEST, keys.SYNTH_KBD_VERSION)
        self.channel.opened.send(request)
        self.loop.run()
        self.device.type("a" * 100)
        if answered:
            self.loop.run()

    def another(self) -> Keyboard:
        return Keyboard()

    def use(self, device: Keyboard) -> None:
        device.type("b")
        self.loop.run()


class NicWorld:
    def __init__(self, answered: bool) -> None:
        self.lan = Lan(queues=2)
        self.loop, self.device = self.lan.loop, self.lan.nic
        self.driver = self.lan.driver.start(rsc=True)
        if not answered:
            self.driver.complete = False
            self.lan.port.inject(*[FRAME] * 3)
            self.loop.run()

    def another(self) -> Any:
        self.lan.nic = self.lan.make()
        return self.lan.nic

    def use(self, _device: Any) -> None:
        self.driver.complete = True
        self.lan.port.start()
        with suppress(AssertionError):  # the driver's, which finds the buffer's id changed
            self.lan.inject(FRAME)
        self.driver.send_section(1, data_message(bytes(100)))
        with suppress(AssertionError):
            self.loop.run()


class ScsiWorld:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.bench = Bench(folder)
        self.bench.start(sub_channels=1)
        self.loop, self.device = self.bench.loop, self.bench.device
        self.bench.driver.execute(bytes(6))
        for image in self.bench.images.values():
            stack.callback(image.close)

    def another(self) -> Any:
        self.bench.device = self.bench.make()
        return self.bench.device

    def use(self, device: Any) -> None:
        if device.ready:
            self.bench.driver.execute(bytes(6))
        device.inspect()


KINDS = [(kind, answered) for kind in (*IcWorld.VERSIONS, "keyboard", "nic") for answered in (True, False)]
KINDS.append(("scsi", True))


def made(kind: str, answered: bool, folder: Path, stack: ExitStack) -> World:
    if kind == "scsi":
        world: World = ScsiWorld(folder, stack)
    elif kind == "nic":
        world = NicWorld(answered)
    elif kind == "keyboard":
        world = KeyboardWorld(answered)
    else:
        world = IcWorld(kind, answered)
    stack.callback(world.loop.close)
    return world


def changes(tree: Any) -> Iterator[Any]:
    """Copies of `tree` with one number in it changed to each of some, and then some changed at random.

    Of a list of many numbers the first and last will do.
    """
    for at, (container, key) in enumerate(places(tree)):
        number = container[key] is None or type(container[key]) is int
        middle = isinstance(container, list) and 1 < key < len(container) - 1
        if number and not middle:
            for value in (*NUMBERS, 1 << 16):
                changed = deepcopy(tree)
                there, _key = places(changed)[at]
                there[key] = value
                yield changed
    for seed in range(60):
        changed = deepcopy(tree)
        mutate(changed, Random(seed))
        yield changed


@pytest.mark.parametrize(("kind", "answered"), KINDS)
def test_a_changed_state_is_refused_or_nothing_fails(tmp_path: Path, kind: str, answered: bool) -> None:
    with ExitStack() as stack:
        device = made(kind, answered, tmp_path, stack).device
        tree = json.loads(json.dumps(plain(device.save())))
    went_on = 0
    for changed in changes(tree):
        try:
            state = restored(device.State, changed, "it")
        except StateError:
            continue
        with ExitStack() as stack:
            world = made(kind, answered, tmp_path, stack)
            world.device.save = lambda state=state: state
            try:
                swap(world.loop, [another := world.another()])
            except (ValueError, StateError) as error:
                assert "\n" not in str(error)
                continue
            world.loop.run()
            world.use(another)
            assert "device failed" not in world.loop.host.server.reports.counts, changed
            went_on += 1
    assert went_on
