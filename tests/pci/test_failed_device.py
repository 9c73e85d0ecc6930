"""A PCI device whose code raises: its slot is empty from then on, one line says why, the machine goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import monotonic, sleep
from typing import Any

import guest_images
import pytest

from hvkvm.abi import nvme, pci, virtio
from hvkvm.block.request import Op, Request
from hvkvm.devices.pci.function import Bar
from hvkvm.devices.pci.nvme.controller import Controller
from hvkvm.devices.pci.virtio.transport import Transport
from hvkvm.errors import StateError
from hvkvm.events import Observer, Warned
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine

SECONDS = 100.0
BASES = {"nvme": 0xC0000000, "virtio": 0xC0100000}
ON = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
BAR = Bar(0, 0x1000)


class Mistake(Exception):
    """What nobody expects."""


def raising(*_arguments: object, **_more: object) -> Any:
    raise Mistake("oops")


class Failing:
    """A device that raises in one of its calls, and hears of it as a machine does."""

    def __init__(self, board: Any, device: Any, call: str) -> None:
        self.board, self.device = board, device
        self.errors: list[Exception] = []
        if call in ("read", "write"):
            setattr(device.memories[BAR], call, raising)
        elif call == "config read":
            device.function.read = raising
        self.slot = board.bus.plug(device)
        device.guard.attach(self._failed)
        self.place(0xC0000000)
        if call == "moved":
            device.moved = raising
        elif call == "config write":
            device.function.write = raising

    def _failed(self, error: Exception) -> None:
        self.errors.append(error)
        self.board.bus.end(self.slot)

    def place(self, gpa: int) -> None:
        self.board.write(self.slot, pci.PCI_BASE_ADDRESS_0, gpa)
        self.board.write(self.slot, pci.PCI_COMMAND, ON, size=2)


@pytest.mark.parametrize("call", ["read", "write", "config read", "config write", "moved"])
def test_the_slot_is_empty_and_the_others_are_there(board: Any, new_device: Any, call: str) -> None:
    other = new_device(BAR)
    other_slot = board.bus.plug(other)
    one = Failing(board, new_device(BAR), call)
    board.write(other_slot, pci.PCI_BASE_ADDRESS_0, 0xD0000000)
    board.write(other_slot, pci.PCI_COMMAND, ON, size=2)
    board.bus.set_intx(one.slot, True)
    gsi = pci.gsi_of(one.slot, 1)
    assert (one.errors, board.levels[gsi]) == ([], True)
    for _ in range(2):
        board.mmio.write(0xC0000000, 4, 1)
        assert board.mmio.read(0xC0000000, 4) in (0, 0xFFFFFFFF)
        board.write(one.slot, 0x80, 1)
        board.read(one.slot, 0)
        one.place(0xE0000000)
    assert [type(error) for error in one.errors] == [Mistake]
    assert board.read(one.slot, pci.PCI_VENDOR_ID) == 0xFFFFFFFF
    assert board.levels[gsi] is False
    board.bus.set_intx(one.slot, True)
    assert board.levels[gsi] is False
    board.bus.reset()
    assert [known.gpa for known in board.mmio.ranges()] == []
    assert board.read(one.slot, pci.PCI_VENDOR_ID) == 0xFFFFFFFF
    assert board.read(other_slot, pci.PCI_VENDOR_ID) == 0x56781234


class Told(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: object) -> None:
        if isinstance(event, Warned) and event.subject == "PCI device failed":
            self.texts.append(event.text)


class World:
    """A machine with a disk on each of PCI's buses, which runs; `device` is that of `bus`."""

    def __init__(self, machine: Machine, told: Told, bus: str) -> None:
        self.machine, self.told, self.bus = machine, told, bus
        assert machine.pci is not None
        self.pci = machine.pci
        all_of: dict[str, dict[int, Any]] = {"nvme": self.pci.controllers, "virtio": self.pci.virtio}
        ((self.slot, self.device),) = all_of.pop(bus).items()
        ((self.other_slot, _other),) = next(iter(all_of.values())).items()
        for device in self.pci.bus.devices.values():
            base = BASES["nvme" if isinstance(device, Controller) else "virtio"]
            device.function.write(pci.PCI_BASE_ADDRESS_0, 4, base)
            device.function.write(pci.PCI_COMMAND, 2, ON)

    def until(self, condition: Callable[[], object]) -> None:
        end = monotonic() + SECONDS
        while not condition():
            assert monotonic() < end, self.pci.inspect()
            sleep(0.002)

    def on_the_loop(self, fn: Callable[[], object]) -> None:
        done = Event()
        self.machine.parts.platform.io.call_soon(fn)
        self.machine.parts.platform.io.call_soon(done.set)
        assert done.wait(SECONDS)

    def write(self) -> None:
        """A register that asks for a turn."""
        offset = nvme.NVME_REG_CC if self.bus == "nvme" else virtio.VIRTIO_PCI_COMMON_STATUS
        self.pci.mmio.write(BASES[self.bus] + offset, 4 if self.bus == "nvme" else 1, 1)


@pytest.fixture(params=["nvme", "virtio"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    disks = []
    for bus in BASES:
        (tmp_path / bus).write_bytes(bytes(1 << 20))
        disks.append(DiskSpec(str(tmp_path / bus), bus=bus))
    told = Told()
    config = MachineConfig(
        kernel=guest_images.image("agent"), memory=64 << 20, synic="user", vmbus="on", disks=tuple(disks)
    )
    with Machine(config, observer=told) as machine:
        found = World(machine, told, request.param)
        machine.start()
        yield found
        assert machine.outcome is None


def in_a_turn(world: World, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(world.device, "_take_writes" if world.bus == "nvme" else "_take", raising)
    world.write()


def in_a_register(world: World, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(world.device._registers, "write", raising)
    patched.setattr(world.device, "_set_status", raising, raising=False)
    world.write()


def in_an_answer(world: World, patched: pytest.MonkeyPatch) -> None:
    assert world.machine.disk_shelf is not None
    disk = world.machine.disk_shelf.attached[f"{world.bus}0"].disk
    assert disk is not None
    for _ in range(3):
        world.on_the_loop(lambda: disk.submit(Request(Op.FLUSH, 0, (), raising)))


@pytest.mark.kvm
@pytest.mark.parametrize("break_it", [in_a_turn, in_a_register, in_an_answer])
def test_the_machine_goes_on(
    world: World, break_it: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = world.machine
    break_it(world, monkeypatch)
    world.until(lambda: world.told.texts)
    [text] = world.told.texts
    where = f"{world.bus}0, in PCI slot {world.slot:02x}"
    assert text.startswith(f"{where}: Mistake: oops (test_failed_device.py:")
    reads = world.device.reads_when_failed & 0xFFFFFFFF
    assert [world.pci.mmio.read(BASES[world.bus] + at, 4) for at in (0, 0x1C, 0x4000)] == [reads] * 3
    assert world.pci.bus.function(world.slot, 0) is None
    assert world.pci.bus.function(world.other_slot, 0) is not None
    assert world.pci.inspect()["failed"] == {f"{world.slot:02x}": world.pci.failed[world.slot]}
    with pytest.raises(StateError, match=rf"the device in slot {world.slot:02x} has failed: Mistake: oops"):
        machine.save(tmp_path / "saved")
    machine.request_reset("test")
    world.until(lambda: machine.resets == 1)
    world.on_the_loop(lambda: None)
    assert world.pci.bus.function(world.slot, 0) is None
    assert len(world.told.texts) == 1


@pytest.mark.kvm
def test_one_that_fails_while_the_machine_comes_to_rest(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is waited for all the same: workers may have guest memory."""
    stop = type(world.device).stop

    def stops_and_raises(self: Controller | Transport, done: Callable[[], object]) -> None:
        stop(self, done)  # type: ignore[arg-type]
        raise Mistake("oops")

    monkeypatch.setattr(type(world.device), "stop", stops_and_raises)
    with pytest.raises(StateError, match="has failed"):
        world.machine.save(tmp_path / "saved")
    assert len(world.told.texts) == 1
    assert world.machine.outcome is None
