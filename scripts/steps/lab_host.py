"""The lab's machine as a QEMU process: how it is started, reached and ended.

Why: software emulation with SVM gives a real KVM host with in-kernel Hyper-V
on machines whose own KVM has none. Called by `scripts/lab`. One thread.

Each channel of the machine (terminal, control, signals, stdin, stdout, stderr)
is a virtio-serial port behind a listening unix socket that QEMU serves, so a
job is one set of connections, and a machine that is kept takes one job after
the other.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from steps import artifacts, host_tsc
from steps.distribution import StepError
from steps.lab_image import QEMU, Image, Plan, image

MOST_PLACE = 107 - len("/hvkvm-lab-kept-4294967295/terminal")
CHANNELS = ("terminal", "control", "signals", "stdin", "stdout", "stderr")
# Patching of kernel code races under the multi-threaded emulation of QEMU before 10: an L1 with two
# processors there dies of "Oops: int3" in a run in a dozen, with one it does not.
SAFE_SMP_VERSION = 10
# oops=panic and panic=-1 with -no-reboot: a broken L1 ends the process at once instead of hanging.
# norandmaps: what is at other addresses is translated anew, and so was most of every process. Without it,
# QEMU 7.2 took 2.0 s of a processor for 20 starts of busybox and 0.9 for one of Python; with it 0.7 and 0.3.
APPEND = (
    "console=ttyS0 quiet oops=panic panic=-1 mitigations=off nokaslr norandmaps"
    " tsc=reliable random.trust_cpu=on"
)

_PR_SET_PDEATHSIG = 1
_KVM_CHECK_EXTENSION = 0xAE03
_KVM_CAP_HYPERV_SYNIC2 = 148
_COMPLAINT = re.compile(r"Kernel panic|Oops|BUG:|fault")


def has_hyperv() -> bool:
    """Whether this machine's own KVM has the in-kernel SynIC."""
    import fcntl

    try:
        kvm = os.open(os.environ.get("HVKVM_KVM", "/dev/kvm"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, _KVM_CAP_HYPERV_SYNIC2) > 0
    except OSError:
        return False
    finally:
        os.close(kvm)


def qemu_version() -> int:
    """The major version of the QEMU on this machine. Raises StepError when there is none."""
    if shutil.which(QEMU) is None:
        raise StepError(f"{QEMU} is not installed (package qemu-system-x86); scripts/setup installs it")
    text = subprocess.run([QEMU, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    match = re.search(r"version (\d+)", text)
    return int(match[1]) if match else 0


CPU = "EPYC-Rome,+svm,+npt,-xsave,-avx,-avx2,-fma,-f16c,-vaes,-vpclmulqdq,-cx16"
"""What the emulator does right. It cannot intercept XSETBV, so KVM would run every guest with a stale XCR0
and lose its vector registers; and a nested guest's CMPXCHG16B was seen to end in a double fault (6.12).
QEMU does not hide what needs XSAVE with it, and Linux 7.2 panics on AVX without it."""


def default_cpus() -> int:
    """How many processors this machine's QEMU can give the lab and stay stable."""
    return 2 if qemu_version() >= SAFE_SMP_VERSION else 1


def program(cpus: int) -> str:
    """The QEMU that bears `cpus` processors: this machine's, or a newer one that is unpacked beside it.

    Raises StepError where such a one is needed and cannot be had.
    """
    if cpus == 1 or qemu_version() >= SAFE_SMP_VERSION:
        return QEMU
    try:
        return str(artifacts.path("qemu"))
    except StepError as error:
        own = f"this machine's QEMU {qemu_version()} bears one"
        raise StepError(f"--cpus {cpus}: {own}, and no newer one can be had: {error}") from error


def command_line(plan: Plan, booted: Image, folder: Path, sockets: Mapping[str, int]) -> list[str]:
    """QEMU's argument list. `sockets` gives the listening descriptor of each channel."""
    line = [plan.qemu, "-nodefaults", "-no-user-config", "-name", "hvkvm-lab", "-machine", "q35"]
    line += ["-accel", "tcg,thread=multi", "-cpu", CPU]
    line += ["-smp", str(plan.cpus), "-m", plan.memory, "-display", "none", "-no-reboot"]
    line += ["-kernel", str(booted.kernel), "-initrd", str(booted.initramfs), "-append", append()]
    line += ["-chardev", f"file,id=log,path={_escaped(folder / 'console')}", "-serial", "chardev:log"]
    line += ["-device", "virtio-serial-pci,id=ports"]
    for number, name in enumerate(CHANNELS):
        kind = "virtconsole" if name == "terminal" else "virtserialport"
        line += ["-chardev", f"socket,id={name},fd={sockets[name]},server=on,wait=off"]
        line += ["-device", f"{kind},bus=ports.0,chardev={name},name={name},nr={number}"]
    for tag, path, mode in _file_systems(plan):
        line += ["-fsdev", f"local,id={tag},path={_escaped(path)},security_model=none{mode},multidevs=remap"]
        line += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return line


def append() -> str:
    """The words for the lab's Linux."""
    khz = host_tsc.khz()
    return APPEND if khz is None else f"{APPEND} tsc_early_khz={khz}"


def _file_systems(plan: Plan) -> list[tuple[str, Path, str]]:
    read_only = ",readonly=on"
    found = [("root", Path("/"), read_only)]
    if plan.fresh is not None:
        found.append(("project", plan.fresh, read_only))
    return found + [(tag, path, "") for tag, path in plan.shares()]


def _escaped(path: Path) -> str:
    """A path inside one of QEMU's comma-separated option strings."""
    return str(path).replace(",", ",,")


def place(*wished: str) -> str:
    """The first of these folders, or the temporary one, that can have a machine's sockets; else /tmp."""
    for folder in (*wished, tempfile.gettempdir()):
        # The kernel has 107 bytes for a socket's path, and a relative one leads elsewhere from elsewhere.
        fits = os.path.isabs(folder) and len(os.fsencode(folder)) <= MOST_PLACE
        if fits and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return "/tmp"


def start(plan: Plan, folder: Path, *, outlive: bool = False) -> subprocess.Popen[bytes]:
    """Start the machine; its sockets, console log and QEMU's own messages lie in `folder`.

    It ends with this process unless it shall `outlive` it. Raises StepError when
    QEMU or a package is missing.
    """
    booted = image(plan, folder)
    listening: dict[str, socket.socket] = {}
    try:
        for name in CHANNELS:
            listening[name] = server = socket.socket(socket.AF_UNIX)
            server.bind(str(folder / name))
            server.listen(4)
        sockets = {name: server.fileno() for name, server in listening.items()}
        with open(folder / "qemu", "wb") as messages:
            return subprocess.Popen(
                command_line(plan, booted, folder, sockets),
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                pass_fds=tuple(sockets.values()),
                # A session of its own: Ctrl-C is for the command inside, not for the machine.
                start_new_session=True,
                preexec_fn=None if outlive else _die_with_parent,  # noqa: PLW1509 (one thread here)
            )
    finally:
        for server in listening.values():
            server.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


def last_words(folder: Path, lines: int = 12) -> list[str]:
    """Why the machine died: what its kernel complained of, and the end of its console and QEMU's messages."""
    found: list[str] = []
    for name in ("console", "qemu"):
        try:
            text = (folder / name).read_text(errors="replace")
        except OSError:
            continue
        found += [s for line in text.splitlines() if (s := line.rstrip()) and "TCG doesn't support" not in s]
    # A register dump is long, and what it is about stands before it.
    headlines = [line for line in found[:-lines] if _COMPLAINT.search(line)]
    return headlines[-4:] + found[-lines:]
