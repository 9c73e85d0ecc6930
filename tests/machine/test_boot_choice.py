"""Which machines start in firmware that nobody named, and what is said where that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_images import ESP, LINUX, MIB, gpt

from hvkvm.boot import firmware
from hvkvm.cli.run import config_from
from hvkvm.errors import BootError, ConfigError
from hvkvm.machine.boot_choice import choose
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    data = bytearray(4 * MIB)
    gpt(data, [(ESP, MIB, MIB)])
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    return path


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(b"\x90" * 0x10000)
    monkeypatch.setattr(firmware, "OVMF", (path,))
    return path


def test_a_bootable_disk_chooses_the_packages_firmware(disk: Path, packaged: Path) -> None:
    config, options = config_from(["--disk", str(disk)])
    assert not options.quiet
    assert config.starts_firmware
    assert config.has_pci
    assert config.bus_of(config.disks[0]) == "nvme"
    chosen, note = choose(config)
    assert chosen.firmware == "auto"
    assert chosen.validate() == chosen
    assert note == f"UEFI firmware {packaged} boots {disk}, which has an EFI system partition (GPT)"


def test_a_bootable_cdrom_does_too(disk: Path, packaged: Path) -> None:
    config, _options = config_from(["--cdrom", str(disk)])
    assert config.bus_of(config.cdroms[0]) == "nvme"
    assert choose(config).config.firmware == "auto"


def test_from_a_toml_file(disk: Path, packaged: Path, tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('[[disks]]\nfile = "disk.raw"\n')
    assert choose(MachineConfig.from_toml(file)).config.firmware == "auto"


def test_a_kernel_or_a_firmware_named_is_left_alone(disk: Path, packaged: Path) -> None:
    kernel = MachineConfig(kernel=packaged, vmbus="on", disks=(DiskSpec(str(disk)),)).validate()
    assert not kernel.starts_firmware
    assert choose(kernel) == (kernel, "")
    assert kernel.bus_of(kernel.disks[0]) == "vmbus"
    named = MachineConfig(firmware=packaged, disks=(DiskSpec(str(disk)),)).validate()
    assert choose(named) == (named, "")


def test_the_second_disk_is_looked_at_too(disk: Path, packaged: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(MIB))
    config = MachineConfig(disks=(DiskSpec(str(empty)), DiskSpec(str(disk)))).validate()
    assert str(disk) in choose(config).note


def test_a_host_without_firmware(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware, "OVMF", ())
    with pytest.raises(BootError, match=r"has an EFI system partition .*apt install ovmf") as caught:
        choose(MachineConfig(disks=(DiskSpec(str(disk)),)).validate())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bus", ["", "vmbus"])
def test_no_disk_that_could_be_booted(tmp_path: Path, packaged: Path, bus: str) -> None:
    """Firmware sees none on the VMBus."""
    data = bytearray(4 * MIB)
    gpt(data, [(LINUX if not bus else ESP, MIB, MIB)])
    path = tmp_path / "data.raw"
    path.write_bytes(data)
    config = MachineConfig(disks=(DiskSpec(str(path), bus=bus),), vmbus="on").validate()
    with pytest.raises(ConfigError, match="--kernel: missing, and no disk"):
        choose(config)


def test_damaged_images_are_named(tmp_path: Path, packaged: Path) -> None:
    path = tmp_path / "disk.vhdx"
    path.write_bytes(b"vhdxfile" + bytes(MIB))
    with pytest.raises(ConfigError, match=r"--disk .*disk\.vhdx"):
        choose(MachineConfig(disks=(DiskSpec(str(path)),)).validate())


@pytest.mark.parametrize(
    "arguments",
    [["--disk", "{disk}", "--", "true"], ["--cdrom", "none"], []],
    ids=["command", "empty drive", "nothing"],
)
def test_what_needs_a_kernel_says_so(disk: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--kernel: missing"):
        config_from([one.format(disk=disk) for one in arguments])


def test_a_drive_on_pci_needs_a_medium(disk: Path) -> None:
    config = MachineConfig(disks=(DiskSpec(str(disk)),), cdroms=(CdromSpec(""),), vmbus="on").validate()
    assert config.bus_of(config.cdroms[0]) == "vmbus"
