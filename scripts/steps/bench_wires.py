"""What the guest of a network's measurement is connected to, and what it runs: a tap interface, or passt.

Called by `bench_network`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
_FOLDERS = (str(PROJECT), str(PROJECT / "scripts"), str(PROJECT / "tests/guests"))
sys.path[:0] = [path for path in _FOLDERS if path not in sys.path]

from linux_programs import program  # noqa: E402

from hvkvm.net import user  # noqa: E402
from steps import artifacts  # noqa: E402
from steps.distribution import StepError  # noqa: E402

HOST, GUEST, BITS = "10.97.0.1", "10.97.0.2", 24
TCP_PORT, UDP_PORT = 9000, 7007
_MODULES = ("hv_netvsc", "virtio_pci", "virtio_net")
_PLAIN = "/nic eth0 rx-gro-hw=0 tso=0 tx=0 gro=0 lro=0 rx=0 > /dev/null"
"""Each frame for itself, both ways. virtio-net has a word of its own for long ones, and refuses the last."""


class Wire(NamedTuple):
    """What the guest's NIC leads to: where the host's servers are, for the host and for the guest."""

    bind: str
    reach: str
    udp: tuple[str, int]
    """Where the host sends datagrams."""
    up: str
    """How the guest comes up."""


ON_TAP = Wire(
    HOST,
    HOST,
    (GUEST, UDP_PORT),
    f"ip addr add {GUEST}/{BITS} dev eth0; ip link set eth0 up;"
    f" until ping -c 1 -W 1 {HOST} > /dev/null; do :; done",
)
BEHIND_PASST = Wire(
    "127.0.0.1",
    user.GATEWAY,
    ("127.0.0.1", UDP_PORT),
    f"ip link set eth0 mtu {user.DEFAULT_MTU}; ip addr add {user.GUEST}/{user.PREFIX} dev eth0;"
    f" ip link set eth0 up; ip route add default via {user.GATEWAY}",
)


def script(wire: Wire) -> str:
    """What the guest runs: it comes up, says so, and does what the host asks over TCP."""
    return "\n".join(
        [
            "until ip link show eth0 > /dev/null 2>&1; do usleep 100000; done",
            wire.up,
            f"/nic udp {UDP_PORT} &",
            # passt of 2023 sends nothing to who has closed his half.
            "mkfifo /open; exec 7<>/open",
            "echo bench ready",
            f"while :; do until word=$(nc {wire.reach} {TCP_PORT} <&7); do usleep 100000; done",
            "case $word in",
            f"from) /nic source {wire.reach} {TCP_PORT + 1};; to) /nic sink {wire.reach} {TCP_PORT + 1};;",
            f"plain) {_PLAIN};; end) break;; esac; done",
        ]
    )


def initrd(folder: Path, wire: Wire, suite: str | None) -> Path:
    """An initramfs in `folder` that runs `script`."""
    from hvkvm.boot import initramfs

    made = folder / "initramfs"
    made.write_bytes(
        initramfs.build(
            ["sh", "-c", script(wire)],
            busybox=artifacts.path("busybox"),
            modules=_MODULES,
            kernel_modules_dir=artifacts.path("guest-modules", suite),
            files={"/nic": program("nic")},
        )
    )
    return made


@contextmanager
def passt(socket_path: Path) -> Iterator[None]:
    """passt for a VMM that connects to it, as hvkvm has its own."""
    known = subprocess.run([user.PROGRAM, "--help"], capture_output=True, text=True, check=False)
    forwards = (user.Forward("udp", *BEHIND_PASST.udp, UDP_PORT),)
    words = user.arguments(
        ["--socket", str(socket_path)], user.DEFAULT_MTU, forwards, known.stdout + known.stderr
    )
    process = subprocess.Popen(
        [user.PROGRAM, *words], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
    try:
        while not socket_path.exists():
            if process.poll() is not None:
                raise StepError("passt has ended")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
