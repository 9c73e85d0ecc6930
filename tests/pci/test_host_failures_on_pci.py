"""A host that refuses any one call to a machine with disks on PCI: it goes on, or ends under a name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nvme_driver
import pytest
import virtio_driver
from guest_agent import GuestStuckError
from guest_machine import Guest
from host_failures import HostFailures
from host_lives import LIMIT, SECONDS, check_each_call

from hvkvm.abi import nvme
from hvkvm.devices.pci.nvme.function import MSIX_TABLE
from hvkvm.devices.pci.virtio import function as places
from hvkvm.errors import HvkvmError
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.runtime import retry

BUSES = ("nvme", "virtio")


class DeviceEnded(HvkvmError):
    """It was told why."""


class Life:
    """A disk on each bus is read by a guest that has queues, doorbells and MSI-X; a reset, and again."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.content = image.read_bytes()
        self.guest: Guest | None = None

    def live(self) -> None:
        disks = tuple(DiskSpec(str(self.image), bus=bus, readonly=True) for bus in BUSES)
        guest = self.guest = Guest(hv="none", synic="auto", memory=64 << 20, disks=disks)
        guest.agent.seconds = SECONDS
        guest.start()
        boots = guest.agent.boots
        try:
            self.use_disks(guest)
            guest.machine.request_reset("test")
            guest.agent.await_online(boots + 1)
            self.use_disks(guest)
        except (AssertionError, GuestStuckError):
            assert guest.machine.pci is not None
            if not guest.machine.pci.failed:
                raise
            raise DeviceEnded(str(guest.machine.pci.failed)) from None

    def use_disks(self, guest: Guest) -> None:
        assert guest.machine.pci is not None
        guest.machine.memory.zero(nvme_driver.ADMIN_SQ, 0x7000)
        one = nvme_driver.Driver(guest, 2)
        one.enable()
        one.use_msix(MSIX_TABLE, 2)
        one.make_queues()
        assert one.do(0, nvme.NVME_ADMIN_DBBUF, prp1=nvme_driver.SHADOW, prp2=nvme_driver.EVENTS) == 0
        memory = guest.machine.memory
        for sector in (0, 64):
            one.begin(1, nvme.NVME_CMD_READ, nsid=1, cdw=(sector, 0, 7))
            memory.write_u32(nvme_driver.SHADOW + 8, one.tails[1])
            one.reg(nvme.NVME_REG_DBS + 8, one.tails[1])
            assert one.take(1) == 0
            memory.write_u32(nvme_driver.SHADOW + 12, one.heads[1])
            assert memory.read(nvme_driver.DATA, 4096) == self.content[512 * sector :][:4096]
        other = virtio_driver.Driver(guest, 3)
        other.enable()
        other.use_msix(places.MSIX_TABLE, 2)
        assert other.read(128) == self.content[512 * 128 :][:4096]
        pci: Any = guest.machine.pci
        for device in (pci.controllers[2], pci.virtio[3]):
            guest.until(
                lambda device=device: device.msix._live[:2] == [True, True], "its vectors have routes"
            )

    def close(self) -> None:
        if self.guest is not None:
            self.guest.close()


@pytest.mark.kvm
@pytest.mark.timeout(LIMIT)
def test_each_call_that_fails_has_an_answer(
    tmp_path: Path, failures: HostFailures, uncaught: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.01)
    image, folder = tmp_path / "disk.raw", tmp_path / "empty"
    folder.mkdir()
    image.write_bytes(os.urandom(1 << 17))
    seen = check_each_call(lambda: Life(image), folder, failures, uncaught)
    assert seen >= {"KVM_IOEVENTFD", "KVM_IRQFD", "KVM_SET_GSI_ROUTING"}, seen
