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
SOURCE = Path(__file__).parents[1] / "guests/pvh_firmware.s"


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """An ELF at 1 MiB with a PVH note, which is where CLOUDHV.fd lies."""
    return ki.assembled_pvh(SOURCE, tmp_path)


@pytest.mark.parametrize("memory", [64, 4096], ids=["low", "above 4 GiB"])
@pytest.mark.parametrize("volume", [True, False], ids=["firmware", "kernel"])
def test_it_finds_all_in_what_it_is_handed(payload: Path, tmp_path: Path, memory: int, volume: bool) -> None:
    """Each letter is something that it found as it must be: see its source.

    With a firmware volume in it the host bridge is cloud-hypervisor's, and power-off goes its way.
    """
    if not volume:
        content = payload.read_bytes()
        at = content.rindex(b"_FVH")
        payload.write_bytes(content[:at] + bytes(4) + content[at + 4 :])
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    config = MachineConfig(
        kernel=payload,
        hv="none",
        memory=memory * MIB,
        disks=(DiskSpec(str(disk), bus="nvme"),),
        timeout=100,
    )
    printed = bytearray()
    with Machine(config) as machine:
        machine.board.attach_sink(printed.extend)
        outcome = machine.run()
    assert (bytes(printed), outcome.ending) == (b"SMRXFTDPBN", Ending.POWERED_OFF)
