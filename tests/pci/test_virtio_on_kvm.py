"""The virtio block device by real exits, with a guest of a few instructions: on any KVM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_agent import SCRATCH
from guest_machine import Guest
from pci_driver import BAR, PciDriver

from hvkvm.abi import pci, virtio
from hvkvm.devices.pci.virtio import function as places
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.inspect import inspect

pytestmark = pytest.mark.kvm

MIB = 1 << 20
DESCRIPTORS, AVAILABLE, USED, HEADER, DATA = (SCRATCH + 0x1000 * n for n in range(5))
SIZE = 8
ACKNOWLEDGE_AND_DRIVER = virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE | virtio.VIRTIO_CONFIG_S_DRIVER
READY = ACKNOWLEDGE_AND_DRIVER | virtio.VIRTIO_CONFIG_S_FEATURES_OK


class Driver(PciDriver):
    """A virtio driver whose every access to a register a guest's vCPU makes."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.next = 0

    @property
    def memory(self) -> Any:
        return self.guest.machine.memory

    def enable(self) -> None:
        assert self.config(pci.PCI_VENDOR_ID) == 0x1042 << 16 | pci.PCI_VENDOR_ID_REDHAT_QUMRANET
        self.config(pci.PCI_BASE_ADDRESS_0, BAR)
        self.config(pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, 0, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, ACKNOWLEDGE_AND_DRIVER, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_GFSELECT, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_GF, 1)
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, READY, 1)
        assert self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, size=1) == READY
        self.memory.zero(AVAILABLE, 0x2000)
        self.next = 0
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_SELECT, 0, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_SIZE, SIZE, 2)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_DESCLO, DESCRIPTORS, 8)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_AVAILLO, AVAILABLE, 8)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_USEDLO, USED, 8)
        self.reg(virtio.VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2)
        assert self.reg(virtio.VIRTIO_PCI_COMMON_Q_ENABLE, size=2) == 1
        self.reg(virtio.VIRTIO_PCI_COMMON_STATUS, READY | virtio.VIRTIO_CONFIG_S_DRIVER_OK, 1)
        self.guest.until(lambda: self.shown["bells"] == 1, "the queue rings by an ioeventfd")

    @property
    def shown(self) -> Any:
        return inspect(self.guest.machine.parts)["pci"]["virtio"]["02"]

    def read(self, sector: int, sectors: int = 8) -> bytes:
        """One request: its notification is the only access."""
        memory = self.memory
        memory.write(HEADER, virtio.virtio_blk_outhdr.pack(virtio.VIRTIO_BLK_T_IN, sector))
        chain = ((HEADER, 16, 1, 1), (DATA, 512 * sectors, 3, 2), (HEADER + 16, 1, 2, 0))
        for index, one in enumerate(chain):
            memory.write(DESCRIPTORS + 16 * index, virtio.vring_desc.pack(*one))
        memory.write(AVAILABLE + 4 + 2 * (self.next % SIZE), b"\0\0")
        self.next += 1
        memory.write(AVAILABLE + 2, self.next.to_bytes(2, "little"))
        self.reg(places.NOTIFY, 0, 2)
        wanted = self.next.to_bytes(2, "little")
        self.guest.until(lambda: memory.read(USED + 2, 2) == wanted, "the chain is given back")
        assert memory.read(HEADER + 16, 1)[0] == virtio.VIRTIO_BLK_S_OK
        return bytes(memory.read(DATA, 512 * sectors))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def boot(boot_agent: Callable[..., Guest], disk: Path) -> Callable[..., Guest]:
    def boot(**more: Any) -> Guest:
        return boot_agent(hv="none", synic="auto", disks=(DiskSpec(str(disk), bus="virtio"),), **more)

    return boot


def test_a_request_makes_no_exit(boot: Callable[..., Guest], disk: Path) -> None:
    driver = Driver(boot())
    driver.enable()
    content = disk.read_bytes()
    before = driver.guest.machine.exit_counts().get("KVM_EXIT_MMIO", 0)
    for round_ in range(20):
        sector = 8 * (round_ % 16)
        assert driver.read(sector) == content[512 * sector : 512 * sector + 4096]
    assert driver.guest.machine.exit_counts().get("KVM_EXIT_MMIO", 0) == before
    assert driver.shown["requests"] == 20
    assert driver.reg(places.ISR, size=1) == virtio.VIRTIO_PCI_ISR_QUEUE


def test_a_reset_of_the_machine_takes_it_back(boot: Callable[..., Guest]) -> None:
    driver = Driver(boot())
    driver.enable()
    driver.read(0)
    boots = driver.guest.agent.boots
    driver.guest.machine.request_reset("test")
    driver.guest.agent.await_online(boots + 1)
    assert driver.config(pci.PCI_BASE_ADDRESS_0) == 0
    assert driver.shown["status"] == "0x0"
    driver.enable()
    driver.read(0)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Callable[[Driver], None]]:
    """`chain(driver)` saves its machine and closes it; the driver is on the one that goes on."""
    made: list[Guest] = []

    def go_on(driver: Driver) -> None:
        driver.guest.machine.save(tmp_path / "saved")
        driver.guest.close()
        driver.guest = Guest(hv="none", synic="auto", restore=tmp_path / "saved")
        made.append(driver.guest)
        driver.guest.machine.start()

    yield go_on
    for guest in made:
        guest.close()


def test_saved_and_restored_the_driver_notices_nothing(
    boot: Callable[..., Guest], disk: Path, chain: Callable[[Driver], None]
) -> None:
    driver = Driver(boot())
    driver.enable()
    content = disk.read_bytes()
    for sector in (0, 64, 128):
        chain(driver)
        assert driver.read(sector) == content[512 * sector : 512 * sector + 4096]
        driver.guest.until(lambda: driver.shown["bells"] == 1, "it rings by an ioeventfd again")
