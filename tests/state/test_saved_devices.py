"""A machine whose devices a guest has left anywhere, half set up too, goes on from a file: all is the same.

HVKVM_SAVED_SEEDS says how many machines in a longer run.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from guest_machine import MIB, Guest

from hvkvm.abi import board, hpet, nvme, pci, virtio
from hvkvm.block.request import Status
from hvkvm.devices.pci.virtio import function as places
from hvkvm.devices.port.acpi_pm import PM1_STS_RTC
from hvkvm.machine.disk_spec import BUSES, CdromSpec, DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.state.codec import plain
from hvkvm.state.file import Saved

pytestmark = pytest.mark.kvm

SEEDS = int(os.environ.get("HVKVM_SAVED_SEEDS", "12"))
SECONDS = 120
RINGS = 32 * MIB
"""Guest memory that the agent leaves alone."""
NUMBERS = (0, 1, 3, 8, 0x80, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 0x00460001, RINGS, RINGS + 4096)
TIMES = {0, 2, 4, 6, 7, 8, 9, 0x0A, 0x0C, 0x32}
"""CMOS registers that go on, or say what has come since."""
COMMON_STATUS, COMMON_SELECT = virtio.VIRTIO_PCI_COMMON_STATUS, virtio.VIRTIO_PCI_COMMON_Q_SELECT
SET_UP = (
    (COMMON_STATUS, 1, 0),
    (virtio.VIRTIO_PCI_COMMON_GFSELECT, 4, 1),
    (virtio.VIRTIO_PCI_COMMON_GF, 4, 1),
    (COMMON_STATUS, 1, virtio.VIRTIO_CONFIG_S_FEATURES_OK),
    (COMMON_SELECT, 2, 0),
    (virtio.VIRTIO_PCI_COMMON_Q_DESCLO, 8, RINGS),
    (virtio.VIRTIO_PCI_COMMON_Q_AVAILLO, 8, RINGS + 0x4000),
    (virtio.VIRTIO_PCI_COMMON_Q_USEDLO, 8, RINGS + 0x8000),
    (virtio.VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1),
    (COMMON_STATUS, 1, virtio.VIRTIO_CONFIG_S_FEATURES_OK | virtio.VIRTIO_CONFIG_S_DRIVER_OK),
)
VIRTIO_REGISTERS = (
    (COMMON_STATUS, 1),
    (virtio.VIRTIO_PCI_COMMON_GFSELECT, 4),
    (virtio.VIRTIO_PCI_COMMON_GF, 4),
    (virtio.VIRTIO_PCI_COMMON_MSIX, 2),
    (COMMON_SELECT, 2),
    (virtio.VIRTIO_PCI_COMMON_Q_SIZE, 2),
    (virtio.VIRTIO_PCI_COMMON_Q_MSIX, 2),
    (virtio.VIRTIO_PCI_COMMON_Q_DESCLO, 8),
)
NVME_REGISTERS = (nvme.NVME_REG_INTMS, nvme.NVME_REG_INTMC, nvme.NVME_REG_AQA, nvme.NVME_REG_ASQ)
NVME_REGISTERS += (nvme.NVME_REG_ACQ, nvme.NVME_REG_CC, nvme.NVME_REG_DBS, nvme.NVME_REG_DBS + 4)


def on_loop(machine: Machine, work: Callable[[], Any]) -> Any:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    machine.platform.io.call_soon(lambda: heard.put(work()))
    return heard.get(timeout=SECONDS)


def settle(machine: Machine) -> None:
    """Let what the loop was asked for be done, and what that asks for."""
    for _ in range(4):
        on_loop(machine, lambda: None)


class Fiddler:
    """What a guest and its host do to the devices of a machine, at random."""

    def __init__(self, guest: Guest, random: Random, images: list[str]) -> None:
        self.machine, self.random, self.images = guest.machine, random, images
        bus = self.machine.pci
        assert bus is not None
        self.pci = bus

    def number(self, size: int) -> int:
        chosen = self.random.choice(NUMBERS) if self.random.random() < 0.6 else self.random.getrandbits(64)
        return chosen & (1 << 8 * size) - 1

    def step(self) -> None:
        deeds = (self.port, self.port, self.place, self.msix, self.count, self.nvme, self.nvme, self.virtio)
        self.random.choice((*deeds, self.virtio, self.host, self.disks))()
        for _ in range(self.random.choice((0, 3))):
            on_loop(self.machine, lambda: None)

    def port(self) -> None:
        ports = self.machine.board.ports
        base = self.pci.pm_base
        port = self.random.choice(
            (0x70, 0x71, 0x71, *range(board.COM1_PORT, board.COM1_PORT + 8), 0x510, base + 2, base + 3)
        )
        ports.write(port, 2 if port == 0x510 else 1, self.number(2 if port == 0x510 else 1))
        ports.write(board.GPE0_PORT + 1, 1, self.random.randrange(2))
        ports.write(0xCF8, 4, self.number(4))

    def place(self) -> None:
        for slot, device in self.pci.bus.devices.items():
            device.function.write(pci.PCI_BASE_ADDRESS_0, 4, 0xC0000000 + slot * MIB)
            command = self.random.choice((pci.PCI_COMMAND_MEMORY, pci.PCI_COMMAND_INTX_DISABLE, 0))
            device.function.write(pci.PCI_COMMAND, 2, command | pci.PCI_COMMAND_MASTER)

    def msix(self) -> None:
        device: Any = self.random.choice(list(self.pci.bus.devices.values()))
        for word, value in enumerate((0xFEE00000, 0, 0x40, self.random.randrange(2))):
            device.msix.write(4 * word, 4, value)
        at = device.function.capability_offsets[pci.PCI_CAP_ID_MSIX] + pci.PCI_MSIX_FLAGS
        flags = (0, pci.PCI_MSIX_FLAGS_ENABLE, pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL)
        device.function.write(at, 2, self.random.choice(flags))

    def count(self) -> None:
        registers = (hpet.HPET_CFG, *range(hpet.HPET_T0, hpet.HPET_SIZE, 4))
        self.pci.mmio.write(board.HPET_ADDRESS + self.random.choice(registers), 4, self.number(4))

    def nvme(self) -> None:
        for one in self.pci.controllers.values():
            register, value = self.random.choice(NVME_REGISTERS), self.number(4)
            if register == nvme.NVME_REG_CC:
                value = self.random.choice((0, 0x00460001, 0x00464001))
            elif register >= nvme.NVME_REG_DBS:  # commands of zeros, or what was there
                value = self.random.randrange(4)
            elif register == nvme.NVME_REG_AQA:
                value = 0x70007
            one.write(register, 4, value)

    def virtio(self) -> None:
        for one in self.pci.virtio.values():
            if self.random.random() < 0.1:
                self.machine.memory.zero(RINGS, 0xC000)
                for register, size, value in SET_UP:
                    one.write(register, size, value)
            else:
                register, size = self.random.choice(VIRTIO_REGISTERS)
                few = register in (COMMON_STATUS, virtio.VIRTIO_PCI_COMMON_GFSELECT)
                one.write(register, size, self.random.randrange(3) if few else self.number(size))
                one.write(places.NOTIFY, 2, 0)

    def host(self) -> None:
        serial = self.machine.board.serial
        self.random.choice((lambda: serial.feed(b"abc"), serial.feed_break, lambda: None))()
        self.machine.board.power.press_power_button()

    def disks(self) -> None:
        shelf = self.machine.disk_shelf
        assert shelf is not None
        assert shelf.disks is not None
        disks = shelf.disks
        name = self.random.choice(list(disks.attached) or [""])
        heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if name and self.random.random() < 0.5:
            self.machine.platform.io.call_soon(disks.remove, name, heard.put)
            assert heard.get(timeout=SECONDS).status is Status.OK
            return
        taken = {one.spec.file for one in shelf.attached.values()}
        file = next((one for one in self.images if one not in taken), None)
        if file is not None:
            spec = DiskSpec(file, controller=self.random.randrange(3))
            image = disks.open(spec)
            on_loop(self.machine, lambda: disks.attach(spec, image))


def look(machine: Machine) -> dict[str, Any]:
    """What a guest reads, where time changes nothing, and where reading does not."""
    assert machine.pci is not None
    assert machine.disk_shelf is not None
    ports, base, mmio = machine.board.ports, machine.pci.pm_base, machine.pci.mmio
    found: dict[str, Any] = {f"COM1+{n}": ports.read(board.COM1_PORT + n, 1) for n in (1, 3, 4, 7)}
    found |= {f"PM+{n}": ports.read(base + n, 2) for n in (2, 4)}
    found["PM"] = ports.read(base, 2) & ~PM1_STS_RTC
    found |= {"PCI address": ports.read(0xCF8, 4), "events": ports.read(board.GPE0_PORT + 1, 1)}
    cmos = machine.board.cmos.save()
    found |= {f"CMOS {n}": value for n, value in enumerate(cmos.ram) if n not in TIMES}
    timers = range(hpet.HPET_T0, hpet.HPET_T0 + hpet.TIMERS * hpet.HPET_TN_SIZE, hpet.HPET_TN_SIZE)
    for at in (0, hpet.HPET_CFG, *timers):
        found[f"HPET {at:#x}"] = mmio.read(board.HPET_ADDRESS + at, 8)
    for slot, device in machine.pci.bus.devices.items():
        for at in range(0, pci.PCI_CFG_SPACE_SIZE, 4):
            found[f"PCI {slot} {at:#x}"] = device.function.read(at, 4)
    for slot, controller in machine.pci.controllers.items():
        found |= {f"NVMe {slot} {at:#x}": controller.read(at, 4) for at in range(0, 0x40, 4)}
    for slot, transport in machine.pci.virtio.items():
        found |= {f"virtio {slot} {at:#x}": transport.read(at, 2) for at in range(0, 56, 2)}
    for name, one in machine.disk_shelf.attached.items():
        found[name] = one.controller, one.lun, one.spec.file, one.bus
    return found


def state_of(file: Path) -> Any:
    """What is in it of the devices, less what time changes, and what going on does."""
    with Saved(file) as saved:
        parts, config = saved.parts, json.loads(json.dumps(plain(saved.manifest.config)))
    state = {name: parts[name] for name in ("board", "PCI", "VMBus", "network")}
    del state["board"]["cmos"], state["board"]["general_events"], state["PCI"]["pm_timer"]
    del state["PCI"]["hpet"]["counter"], state["PCI"]["hpet"]["status"]
    state["board"]["event_block"]["status"] &= ~PM1_STS_RTC
    for timer in state["PCI"]["hpet"]["timers"]:
        del timer["comparator"], timer["remaining"]
    for one in (*state["PCI"]["virtio"].values(), *state["PCI"]["nvme"].values()):
        del one["msix"]["pending"]  # what may have been lost is raised again
    return flat(state | {"config": config}, "")


def flat(tree: Any, place: str) -> dict[str, Any]:
    """Each leaf of `tree` by its place, so that a difference is told in a line."""
    if not isinstance(tree, dict | list):
        return {place: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {at: leaf for key, one in items for at, leaf in flat(one, f"{place}.{key}").items()}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_a_guest_has_left_reads_the_same(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    images = [str(tmp_path / f"{number}.raw") for number in range(5)]
    for image in images:
        Path(image).write_bytes(bytes(1 << 16))
    disks = [DiskSpec(image, bus=bus) for image, bus in zip(images, BUSES, strict=False)]
    random.shuffle(disks)
    first, second = tmp_path / "first", tmp_path / "second"
    guest = Guest(
        synic="user", hv="host-model", vmbus="on", hpet="on", disks=tuple(disks), cdroms=(CdromSpec(""),)
    ).start()
    try:
        fiddler = Fiddler(guest, random, images)
        fiddler.place()
        for _ in range(random.randrange(1, 100)):
            fiddler.step()
        guest.machine.save(first)
        settle(guest.machine)
        before = look(guest.machine)
    finally:
        guest.close()
    for name in ("one", "two"):
        guest = Guest(restore=first, name=name)
        try:
            guest.machine.start()
            settle(guest.machine)
            assert look(guest.machine) == before
            guest.machine.save(second)
        finally:
            guest.close()
        assert state_of(second) == state_of(first)
