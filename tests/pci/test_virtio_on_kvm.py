"""The virtio block device by real exits, with a guest of a few instructions: on any KVM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_machine import Guest
from virtio_driver import Driver

from hvkvm.abi import pci, virtio
from hvkvm.devices.pci.virtio import function as places
from hvkvm.machine.disk_spec import DiskSpec

pytestmark = pytest.mark.kvm

MIB = 1 << 20


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
    driver.await_bell()
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
    driver.await_bell()
    driver.read(0)
    boots = driver.guest.agent.boots
    driver.guest.machine.request_reset("test")
    driver.guest.agent.await_online(boots + 1)
    assert driver.config(pci.PCI_BASE_ADDRESS_0) == 0
    assert driver.shown["status"] == "0x0"
    driver.enable()
    driver.await_bell()
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
    driver.await_bell()
    content = disk.read_bytes()
    for sector in (0, 64, 128):
        chain(driver)
        assert driver.read(sector) == content[512 * sector : 512 * sector + 4096]
        driver.await_bell()
