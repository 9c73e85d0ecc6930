"""Linux started by UEFI firmware: from fw_cfg, and from a disk on NVMe as an installer leaves it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk_images import MIB
from firmware_guest import firmware_guest, lab_tick
from guest_artifacts import artifact
from installed_disk import installed_disk
from linux_guest import SECONDS, LinuxGuest

from hvkvm.boot import firmware as images
from hvkvm.boot import initramfs
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.kernel_log import kernel_log
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.outcome import Ending

pytestmark = [pytest.mark.hyperv, pytest.mark.firmware]


def test_firmware_starts_the_kernel_that_it_is_given() -> None:
    """Kernel, initrd and command line by fw_cfg's keys; the kernel is entered by its EFI stub."""
    script = "ls -d /sys/firmware/efi; dmesg | grep -c ' EFI v'; cat /proc/cmdline"
    with firmware_guest(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        append="quiet one=two",
        command=("sh", "-c", script),
    ) as guest:
        outcome = guest.finish()
        assert outcome.status == 0, guest.report()
        assert "/sys/firmware/efi\n" in guest.text
        assert "one=two" in guest.text


SCRIPT = """
until [ -b /dev/nvme0n1p2 ] && [ -d /sys/class/net/eth0 ]; do sleep 0.1; done
if ! dd if=/dev/nvme0n1p2 bs=8 count=1 2>/dev/null | grep -q again; then
    echo boot one: $(ls /sys/firmware) $(ls /sys/bus/vmbus/drivers) $(cat /sys/class/net/*/address)
    echo again | dd of=/dev/nvme0n1p2 conv=fsync 2>/dev/null
    reboot -f
fi
mount -t efivarfs none /sys/firmware/efi/efivars
echo "boot two by $(tail -c +5 /sys/firmware/efi/efivars/LoaderInfo-* | tr -d '\\0')"
poweroff -f
"""
MODULES = ("nvme", "hv_vmbus", "hv_utils", "hv_storvsc", "hv_netvsc", "efivarfs")


def disk_with_linux(folder: Path) -> Path:
    """An EFI system partition with loader, kernel and initramfs, and a second partition, which is empty."""
    initrd = initramfs.build(
        ("sh", "-c", SCRIPT),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        modules=MODULES,
        kernel_modules_dir=artifact("HVKVM_GUEST_MODULES"),
    )
    kernel = artifact("HVKVM_GUEST_KERNEL")
    return installed_disk(folder / "disk.raw", kernel, initrd, "console=ttyS0 quiet", MIB)


def test_an_installed_disk_boots_reboots_and_powers_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody names a firmware or a kernel: there is a disk with an EFI system partition."""
    monkeypatch.setattr(images, "OVMF", (artifact("HVKVM_NEWER_FIRMWARE"),))
    config = MachineConfig(
        disks=(DiskSpec(str(disk_with_linux(tmp_path))),),
        nets=(NicSpec(listen=tmp_path / "wire", mac="02:00:00:00:00:13"),),
        vmbus="on",
        timeout=3 * SECONDS,
        apic_bus_ns=lab_tick(),
    )
    with Machine(config) as machine:
        assert "which has an EFI system partition (GPT)" in machine.boot_note
        guest = LinuxGuest(machine)
        outcome = guest.finish()
        booted_twice(guest, "02:00:00:00:00:13")
        assert outcome.ending is Ending.POWERED_OFF
        # Both boots left a log in this RAM, wherever each kernel had moved itself to: it is the second one's.
        log = [line.text for line in kernel_log(machine.platform)]
        assert log[0].startswith("Linux version 6."), log
        assert log[-1] == "reboot: Power down", log


def booted_twice(guest: LinuxGuest, mac: str) -> None:
    """By the loader on the disk, with the devices of ACPI and PCI."""
    (one,) = [line for line in guest.text.splitlines() if line.startswith("boot one: ")]
    for word in ("efi", "acpi", "hv_storvsc", "hv_netvsc", "hv_utils", mac):
        assert word in one.split(), guest.report()
    assert "boot two by systemd-boot" in guest.text, guest.report()
    assert guest.machine.resets == 1


# Packages of firmware come and go in the suite that it is of.
@pytest.mark.skipif(
    not os.environ.get("HVKVM_NEWEST_CLOUD_FIRMWARE"),
    reason="needs CLOUDHV.fd: scripts/artifacts fetch cloud-firmware",
)
def test_firmware_of_cloud_hypervisor_boots_the_disk(tmp_path: Path) -> None:
    """CLOUDHV.fd is a kernel to us. It has no fw_cfg: RAM and tables are those that PVH names."""
    config = MachineConfig(
        kernel=artifact("HVKVM_NEWEST_CLOUD_FIRMWARE"),
        disks=(DiskSpec(str(disk_with_linux(tmp_path)), bus="nvme"),),
        nets=(NicSpec(listen=tmp_path / "wire", mac="02:00:00:00:00:14"),),
        vmbus="on",
        timeout=3 * SECONDS,
        apic_bus_ns=lab_tick(),
    )
    with Machine(config) as machine:
        guest = LinuxGuest(machine)
        outcome = guest.finish()
        booted_twice(guest, "02:00:00:00:00:14")
        assert outcome.ending is Ending.POWERED_OFF
