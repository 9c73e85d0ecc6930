"""A stock Linux whose disks' code raises: it loses those disks, one line each says why, and it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from linux_guest import linux_guest

from hvkvm.block.request import Op, Request
from hvkvm.machine.disk_spec import DiskSpec

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

SCRIPT = r"""
nvme_in() { until ls -d $1/nvme/nvme*/nvme*n1 2>/dev/null; do sleep 0.1; done | sed 's,.*/,,'; }
bad=/dev/$(nvme_in /sys/bus/pci/devices/0000:00:02.0)
good=/dev/$(nvme_in /sys/bus/pci/devices/0000:00:04.0)
until [ -b $bad ] && [ -b $good ] && [ -b /dev/vda ]; do sleep 0.1; done
write() { dd if=/dev/zero of=$1 bs=4k count=1 oflag=direct 2>/dev/null; }
write /dev/vda &  # Linux's virtio-blk waits for its answers without end
write $bad || echo nvme lost
while [ -b $bad ]; do sleep 0.1; done
echo nvme gone
write $good && echo good written
echo 1 > /sys/bus/pci/devices/0000:00:04.0/remove
echo 1 > /sys/bus/pci/rescan
good=/dev/$(nvme_in /sys/bus/pci/devices/0000:00:04.0)
until [ -b $good ]; do sleep 0.1; done
write $good && echo good found
"""


class Mistake(Exception):
    """What nobody expects."""


def test_linux_loses_the_disks_and_goes_on(tmp_path: Path) -> None:
    disks = []
    for number, bus in enumerate(("nvme", "virtio", "nvme")):
        image = tmp_path / f"disk{number}"
        image.write_bytes(bytes(1 << 20))
        disks.append(DiskSpec(str(image), bus=bus))
    with linux_guest(
        SCRIPT,
        modules=("virtio_pci", "virtio_blk"),
        vmbus="off",
        disks=tuple(disks),
        append="quiet nvme_core.io_timeout=3",
    ) as guest:
        pci, shelf = guest.machine.pci, guest.machine.disk_shelf
        assert pci is not None
        assert shelf is not None
        for name in ("nvme0", "virtio0"):
            disk: Any = shelf.attached[name].disk
            disk.begin = disk.submit = fails_to_write(disk.submit)
        guest.start()
        assert guest.finish().status == 0, guest.report()
        for words in ("nvme lost", "nvme gone", "good written", "good found"):
            assert words in guest.text, guest.report()
        for slot in (2, 3):
            assert "Mistake: oops (test_failed_device_linux.py:" in pci.failed[slot]
        assert 4 not in pci.failed


def fails_to_write(submit: Any) -> Any:
    def submit_or_fail(request: Request) -> None:
        if request.op is Op.WRITE:
            raise Mistake("oops")
        submit(request)

    return submit_or_fail
