"""A stock Linux that is saved with requests in flight, again and again: it misses nothing on its disks.

On hv_storvsc with either SynIC. In a soak four jobs of 32 requests each verify a disk meanwhile; and one runs
with a disk on NVMe and one on virtio-blk, of which the suite has a save without Linux (tests/pci).
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from linux_guest import LinuxGuest, linux_guest
from linux_programs import ahead, program

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

IN_SOAK = bool({"HVKVM_SOAK", "HVKVM_DISK_SAVES"} & set(os.environ))
pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(7 * 24 * 3600 if IN_SOAK else 1800)]
ahead("verify")
IN_A_SOAK = pytest.mark.skipif(not IN_SOAK, reason="minutes: set HVKVM_SOAK=1")
SAVES = int(os.environ.get("HVKVM_DISK_SAVES", "100" if os.environ.get("HVKVM_SOAK") else "6"))
SCRIPT = """
dmesg -n 1
mkdir /m
block() { until ls /sys/bus/scsi/devices/0:0:0:$1/block 2>/dev/null; do usleep 100000; done; }
if [ $WHERE = pci ]; then
  first=/dev/nvme0n1 second=/dev/vda
  until [ -b $first ] && [ -b $second ]; do usleep 100000; done
else
  first=/dev/$(block 0) second=/dev/$(block 1)
fi
mount -t ext4 $first /m || poweroff -f
dd if=/dev/urandom of=/tmp/want bs=64k count=16 2>/dev/null
if [ -x /verify ]; then
  { until [ -e /tmp/stop ]; do
    /verify $second 4 32 1048576 2000 >/tmp/told || { cat /tmp/told; echo "complaint: verify"; break; }
    echo verified
  done; touch /tmp/verified; } &
else
  touch /tmp/verified
fi
i=0
until [ -e /tmp/stop ]; do
  i=$((i + 1))
  { dd if=/tmp/want of=/m/file bs=16k conv=fsync 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches
    cmp /tmp/want /m/file || echo "complaint: the file is not what was written"; } &
  one=$!
  dd if=/tmp/want of=$second bs=4k seek=$((8192 + i % 8 * 256)) oflag=direct 2>/dev/null &
  wait $one $!
  dd if=$second of=/tmp/got bs=4k skip=$((8192 + i % 8 * 256)) count=256 iflag=direct 2>/dev/null
  cmp /tmp/want /tmp/got || echo "complaint: the disk has not what was written"
  echo "round $i"
  read -t 0 line && touch /tmp/stop
done
until [ -e /tmp/verified ]; do usleep 100000; done
umount /m
dmesg | grep -E 'WARNING: CPU|BUG:|Oops|stall|soft lockup|hung_task|I/O error|hv_storvsc.*status' \
  | sed 's/^/complaint: /'
dmesg | grep -E 'nvme.*(timeout|abort|reset)' | sed 's/^/complaint: /'
echo the end
poweroff -f
"""


def in_flight_now(machine: Machine) -> int:
    """Requests that the disks have taken and not answered."""
    if machine.pci is not None:
        nvme = sum(one.queues.in_flight for one in machine.pci.controllers.values())
        virtio: list[Any] = [one.inspect()["in_flight"] for one in machine.pci.virtio.values()]
        return int(nvme + sum(virtio))
    assert machine.bus is not None
    device: Any = machine.bus.devices["scsi0"].device
    return int(sum(device.inspect()["in_flight"].values()))


def watch_rest(machine: Machine, at_rest: list[tuple[int, int, int]]) -> None:
    """Have each save tell what the guest waits for as the controller comes to rest: requests that the disks
    have, and bytes of both rings that nobody has read yet."""
    if machine.bus is None:
        return
    device: Any = machine.bus.devices["scsi0"].device
    rest = device.rest

    def counted(done: Any) -> None:
        device.rest = rest  # what follows is its end
        ios = [channel._io for channel in device._channels.values() if channel._io is not None]
        rings = [
            sum((end.words[0] - end.words[1]) % end.size for end in ends)
            for ends in ([io.reader for io in ios], [io.writer for io in ios])
        ]
        at_rest.append((sum(device.inspect()["in_flight"].values()), rings[0], rings[1]))
        rest(done)

    device.rest = counted


def caught_in_flight(machine: Machine, seconds: float = 5.0) -> int:
    """How many requests are in flight, at a moment when some are; 0 if none came in that time."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        if count := in_flight_now(machine):
            return count
        sleep(0)  # the I/O loop has its turn
    return 0


@pytest.mark.parametrize("where", ["kernel", "user", pytest.param("pci", marks=IN_A_SOAK)])
def test_requests_in_flight_are_neither_lost_nor_doubled(where: str, tmp_path: Path) -> None:
    chance = random.Random(where)
    file, first, second = (tmp_path / name for name in ("vm", "first.raw", "second.raw"))
    for path in (first, second):
        with path.open("wb") as image:
            image.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(first)], check=True)
    disks: tuple[DiskSpec, ...] = (DiskSpec(str(first)), DiskSpec(str(second)))
    modules: tuple[str, ...] = ("hv_vmbus", "hv_storvsc", "sd_mod")
    settings: dict[str, Any] = {"synic": where, "vmbus": "on"}
    if where == "pci":
        disks = (DiskSpec(str(first), bus="nvme"), DiskSpec(str(second), bus="virtio"))
        modules = ("nvme", "virtio_pci", "virtio_blk")
        settings = {"vmbus": "off"}
    in_flight = 0
    at_rest: list[tuple[int, int, int]] = []
    script = f"WHERE={where}\n{SCRIPT}"
    if IN_SOAK:
        settings |= {"files": {"/verify": program("verify")}, "memory": 160 << 20}
    settings |= {"cpus": 2, "modules": modules, "disks": disks}
    with linux_guest(script, **settings) as guest:
        guest.start()
        guest.wait_for("round 1")
        machine, output = guest.machine, guest.output
        try:
            for _ in range(SAVES):
                sleep(chance.random())
                watch_rest(machine, at_rest)
                in_flight += caught_in_flight(machine)
                machine.save(file, end=True)
                machine.close()
                machine = Machine(
                    MachineConfig(kernel=file, restore=file, timeout=guest.machine.config.timeout)
                )
                machine.board.attach_sink(output.extend)
                machine.start()
            told = LinuxGuest(machine, output)
            told.type("stop")
            outcome = told.finish()
        finally:
            machine.close()
        text = bytes(output).decode(errors="replace").replace("\r\n", "\n")
        assert outcome.ending is Ending.POWERED_OFF, text[-3000:]
        assert "the end" in text, text[-3000:]
        assert "complaint" not in text, text[-3000:]
        rounds = [int(number) for number in re.findall(r"^round (\d+)$", text, re.MULTILINE)]
        assert rounds == list(range(1, len(rounds) + 1)), text[-3000:]
        print(f"{SAVES} saves, {in_flight} requests just before them")
        print(f"at rest, requests of the disks, bytes in the rings to and from the host: {at_rest}")
        assert in_flight, "nothing was ever in flight when the guest was saved: the test shows nothing"
    checked = subprocess.run(["fsck.ext4", "-fn", str(first)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
