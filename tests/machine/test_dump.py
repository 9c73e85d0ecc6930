"""A machine is described at any time of its life: who asks does not know how far it has come."""

from __future__ import annotations

from pathlib import Path

import kernel_images as ki
import pytest
from guest_machine import Guest

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.dump import describe
from hvkvm.machine.kernel_log import kernel_log
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.observe.kernel_log import NoKernelLog

KERNEL = Path(__file__).parents[1] / "guests/warm_late.s"


@pytest.mark.kvm
@pytest.mark.parametrize("saved", [False, True])
def test_before_its_start_while_it_runs_stopped_and_closed(saved: bool, tmp_path: Path) -> None:
    guest = Guest(cpus=2, synic="user")
    machine = guest.machine
    try:
        guest.start()
        if saved:
            file = tmp_path / "saved"
            machine.save(file)
            machine.close()
            machine = Machine(MachineConfig(restore=file))
        texts = [describe(machine.parts)]
        if not saved:
            machine.stop()
        texts.append(describe(machine.parts))
    finally:
        machine.close()
    texts.append(describe(machine.parts))
    for text in texts:
        assert "vcpu1: " in text
        assert "kernel log" not in text
    assert "vcpu1: ended" in texts[-1] or saved
    stopped = texts[-2]  # of the restored one nothing ran
    assert saved or (stopped.count("rip=") == 2 and "no answer" not in stopped), "it has ended, not its vCPUs"
    with pytest.raises(NoKernelLog, match="RAM cannot be read"):
        kernel_log(machine.platform)


@pytest.mark.kvm
def test_it_tells_of_pci_and_of_wires(tmp_path: Path) -> None:
    """Where a guest of NVMe hangs, or one whose wire has gone, is to be seen there and nowhere else."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    config = MachineConfig(
        kernel=ki.assembled_pvh(KERNEL, tmp_path),
        synic="user",
        vmbus="on",
        memory=64 << 20,
        disks=(DiskSpec(str(disk), bus="nvme"),),
        nets=(NicSpec(listen=tmp_path / "wire"),),
    )
    with Machine(config) as machine:
        text = describe(machine.parts)
    print(text)
    assert "wires:" in text
    assert "received_frames 0" in text
    assert "pci:" in text
    assert "nvme" in text.partition("pci:")[2]
