"""A stock Linux on a tap interface, or behind passt: hv_netvsc of hvkvm beside QEMU's virtio-net.

One boot each, without vhost. The host's kernel is the peer, and this process its programs: it sends, receives
and asks, and holds the watch. Called by `scripts/bench`, or by itself:

    .venv/bin/python scripts/steps/bench_network.py [hvkvm|hvkvm-user|virtio-net|passt]...

Needs root, for a tap interface of its own. A figure, not a test.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
_FOLDERS = (str(PROJECT), str(PROJECT / "scripts"), str(PROJECT / "tests/guests"))
sys.path[:0] = [path for path in _FOLDERS if path not in sys.path]

from hvkvm.net import user  # noqa: E402
from steps import artifacts, bench_vmm, bench_wires  # noqa: E402
from steps.bench_table import Row  # noqa: E402
from steps.bench_vmm import HVKVM, HVKVM_USER  # noqa: E402
from steps.bench_wires import (  # noqa: E402
    BEHIND_PASST,
    BITS,
    HOST,
    ON_TAP,
    TCP_PORT,
    UDP_PORT,
    Wire,
    passt,
)
from steps.distribution import StepError, say  # noqa: E402

TAP = "hvkvm-bench"
SECONDS = 3.0
"""How long each stream goes."""
WARM_UP = 0.5
"""So long it goes before it is measured."""
DEADLINE = 300.0
PEER = "virtio-net"
WINDOW = 32
STEPS = ("TCP from the guest", "TCP to the guest", "UDP, 64 bytes there and back", f"UDP, {WINDOW} under way")
STREAMS = STEPS[:2]
PLAIN = " without offload"


class Step(NamedTuple):
    """One step of one VMM: bytes or round trips a second, and for each MiB or trip its exits and the VMM's
    reads and writes."""

    rate: float
    exits: float | None
    calls: float | None


class Host:
    """The host's programs."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._words = socket.create_server((wire.bind, TCP_PORT))
        self._streams = socket.create_server((wire.bind, TCP_PORT + 1))
        for server in (self._words, self._streams):
            server.settimeout(DEADLINE)

    def say(self, word: str) -> None:
        """Tell the guest what to do next: it asks when it has done what was before."""
        with self._words.accept()[0] as sock:
            sock.sendall(word.encode())

    def stream(self, word: str) -> Callable[[], float]:
        """A stream that has begun; what is returned moves it for SECONDS, and gives bytes."""
        self.say(word)
        sock = self._streams.accept()[0]
        data = bytes(1 << 18)

        def go(seconds: float) -> float:
            moved = 0
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                moved += len(sock.recv(1 << 18)) if word == "from" else sock.send(data)
            return moved

        def measured() -> float:
            with sock:
                return go(SECONDS)

        go(WARM_UP)
        return measured

    def trips(self, window: int) -> float:
        """Datagrams that come back, `window` under way, in SECONDS."""
        done = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(self._wire.udp)
            sock.settimeout(0.5)
            end = time.monotonic() + SECONDS
            under_way = 0
            while time.monotonic() < end:
                while under_way < window:
                    sock.send(bytes(64))
                    under_way += 1
                try:
                    sock.recv(2048)
                    done += 1
                    under_way -= 1
                except TimeoutError:
                    under_way = 0
        return done

    def close(self) -> None:
        """Listen no more."""
        self._words.close()
        self._streams.close()


def _calls(pid: int) -> int | None:
    with suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("syscr", "syscw")))
    return None


def _measured(running: bench_vmm.Running, work: Callable[[], float], unit: float) -> Step:
    pid = running.process.pid
    exits, calls, begun = running.kvm_exits(), _calls(pid), time.monotonic()
    units = max(work() / unit, 1e-9)
    seconds = time.monotonic() - begun
    after, calls_after = running.kvm_exits(), _calls(pid)
    return Step(
        units * unit / seconds,
        None if exits is None or after is None else (after - exits) / units,
        None if calls is None or calls_after is None else (calls_after - calls) / units,
    )


def measure(
    vmm: str, initrd: Path, wire: Wire, net: str = "", *, suite: str | None = None
) -> dict[str, Step]:
    """The steps by name of one boot of "hvkvm", "hvkvm-user" or PEER, on the tap or on `net`. StepError."""
    name = vmm if vmm in (HVKVM, HVKVM_USER) else "qemu-q35"
    append = bench_vmm.linux_append(name)
    guest = bench_vmm.Guest(
        artifacts.path("guest-kernel", suite), initrd, append, tap="" if net else TAP, net=net
    )
    steps: dict[str, Step] = {}
    host = Host(wire)
    try:
        with bench_vmm.Running(name, guest, deadline=DEADLINE) as running:
            lines = (line for _at, line in running.lines())
            if not any(line == "bench ready" for line in lines):
                raise StepError(f"{vmm}: no network: {running.stop()[-500:]}")
            threading.Thread(target=lambda: list(lines), daemon=True).start()
            for plain in (False,) if net else (False, True):
                if plain:
                    host.say("plain")
                for step, word in zip(STREAMS, ("from", "to"), strict=True):
                    steps[step + PLAIN * plain] = _measured(running, host.stream(word), 1 << 20)
                if not plain:
                    for step, window in zip(STEPS[2:], (1, WINDOW), strict=True):
                        steps[step] = _measured(running, lambda n=window: host.trips(n), 1)
            host.say("end")
    finally:
        host.close()
    return steps


def _tap(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepError(f"ip {' '.join(words)}: {done.stderr.strip()}; needs root and the tun module")


def behind_passt(tell: Callable[[str], None], *, suite: str | None = None) -> dict[str, dict[str, Step]]:
    """hvkvm and PEER, each behind a passt of its own; none where there is no passt."""
    found: dict[str, dict[str, Step]] = {}
    if which(user.PROGRAM) is None:
        return found
    with tempfile.TemporaryDirectory(prefix="hvkvm-bench-") as name:
        folder = Path(name)
        folder.chmod(0o777)  # passt does not stay root
        initrd = bench_wires.initrd(folder, BEHIND_PASST, suite)
        tell("network behind passt: hvkvm")
        address, port = BEHIND_PASST.udp
        net = f"user,forward=udp:{address}:{port}-{UDP_PORT}"
        found[HVKVM] = measure(HVKVM, initrd, BEHIND_PASST, net, suite=suite)
        path = folder / "passt"
        tell(f"network behind passt: {PEER}")
        with passt(path):
            net = f"stream,id=n,server=off,addr.type=unix,addr.path={path}"
            found[PEER] = measure(PEER, initrd, BEHIND_PASST, net, suite=suite)
    return {vmm: {f"passt: {step}": its for step, its in steps.items()} for vmm, steps in found.items()}


def every(
    vmms: tuple[str, ...], tell: Callable[[str], None], *, suite: str | None = None
) -> dict[str, dict[str, Step]]:
    """Each of `vmms`, one after the other on the same tap interface."""
    _tap("tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr")
    try:
        _tap("addr", "add", f"{HOST}/{BITS}", "dev", TAP)
        _tap("link", "set", TAP, "up")
        with tempfile.TemporaryDirectory(prefix="hvkvm-bench-") as folder:
            initrd = bench_wires.initrd(Path(folder), ON_TAP, suite)
            found = {}
            for vmm in vmms:
                tell(f"network: {vmm}")
                found[vmm] = measure(vmm, initrd, ON_TAP, suite=suite)
            return found
    finally:
        _tap("link", "del", TAP)


def rows(vmms: tuple[str, ...], tell: Callable[[str], None], *, suite: str | None = None) -> list[Row]:
    """hvkvm's `vmms` and QEMU's, as rows of the table."""
    return rows_of(every((*vmms, PEER), tell, suite=suite)) + rows_of(behind_passt(tell, suite=suite))


def rows_of(found: dict[str, dict[str, Step]]) -> list[Row]:
    """Three rows a step and peer."""
    made: list[Row] = []
    if not found:
        return made
    own, *peers = found
    for name, mine in found[own].items():
        stream = "TCP" in name
        for peer in peers:
            its = found[peer][name]
            scale, unit, each = (1e6, "MB/s", "/MiB") if stream else (1, "1/s", "/trip")
            made.append(Row(name, unit, mine.rate / scale, its.rate / scale, "more", peer))
            made.append(Row(f"{name}: exits", each, mine.exits, its.exits, "", peer))
            made.append(Row(f"{name}: reads and writes", each, mine.calls, its.calls, "", peer))
    return made


def main() -> int:
    """Measure what is named, all by default, and print the table."""
    from steps import bench_table

    bench_vmm.ensure_debugfs()
    wanted = tuple(sys.argv[1:]) or (HVKVM, HVKVM_USER, PEER, "passt")
    taps = tuple(vmm for vmm in wanted if vmm != "passt")
    made = rows_of(every(taps, say)) if taps else []
    print(bench_table.table(made + (rows_of(behind_passt(say)) if "passt" in wanted else [])))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StepError as error:
        say(f"bench: {error}")
        sys.exit(1)
