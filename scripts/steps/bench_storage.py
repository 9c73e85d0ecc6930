"""A stock Linux on a disk of hvkvm beside one of QEMU's, by hv_storvsc, NVMe and virtio, on one raw file.

One boot each. The guest runs `tests/guests/linux/diskio.c`: direct I/O of so many requests at a time.
The file lies in the host's page cache, so that what is measured is the way to it. Called by
`scripts/bench`, or by itself:

    .venv/bin/python scripts/steps/bench_storage.py [VMM]...

VMM is hvkvm, hvkvm-user, hvkvm-nvme, hvkvm-virtio, or of QEMU virtio-blk, virtio-scsi, nvme.

A figure, not a test.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
_FOLDERS = (str(PROJECT), str(PROJECT / "scripts"), str(PROJECT / "tests/guests"))
sys.path[:0] = [path for path in _FOLDERS if path not in sys.path]

from linux_programs import program  # noqa: E402

from steps import artifacts, bench_vmm  # noqa: E402
from steps.bench_table import Row  # noqa: E402
from steps.bench_vmm import HVKVM, HVKVM_USER  # noqa: E402
from steps.distribution import StepError, say  # noqa: E402

DISK_BYTES = 256 << 20
_PLACE = "/dev/shm" if os.environ.get("HVKVM_IN_LAB") else None
"""Other files of the lab lie in an overlay, which cannot say what the page cache holds; most systems can."""
MILLISECONDS = 2000
DEADLINE = 300.0
PEERS = ("virtio-blk", "virtio-scsi")
ON_PCI = {"hvkvm-nvme": "nvme", "hvkvm-virtio": "virtio-blk"}
"""hvkvm's disks on PCI, each with the device of QEMU's that the same driver finds."""
STEPS = (
    ("sequential read of 1 MiB, depth 2", "read seq 1048576 2"),
    ("sequential write of 1 MiB, depth 2", "write seq 1048576 2"),
    ("random read of 4 KiB, depth 1", "read random 4096 1"),
    ("random read of 4 KiB, depth 8", "read random 4096 8"),
    ("random read of 4 KiB, depth 32", "read random 4096 32"),
    ("random write of 4 KiB, depth 1", "write random 4096 1"),
    ("random write of 4 KiB, depth 8", "write random 4096 8"),
    ("random write of 4 KiB, depth 32", "write random 4096 32"),
)
_MODULES = ("hv_storvsc", "sd_mod", "virtio_pci", "virtio_blk", "virtio_scsi", "nvme")
_DONE = re.compile(r"diskio: (\d+) requests (\d+) bytes (\d+) us, middle (\d+) us, 99th (\d+) us")
_DEVICES = "/dev/sda /dev/vda /dev/nvme0n1"
_DEVICE = f'until D=$(ls -d {_DEVICES} 2>/dev/null | head -n 1); [ -n "$D" ]; do usleep 100000; done'


class Step(NamedTuple):
    """One step of one VMM: a second's requests and bytes, microseconds of the middle one, exits each."""

    requests: float
    bytes: float
    middle: int
    exits: float | None


def script(milliseconds: int) -> str:
    """What the guest runs; a line before each step, so that exits can be counted from there."""
    steps = [f"echo step; /diskio $D {words} {milliseconds}" for _name, words in STEPS]
    return "\n".join([_DEVICE, *steps, "echo step"])


def _initrd(folder: Path, suite: str | None, milliseconds: int) -> Path:
    from hvkvm.boot import initramfs

    path = folder / "initramfs"
    data = initramfs.build(
        ["sh", "-c", script(milliseconds)],
        busybox=artifacts.path("busybox"),
        modules=_MODULES,
        kernel_modules_dir=artifacts.path("guest-modules", suite),
        files={"/diskio": program("diskio")},
    )
    path.write_bytes(data)
    return path


def measure(
    vmm: str, disk: Path, initrd: Path, *, suite: str | None = None, deadline: float = DEADLINE
) -> list[Step]:
    """One boot of "hvkvm", "hvkvm-user", one of ON_PCI or of QEMU's; a Step for each of STEPS. StepError."""
    name = vmm if vmm in (HVKVM, HVKVM_USER) else HVKVM if vmm in ON_PCI else "qemu-q35"
    append = bench_vmm.linux_append(name)
    kernel = artifacts.path("guest-kernel", suite)
    bus = vmm.removeprefix("hvkvm-") if vmm in ON_PCI else "vmbus"
    guest = bench_vmm.Guest(kernel, initrd, append, disk=disk, disk_bus=bus, qemu_disk=vmm)
    steps: list[Step] = []
    with bench_vmm.Running(name, guest, deadline=deadline) as running:
        before = None
        for _at, line in running.lines():
            if line == "step":
                before = running.kvm_exits()
            elif found := _DONE.search(line):
                requests, moved, microseconds, middle, _99th = map(int, found.groups())
                after = running.kvm_exits()
                exits = None if before is None or after is None else (after - before) / max(1, requests)
                steps.append(Step(requests * 1e6 / microseconds, moved * 1e6 / microseconds, middle, exits))
                if len(steps) == len(STEPS):
                    return steps
        raise StepError(f"{vmm}: {len(steps)} of {len(STEPS)} steps were done: {running.stop()[-500:]}")


def every(
    vmms: tuple[str, ...], tell: Callable[[str], None], *, suite: str | None = None
) -> dict[str, list[Step]]:
    """Each of `vmms`, one after the other on the same file."""
    with tempfile.TemporaryDirectory(prefix="hvkvm-bench-", dir=_PLACE) as name:
        folder = Path(name)
        disk = folder / "disk.raw"
        with disk.open("wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(b"\x5a" * (1 << 20))
        initrd = _initrd(folder, suite, MILLISECONDS)
        found = {}
        for vmm in vmms:
            tell(f"disk: {vmm}")
            found[vmm] = measure(vmm, disk, initrd, suite=suite)
        return found


def rows(vmms: tuple[str, ...], tell: Callable[[str], None], *, suite: str | None = None) -> list[Row]:
    """hvkvm's `vmms` and those of QEMU's, as rows of the table; then both on PCI."""
    found = every((*vmms, *PEERS, *ON_PCI, "nvme"), tell, suite=suite)
    made = rows_of({name: found[name] for name in (*vmms, *PEERS)})
    for own, peer in ON_PCI.items():
        made += rows_of({own: found[own], peer: found[peer]}, f"{own.removeprefix('hvkvm-')}, ")
    return made


def rows_of(found: dict[str, list[Step]], prefix: str = "") -> list[Row]:
    """A row a step and peer: the first of `found` is ours."""
    own, *peers = found
    made: list[Row] = []
    for number, (step, _words) in enumerate(STEPS):
        name = prefix + step
        mine = found[own][number]
        for peer in peers:
            its = found[peer][number]
            if step.startswith("sequential"):
                made.append(Row(name, "MB/s", mine.bytes / 1e6, its.bytes / 1e6, "more", peer))
            else:
                made.append(Row(name, "1/s", mine.requests, its.requests, "more", peer))
            made.append(Row(f"{name}: exits", "/op", mine.exits, its.exits, "", peer))
    return made


def main() -> int:
    """Measure what is named, all by default, and print the table."""
    from steps import bench_table

    bench_vmm.ensure_debugfs()
    vmms = tuple(sys.argv[1:]) or (HVKVM, HVKVM_USER, *PEERS)
    found = every(vmms, say)
    for vmm, steps in found.items():
        for (name, _words), step in zip(STEPS, steps, strict=True):
            exits = "-" if step.exits is None else f"{step.exits:.2f}"
            print(
                f"{vmm:12} {name:36} {step.requests:9.0f}/s {step.bytes / 1e6:8.1f} MB/s"
                f"  middle {step.middle} us  exits {exits}"
            )
    print(bench_table.table(rows_of(found)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StepError as error:
        say(f"bench: {error}")
        sys.exit(1)
