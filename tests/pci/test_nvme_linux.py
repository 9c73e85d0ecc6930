"""Linux's own drivers on what a machine with PCI has: NVMe and virtio by MSI-X, MSI and INTx, RTC, HPET."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from linux_guest import SECONDS, linux_guest

from hvkvm.abi import pci
from hvkvm.devices.pci.function import Function
from hvkvm.machine.disk_spec import DiskSpec

SOAK = bool(os.environ.get("HVKVM_SOAK"))
pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(0 if SOAK else 900)]

MIB = 1 << 20
ROUNDS = 100 if SOAK else 2
"""How often a disk's function is removed and found again, and its driver taken off and put on."""
LONG = (6 if SOAK else 1) * SECONDS
"""For all rounds: each takes seconds in a lab that is busy."""
SCRIPT = r"""
wait_for() { while ! [ -b $1 ]; do sleep 0.1; done; }
test_disk() {
    disk=$1; slot=$2
    wait_for $disk
    echo $3 $(cat /sys/block/${disk#/dev/}/queue/write_cache)
    md5sum < $disk
    dd if=/tmp/data of=$disk bs=64k seek=16 conv=fsync 2>/dev/null
    echo 3 > /proc/sys/vm/drop_caches
    dd if=$disk bs=64k skip=16 count=48 2>/dev/null | cmp - /tmp/data && echo $3 the same
    md5sum < $disk | sed "s/^/$3 after /"
    round=0
    while [ $round -lt $ROUNDS ]; do
        echo 1 > /sys/bus/pci/devices/$slot/remove
        while [ -b $disk ]; do sleep 0.1; done
        echo 1 > /sys/bus/pci/rescan
        wait_for $disk
        driver=$(readlink -f /sys/bus/pci/devices/$slot/driver)
        echo $slot > $driver/unbind
        while [ -b $disk ]; do sleep 0.1; done
        echo $slot > $driver/bind
        wait_for $disk
        round=$((round + 1))
        [ $((round % 10)) = 0 ] && echo $3 round $round $(cut -d' ' -f1 /proc/uptime)
    done
    echo $3 rounds $round
    echo 3 > /proc/sys/vm/drop_caches
    dd if=$disk bs=64k skip=16 count=48 2>/dev/null | cmp - /tmp/data && echo $3 still the same
}
nvme_in() { until ls -d $1/nvme/nvme*/nvme*n1 2>/dev/null; do sleep 0.1; done | sed 's,.*/,,'; }
PLAIN=/sys/bus/pci/devices/0000:00:04.0
dd if=/dev/urandom of=/tmp/data bs=64k count=48 2>/dev/null
nvme=$(nvme_in /sys/bus/pci/devices/0000:00:02.0)
wait_for /dev/vda
cat /sys/class/nvme/${nvme%n1}/serial /sys/block/vda/serial
echo
test_disk /dev/$nvme 0000:00:02.0 nvme
test_disk /dev/vda 0000:00:03.0 virtio
echo discard $(cat /sys/block/vda/queue/discard_max_bytes) $(cat /sys/block/vda/queue/write_zeroes_max_bytes)
grep -c "PCI-MSI.*${nvme%n1}q" /proc/interrupts | sed 's/^/nvme vectors /'
grep -c 'PCI-MSI.*virtio.-req' /proc/interrupts | sed 's/^/virtio vectors /'
grep -cE 'IO-APIC.*fasteoi.*(nvme|virtio)' /proc/interrupts | sed 's/^/lines /'
echo clocks $(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)
echo rtc $(cat /sys/class/rtc/rtc0/name)
echo +2 > /sys/class/rtc/rtc0/wakealarm
until grep -qE '( 8: +[1-9].*rtc0| 9: +[1-9].*acpi)' /proc/interrupts; do sleep 0.1; done
echo the alarm came
if [ $ROUNDS -gt 0 ]; then
    disk=/dev/$(nvme_in $PLAIN)
    name=${disk#/dev/}
    echo plain $(cat $PLAIN/msi_irqs/*) $(grep -c "PCI-MSI.*${name%n1}q" /proc/interrupts)
    dd if=/tmp/data of=$disk bs=64k conv=fsync 2>/dev/null
    echo 3 > /proc/sys/vm/drop_caches
    dd if=$disk bs=64k count=48 2>/dev/null | cmp - /tmp/data && echo plain the same
fi
dmesg | grep -iE '(nvme|virtio|vda).*(error|timeout|fail|bogus|nobody cared)' || echo nothing bad
faulty() {
    dd if=/tmp/data of=$1 bs=64k count=32 oflag=direct conv=fsync 2>/dev/null && echo faulty $2 written
    dd if=$1 of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>/dev/null || echo faulty $2 unreadable
    dd if=$1 bs=4k count=256 iflag=direct 2>/dev/null | cmp - /tmp/part && echo faulty $2 the same
    dmesg | grep -oE "(critical medium|I/O) error, dev ${1#/dev/}, sector 2048" | \
        sed "s/^/faulty $2 /;s/ dev.*, / /"
}
if [ $ROUNDS = 0 ]; then
    head -c 1048576 /tmp/data > /tmp/part
    faulty /dev/$(nvme_in $PLAIN) nvme
    faulty /dev/vdb virtio
fi
"""
FAULTS = """
[[fault]]
do = "error"
op = "read"
lba = "2048-2055"
sense = "medium-error"

[[fault]]
do = "delay"
op = "flush"
seconds = 0.3
times = 1
"""
BUSY = """
[[fault]]
do = "busy"
op = "write"
times = 2
"""


@pytest.mark.parametrize("way", ["msix", "intx"])
def test_linux_reads_writes_and_rescans(tmp_path: Path, way: str) -> None:
    """By INTx it has an HPET and disks that fail, too; by messages a controller whose MSI-X nobody sees."""
    images = [tmp_path / "nvme", tmp_path / "virtio"]
    first = [os.urandom(8 * MIB) for _ in images]
    for image, content in zip(images, first, strict=True):
        image.write_bytes(content)
    disks = (
        DiskSpec(str(images[0]), bus="nvme", serial="one"),
        DiskSpec(str(images[1]), bus="virtio", serial="two"),
    )
    rounds, append, more = 0, "quiet pci=nomsi", "on"
    if way == "msix":
        rounds, append, more = ROUNDS, "quiet", "off"
        plain = tmp_path / "plain"
        plain.write_bytes(bytes(8 * MIB))
        disks = (*disks, DiskSpec(str(plain), bus="nvme", serial="three"))
    else:
        for bus, faults in (("nvme", FAULTS + BUSY), ("virtio", FAULTS)):
            bad, file = tmp_path / f"bad-{bus}", tmp_path / f"{bus}.toml"
            bad.write_bytes(bytes(8 * MIB))
            file.write_text(faults)
            disks = (*disks, DiskSpec(str(bad), bus=bus, faults=file))
    with linux_guest(
        f"ROUNDS={rounds}\n{SCRIPT}",
        modules=("virtio_pci", "virtio_blk"),
        vmbus="off",
        disks=disks,
        append=append,
        hpet=more,
        timeout=3 * LONG,
    ) as guest:
        assert guest.machine.pci is not None
        if way == "msix":
            hide_msix(guest.machine.pci.controllers[4].function)
        guest.start()
        guest.wait_for("nothing bad", seconds=LONG)
        assert guest.finish().status == 0
        lines = [line.strip() for line in guest.text.splitlines()]
        for line in ("one", "two", "nvme write back", "virtio write back", "discard 2147483648 2147483648"):
            assert line in lines, guest.report()
        for image, content, name in zip(images, first, ("nvme", "virtio"), strict=True):
            assert any(hashlib.md5(content).hexdigest() in line for line in lines), "what was there is read"
            assert f"{name} the same" in lines, guest.report()
            assert f"{name} rounds {rounds}" in lines, guest.report()
            assert f"{name} still the same" in lines, guest.report()
            after = hashlib.md5(image.read_bytes()).hexdigest()
            assert any(line.startswith(f"{name} after {after}") for line in lines), guest.report()
        assert "rtc rtc_cmos" in [line.split(" 00")[0] for line in lines], guest.report()
        assert "the alarm came" in lines
        (clocks,) = [line.split() for line in lines if line.startswith("clocks ")]
        assert ("hpet" in clocks) is (way == "intx")
        counts = ("nvme vectors 2", "virtio vectors 1", "lines 0")
        if way == "msix":
            counts = (*counts, "plain msi 1", "plain the same")
        else:
            hpet = guest.machine.pci.hpet
            assert hpet is not None
            assert hpet.inspect()["legacy"]
            assert hpet.interrupts[0], "timer 0 ticked in the PIT's place"
            counts = ("nvme vectors 0", "virtio vectors 0", "lines 4")
            for name, error in (("nvme", "critical medium error,"), ("virtio", "I/O error,")):
                for words in ("written", "unreadable", "the same", f"{error} sector 2048"):
                    assert f"faulty {name} {words}" in lines, guest.report()
        for count in counts:
            assert count in lines, guest.report()
        controller, device = guest.machine.pci.controllers[2], guest.machine.pci.virtio[3]
        assert controller.intake.taken > 20
        assert device.taken > 20


def hide_msix(function: Function) -> None:
    """Have its list of capabilities begin behind MSI-X, as on a controller that has MSI only."""
    for space in (function.config, function._power_on):
        space[pci.PCI_CAPABILITY_LIST] = function.capability_offsets[pci.PCI_CAP_ID_MSI]
