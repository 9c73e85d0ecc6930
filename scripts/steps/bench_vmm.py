"""The VMMs that are compared: their command lines, one running instance, its memory and KVM's counters.

Called by `scripts/bench`. Both get the same kernel, initramfs, RAM (a shared
memfd) and enlightenments, no device that the measurement does not need, and
their console on a pipe.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from steps.bench_guest import PROJECT
from steps.distribution import StepError

HV_FLAGS = (
    "hv-relaxed,hv-vapic,hv-spinlocks=0xfff,hv-vpindex,hv-runtime,hv-reset,hv-crash,hv-time,hv-synic,"
    "hv-stimer,hv-stimer-direct,hv-tlbflush,hv-ipi,hv-frequencies,hv-reenlightenment,hv-xmm-input"
)
"""What host-model is on an AMD host, by QEMU 7.2's names; kvm=off hides KVM's own leaves as hvkvm does."""

HVKVM = "hvkvm"
HVKVM_USER = "hvkvm-user"
"""hvkvm with its SynIC in user space."""
DEBUGFS = Path("/sys/kernel/debug")
# The guest's RAM by the name of its memfd: hvkvm's own, and QEMU's memory-backend-memfd.
_RAM_MAPPING = re.compile(r"/memfd:(hvkvm-ram|memory-backend-memfd)")
_PATIENCE = 5.0


class Guest(NamedTuple):
    """What is booted. `kernel` may be a multiboot image; `append` is its command line."""

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    memory: int = 512
    testdev: bool = False
    hyperv: bool = True
    disk: Path | None = None
    """A raw image."""
    disk_bus: str = "vmbus"
    """Where it is under hvkvm: vmbus (hv_storvsc), nvme or virtio."""
    qemu_disk: str = "virtio-blk"
    """What it is on under QEMU: virtio-blk, virtio-scsi or nvme."""
    tap: str = ""
    """A tap interface of the host: hv_netvsc under hvkvm, virtio-net without vhost under QEMU."""
    firmware: Path | None = None
    """What is started instead of a kernel; then `kernel` is not looked at."""
    config: Path | None = None
    """hvkvm's TOML file, for what has no flag: nothing else of this is looked at then."""
    net: str = ""
    """Another network: what stands behind hvkvm's --net, or behind QEMU's -netdev, whose id is n."""


def linux_append(vmm: str) -> str:
    """`Guest.append` that gives a Linux the same command line under each; hvkvm begins it by itself."""
    from hvkvm.boot.linux import default_cmdline

    return "quiet" if vmm in (HVKVM, HVKVM_USER) else f"{default_cmdline()} quiet"


def command_line(vmm: str, guest: Guest) -> list[str]:
    """How `vmm` ("hvkvm", "hvkvm-user", "qemu-" and a machine type) boots `guest`. StepError without QEMU."""
    if guest.config is not None and vmm == HVKVM:
        return [str(PROJECT / ".venv/bin/hvkvm"), "run", "--quiet", "--config", str(guest.config)]
    if vmm in (HVKVM, HVKVM_USER):
        words = [str(PROJECT / ".venv/bin/hvkvm"), "run", "--kernel", str(guest.kernel), "--quiet", "--json"]
        words += ["--memory", f"{guest.memory}M"]
        words += ["--initrd", str(guest.initrd)] if guest.initrd else []
        words += ["--append", guest.append] if guest.append else []
        words += ["--device", "hyperv-testdev"] if guest.testdev and guest.hyperv else []
        words += ["--synic", "user"] if vmm == HVKVM_USER else []
        if guest.disk is not None:
            words += ["--vmbus", "on"] if guest.disk_bus == "vmbus" else []
            words += ["--disk", f"{guest.disk},bus={guest.disk_bus}"]
        net = guest.net or (f"tap={guest.tap}" if guest.tap else "")
        words += ["--vmbus", "on", "--net", net] if net else []
        return words + ([] if guest.hyperv else ["--hv", "none"])
    machine = vmm.removeprefix("qemu-")
    # On a KVM without Hyper-V QEMU 7.2 may not start with -cpu host; a plain CPU model does for port exits.
    cpu = f"host,kvm=off,{HV_FLAGS}" if guest.hyperv else "qemu64"
    words = [_qemu(), "-nodefaults", "-no-user-config", "-accel", "kvm", "-cpu", cpu, "-display", "none"]
    words += ["-object", f"memory-backend-memfd,id=ram,size={guest.memory}M,share=on"]
    words += ["-machine", f"{machine},memory-backend=ram", "-m", f"{guest.memory}M"]
    words += ["-serial", "stdio", "-no-reboot"]
    words += ["-bios", str(guest.firmware)] if guest.firmware else ["-kernel", str(guest.kernel)]
    words += ["-initrd", str(guest.initrd)] if guest.initrd else []
    words += ["-append", guest.append] if guest.append else []
    if guest.disk is not None:
        words += ["-drive", f"file={guest.disk},if=none,id=d,format=raw,cache=writeback,aio=threads"]
        controller = ["-device", "virtio-scsi-pci"] if guest.qemu_disk == "virtio-scsi" else []
        kinds = {"virtio-scsi": "scsi-hd", "nvme": "nvme,serial=1"}
        words += [*controller, "-device", f"{kinds.get(guest.qemu_disk, 'virtio-blk-pci')},drive=d"]
    net = guest.net or (f"tap,id=n,ifname={guest.tap},script=no,downscript=no,vhost=off" if guest.tap else "")
    if net:
        words += ["-netdev", net, "-device", "virtio-net-pci,netdev=n,romfile="]
    if guest.testdev:
        words += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        words += ["-device", "hyperv-testdev"] if guest.hyperv else []
    elif machine != "microvm" and guest.hyperv:
        words += ["-device", "vmbus-bridge"]
    return words


def _qemu() -> str:
    from shutil import which

    found = which("qemu-system-x86_64")
    if found is None:
        raise StepError("qemu-system-x86_64: not found; install the qemu-system-x86 package to compare with")
    return found


def qemu_version() -> str:
    """QEMU's own word, such as "7.2.22"."""
    text = subprocess.run([_qemu(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", text)
    return found[1] if found else "?"


class Memory(NamedTuple):
    """A process's memory in KiB without the guest's RAM, and how much of that RAM is touched."""

    rss: int
    private: int
    ram: int


class Running:
    """One VMM process; `lines()` are the guest's console lines with the seconds since the process started."""

    def __init__(self, vmm: str, guest: Guest, *, deadline: float) -> None:
        words = command_line(vmm, guest)
        self.vmm = vmm
        self.stopped = False
        # A file, not a pipe: nobody reads it before the end.
        self._errors = os.memfd_create("stderr")
        self._began = time.monotonic()
        self._deadline = self._began + deadline
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )

    def lines(self) -> Iterator[tuple[float, str]]:
        """(seconds since process start, line) until the end or the deadline, which raises StepError."""
        import select

        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        rest = b""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise StepError(f"{self.vmm}: nothing more came before the deadline; last: {rest!r}")
            data = os.read(fd, 65536)
            now = time.monotonic() - self._began
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield now, line.decode("ascii", "replace").strip()

    def stop(self) -> str:
        """End it (politely first); what it wrote to standard error."""
        if not self.stopped:
            self.stopped = True
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
        os.lseek(self._errors, 0, os.SEEK_SET)
        return os.read(self._errors, 1 << 20).decode("utf-8", "replace")

    def memory(self) -> Memory:
        """What the process holds now beside guest RAM."""
        return parse_smaps(Path(f"/proc/{self.process.pid}/smaps").read_text())

    def kvm_exits(self) -> int | None:
        """KVM's own count of this VM's exits, or None where debugfs does not show it."""
        return kvm_exits_of(self.process.pid)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        os.close(self._errors)


def parse_smaps(text: str) -> Memory:
    """Sum /proc/PID/smaps, the guest's RAM apart."""
    rss = private = ram = 0
    in_ram = False
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if "-" in key and " " in line and not value.strip().endswith("kB"):
            in_ram = _RAM_MAPPING.search(line) is not None
        elif key == "Rss":
            ram, rss = (ram + _kib(value), rss) if in_ram else (ram, rss + _kib(value))
        elif key in ("Private_Clean", "Private_Dirty") and not in_ram:
            private += _kib(value)
    return Memory(rss, private, ram)


def _kib(value: str) -> int:
    return int(value.split()[0])


def kvm_exits_of(pid: int) -> int | None:
    """KVM's own count of the exits of that process's VM, or None where debugfs does not show it."""
    for folder in DEBUGFS.glob(f"kvm/{pid}-*"):
        try:
            return int((folder / "exits").read_text())
        except (OSError, ValueError):
            return None
    return None


def ensure_debugfs() -> None:
    """Mount debugfs where nobody has and we may: it holds KVM's exit counters."""
    if (DEBUGFS / "kvm").is_dir() or os.geteuid():
        return
    subprocess.run(["mount", "-t", "debugfs", "debugfs", str(DEBUGFS)], capture_output=True, check=False)


Progress = Callable[[str], None]
