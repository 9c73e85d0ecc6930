"""Two Linux guests on one stream: ours with QEMU's, and then with another of ours. In a soak."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from guest_artifacts import artifact
from linux_guest import LinuxGuest, linux_guest
from linux_pair import OPEN, see_ping, send
from linux_pair import PORT as BACK
from linux_shell import SHELL, Shell

from hvkvm.boot import initramfs
from hvkvm.boot.linux import default_cmdline
from hvkvm.machine.nic_spec import NicSpec

QEMU = "qemu-system-x86_64"
pytestmark = [
    pytest.mark.hyperv,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"), reason="three boots: HVKVM_SOAK=1, or make soak-linux"
    ),
    pytest.mark.skipif(which(QEMU) is None, reason="no QEMU"),
]
MODULES = ("hv_vmbus", "hv_utils", "hv_netvsc")
OURS, ITS, SECOND = "10.96.0.1", "10.96.0.2", "10.96.0.3"
TO = 98
KIB = 1 << 10
# It sends back what it was sent, and waits to be ended.
QEMU_SCRIPT = f"""
until ip link show eth0 >/dev/null 2>&1; do usleep 10000; done
ip addr add {ITS}/24 dev eth0; ip link set eth0 up
{OPEN}
nc -l -p {TO} <&7 >/tmp/came & echo "peer $(echo is ready)"
wait; echo "came $(md5sum </tmp/came)"
until nc {OURS} {BACK} </tmp/came; do usleep 100000; done
sleep 10000
"""


class Console:
    """What QEMU's guest prints."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read1():
            self.text += data.decode(errors="replace").replace("\r", "")

    def line(self, guest: LinuxGuest, begins: str) -> str:
        """The rest of a whole line that begins so; the test's failure if QEMU ends before."""

        def found() -> str | None:
            assert self._process.poll() is None, self.text[-2000:]
            lines = self.text[: self.text.rfind("\n") + 1].splitlines()
            return next((line for line in lines if line.startswith(begins)), None)

        return guest.wait_until(found, f"{begins!r} of QEMU's guest").removeprefix(begins)


@contextmanager
def qemu(folder: Path, wire: Path) -> Iterator[Console]:
    """A Linux with QEMU's virtio-net at the other end of `wire`."""
    initrd = folder / "initramfs"
    initrd.write_bytes(
        initramfs.build(
            ["sh", "-c", QEMU_SCRIPT],
            busybox=artifact("HVKVM_GUEST_BUSYBOX"),
            modules=("virtio_pci", "virtio_net"),
            kernel_modules_dir=artifact("HVKVM_GUEST_MODULES"),
        )
    )
    words: list[Any] = [
        QEMU,
        "-nodefaults",
        "-no-user-config",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-display",
        "none",
    ]
    words += ["-machine", "q35", "-m", "256M", "-serial", "stdio", "-no-reboot"]
    words += ["-kernel", artifact("HVKVM_GUEST_KERNEL"), "-initrd", initrd]
    words += ["-append", f"{default_cmdline()} quiet"]
    words += ["-netdev", f"stream,id=n,server=off,addr.type=unix,addr.path={wire}"]
    words += ["-device", "virtio-net-pci,netdev=n,romfile=,mac=02:00:00:00:00:02"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield Console(process)
    finally:
        process.kill()
        process.wait()


def started(guest: LinuxGuest, address: str) -> Shell:
    guest.start()
    shell = Shell(guest).ready()
    shell.check(f"ip addr add {address}/24 dev eth0; ip link set eth0 up")
    return shell


def await_carrier(shell: Shell, up: bool) -> None:
    shell.check(f"until [ $(cat /sys/class/net/eth0/carrier) = {int(up)} ]; do usleep 10000; done")


def test_ours_and_qemus_and_another_of_ours_share_a_wire(tmp_path: Path) -> None:
    wire = tmp_path / "wire"
    data = os.urandom(256 * KIB)
    file = tmp_path / "data"
    file.write_bytes(data)
    common: dict[str, Any] = {"modules": MODULES, "memory": 256 << 20}
    with linux_guest(SHELL, nets=(NicSpec(listen=wire),), files={"/tmp/sent": file}, **common) as one:
        shell = started(one, OURS)
        await_carrier(shell, False)
        with qemu(tmp_path, wire) as console:
            console.line(one, "peer is ready")
            await_carrier(shell, True)
            see_ping(shell, ITS)
            shell.check(f"{OPEN}; nc -l -p {BACK} <&7 >/tmp/back & listener=$!")
            shell.check(f"nc {ITS} {TO} </tmp/sent")
            digest = hashlib.md5(data).hexdigest()
            assert console.line(one, "came ").split()[0] == digest
            shell.check("wait $listener")
            assert shell.check("md5sum </tmp/back").split()[0] == digest
        await_carrier(shell, False)
        with linux_guest(SHELL, nets=(NicSpec(socket=wire),), **common) as two:
            second = started(two, SECOND)
            await_carrier(shell, True)
            see_ping(shell, SECOND)
            send(shell, second, SECOND)
            send(second, shell, OURS)
            assert two.bus.host.server.reports.counts == {}
        await_carrier(shell, False)
        assert one.bus.host.server.reports.counts == {}
    assert not wire.exists()
