"""Firmware that is a PVH kernel, as CLOUDHV.fd is: with PCI, it finds its tables, its timer and its disk."""

from __future__ import annotations

from pathlib import Path

import kernel_images as ki
import pytest

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

pytestmark = pytest.mark.kvm

MIB = 1 << 20
SIGNATURE = b"_FVH"
SOURCE = Path(__file__).parents[1] / "guests/pvh_firmware.s"


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """An ELF at 1 MiB with a PVH note, which is where CLOUDHV.fd lies."""
    return ki.assembled_pvh(SOURCE, tmp_path)


def without_volume(payload: Path) -> None:
    content = payload.read_bytes()
    at = content.rindex(SIGNATURE)
    payload.write_bytes(content[:at] + bytes(4) + content[at + 4 :])


def config_of(payload: Path, memory: int) -> MachineConfig:
    disk = payload.with_name("disk")
    disk.write_bytes(bytes(MIB))
    disks = (DiskSpec(str(disk), bus="nvme"),)
    return MachineConfig(kernel=payload, hv="none", memory=memory * MIB, disks=disks, timeout=100)


def check_run(machine: Machine) -> None:
    printed = bytearray()
    machine.board.attach_sink(printed.extend)
    outcome = machine.run()
    assert (bytes(printed), outcome.ending) == (b"SMRXFTDPBN", Ending.POWERED_OFF)


@pytest.mark.parametrize("memory", [64, 4096], ids=["low", "above 4 GiB"])
@pytest.mark.parametrize("volume", [True, False], ids=["firmware", "kernel"])
def test_it_finds_all_in_what_it_is_handed(payload: Path, memory: int, volume: bool) -> None:
    """Each letter is something that it found as it must be: see its source.

    With a firmware volume in it the host bridge is cloud-hypervisor's, and power-off goes its way.
    """
    if not volume:
        without_volume(payload)
    with Machine(config_of(payload, memory)) as machine:
        check_run(machine)


def test_a_restored_machine_has_the_board_that_was_saved(payload: Path) -> None:
    """Whatever lies where its kernel was: here, the same program without the volume."""
    with Machine(config_of(payload, 64)) as machine:
        assert machine.pci is not None
        saved = machine.pci.save()
        signature_at = MIB + machine.memory.read(MIB, MIB).rindex(SIGNATURE)
    without_volume(payload)
    with Machine(config_of(payload, 64)) as machine:
        assert machine.pci is not None
        plain = machine.pci.save()
        machine.pci.load(saved)
        machine.memory.write(signature_at, SIGNATURE)
        check_run(machine)
    with Machine(config_of(payload, 64)) as machine:
        assert machine.pci is not None
        machine.pci.load(saved)
        machine.pci.load(plain)
        check_run(machine)
