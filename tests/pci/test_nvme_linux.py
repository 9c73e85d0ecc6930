"""Linux's own driver on an NVMe disk of ours: one boot, and everything that it is worth."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from linux_guest import linux_guest

from hvkvm.machine.disk_spec import DiskSpec

pytestmark = pytest.mark.hyperv

MIB = 1 << 20
SCRIPT = """
disk=/dev/nvme0n1
wait_for() { while ! [ -b $disk ]; do sleep 0.1; done; }
wait_for
cat /sys/class/nvme/nvme0/serial /sys/block/nvme0n1/queue/write_cache
md5sum < $disk
dd if=/dev/urandom of=/tmp/data bs=64k count=48 2>/dev/null
dd if=/tmp/data of=$disk bs=64k seek=16 conv=fsync 2>/dev/null
echo 3 > /proc/sys/vm/drop_caches
dd if=$disk bs=64k skip=16 count=48 2>/dev/null | cmp - /tmp/data && echo the same
md5sum < $disk | sed 's/^/after /'
for round in 1 2 3; do
    echo 1 > /sys/bus/pci/devices/0000:00:02.0/remove
    while [ -b $disk ]; do sleep 0.1; done
    echo 1 > /sys/bus/pci/rescan
    wait_for
done
echo 3 > /proc/sys/vm/drop_caches
dd if=$disk bs=64k skip=16 count=48 2>/dev/null | cmp - /tmp/data && echo still the same
grep -c 'PCI-MSI.*nvme0q' /proc/interrupts | sed 's/^/vectors /'
dmesg | grep -iE 'nvme.*(error|timeout|fail|bogus)' || echo nothing bad
"""


def test_linux_reads_writes_and_rescans(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    first = os.urandom(8 * MIB)
    image.write_bytes(first)
    disk = DiskSpec(str(image), bus="nvme", serial="one")
    with linux_guest(SCRIPT, modules=(), vmbus="off", disks=(disk,)) as guest:
        guest.start()
        guest.wait_for("nothing bad")
        assert guest.finish().status == 0
        lines = guest.text.splitlines()
        assert "one" in [line.strip() for line in lines]
        assert "write back" in lines
        assert any(hashlib.md5(first).hexdigest() in line for line in lines), "what was there is read"
        assert "the same" in lines
        assert "still the same" in lines
        assert "vectors 2" in lines
        assert any(f"after {hashlib.md5(image.read_bytes()).hexdigest()}" in line for line in lines)
        assert guest.machine.pci is not None
        (controller,) = guest.machine.pci.controllers.values()
        assert controller.taken > 20
