"""A whole Debian on one disk, started by UEFI firmware: from NVMe to a login, a reboot, and a power-off."""

from __future__ import annotations

from pathlib import Path

import pytest
from debian_guest import BOOT_SECONDS, ON_REQUEST, logged_in
from firmware_guest import lab_tick
from guest_artifacts import artifact
from installed_disk import installed_disk
from linux_guest import LinuxGuest

from hvkvm.block.file_systems import identify
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.boot import firmware as images
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.outcome import Ending

pytestmark = [ON_REQUEST, pytest.mark.hyperv, pytest.mark.firmware, pytest.mark.timeout(7200)]


def disk_with_debian(folder: Path) -> Path:
    """`scripts/root-disk`'s file system behind an EFI system partition."""
    root = artifact("HVKVM_ROOT_DISK")
    image = RawImage(root, ImageOptions(read_only=True))
    system = identify(image, 0, image.size)
    image.close()
    assert system is not None
    options = f"root=UUID={system.uuid} console=ttyS0 quiet systemd.show_status=0"
    initrd = artifact("HVKVM_ROOT_INITRD").read_bytes()
    return installed_disk(folder / "debian.raw", artifact("HVKVM_ROOT_KERNEL"), initrd, options, root)


def test_a_debian_disk_boots_by_firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "OVMF", (artifact("HVKVM_NEWER_FIRMWARE"),))
    config = MachineConfig(
        disks=(DiskSpec(str(disk_with_debian(tmp_path))),),
        nets=(NicSpec(listen=tmp_path / "wire"),),
        vmbus="on",
        memory=1 << 30,
        timeout=3 * BOOT_SECONDS,
        apic_bus_ns=lab_tick(),
    )
    with Machine(config) as machine:
        guest = LinuxGuest(machine)
        shell = logged_in(guest)
        assert "nvme0n1p2" in shell.check("findmnt -n -o SOURCE /")
        modules = shell.check("modprobe -a hv_storvsc hv_netvsc hv_utils; lsmod")
        for name in ("hv_vmbus", "hv_storvsc", "hv_netvsc", "hv_utils"):
            assert name in modules
        assert "systemd-boot" in shell.check(
            "tr -d '\\0' < $(ls /sys/firmware/efi/efivars/LoaderInfo-*); echo"
        )
        assert "eth0" in shell.check("ls /sys/class/net")
        shell.send("reboot")
        guest.wait_until(lambda: machine.resets == 1, "the guest reboots", BOOT_SECONDS)
        guest.wait_until(lambda: guest.text.count("login: ") == 2, "it boots again", BOOT_SECONDS)
        guest.type("root")
        guest.wait_until(lambda: "root@hvkvm" in guest.text.split("login: ")[-1], "root's prompt")
        guest.type("poweroff")
        assert guest.finish(BOOT_SECONDS).ending is Ending.POWERED_OFF, guest.report()
