"""The VMBus host beside a stock Linux guest: how soon it has its devices, heartbeats, vsock streams.

One boot a SynIC. The guest runs `tests/guests/linux/vsock.c`; the host's ends
are threads of this process. Called by `scripts/bench`, or by itself:

    .venv/bin/python scripts/steps/bench_vmbus.py [kernel|user]...

A figure, not a test. What else the guest does meanwhile is counted with it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
_FOLDERS = (str(PROJECT), str(PROJECT / "scripts"), str(PROJECT / "tests/guests"))
sys.path[:0] = [path for path in _FOLDERS if path not in sys.path]

from linux_programs import program  # noqa: E402

from steps import artifacts, bench_vmm  # noqa: E402
from steps.distribution import StepError  # noqa: E402

if TYPE_CHECKING:
    from hvkvm.machine.machine import Machine

BEATS = 60
ECHOES = 100
CONNECTS = 20
STREAM = 16_000_000
"""Bytes each way."""
_ECHO_SIZE = 64
_DEADLINE = 120.0
_TO_HOST, _TO_GUEST, _ECHO, _CONNECT = 1000, 1001, 1002, 1003


def script(stream: int, connects: int) -> str:
    """What the guest runs. Each line says when it is over, so that counting can begin anew."""
    steps = (
        f"connect {_TO_HOST} send {stream}",
        f"connect {_TO_GUEST} recv",
        f"connect {_ECHO} echo",
        f"burst {_CONNECT} {connects}",
    )
    return "\n".join(
        ["echo bench-ready; read -r go", *(f"/vsock {step}; echo bench-over; read -r go" for step in steps)]
    )


class Costs(NamedTuple):
    """What was counted in a step: exits to the VMM and in all (KVM's count), interrupts of ours, messages."""

    exits: int
    kvm_exits: int
    signals: int
    messages: int

    def less(self, other: Costs) -> Costs:
        """The difference."""
        return Costs(*(mine - its for mine, its in zip(self, other, strict=True)))


class Figures(NamedTuple):
    """Seconds: contact to the last offer's being taken, heartbeats, echoes, connects; bytes a second."""

    offers: float
    beats: list[float]
    beat_costs: Costs
    to_host: float
    to_host_costs: Costs
    to_guest: float
    to_guest_costs: Costs
    echoes: list[float]
    echo_costs: Costs
    connects: float
    connect_costs: Costs


def measure(
    synic: str, *, suite: str | None = None, stream: int = STREAM, connects: int = CONNECTS
) -> Figures:
    """One boot on SynIC "kernel" or "user"; `stream` bytes each way, `connects` connections.

    StepError when the guest does not get there; HvkvmError.
    """
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine

    config = MachineConfig(
        kernel=artifacts.path("guest-kernel", suite),
        busybox=artifacts.path("busybox"),
        modules_dir=artifacts.path("guest-modules", suite),
        modules=("hv_vmbus", "hv_utils", "hv_sock"),
        files=(("/vsock", program("vsock")),),
        append="quiet",
        memory=256 << 20,
        synic=synic,  # type: ignore[arg-type]
        vmbus="on",
        command=("sh", "-c", script(stream, connects)),
    )
    with Machine(config) as machine:
        return _Session(machine, stream).run()


class _Session:
    """One guest, from start to figures. Steps run on the caller's thread, callbacks on the I/O loop."""

    def __init__(self, machine: Machine, stream: int) -> None:
        assert machine.bus is not None
        self._machine = machine
        self._stream = stream
        self._bus = machine.bus
        self._said = bytearray()
        self._messages = 0
        self._contact = 0.0
        self._offers = 0.0
        self._results: dict[int, Any] = {}
        machine.board.attach_sink(self._said.extend)
        self._bus.host.server.trace = self._traced

    def run(self) -> Figures:
        self._serve(_TO_HOST, _sink)
        self._serve(_TO_GUEST, lambda sock: _source(sock, self._stream))
        self._serve(_ECHO, _echoes)
        bursts: list[float] = []
        self._bus.vsock.listen(_CONNECT, lambda sock: bursts.append(_answer(sock)))
        self._machine.start()
        self._wait(lambda: b"bench-ready" in self._said, "the guest's shell")
        self._wait(lambda: self._bus.heartbeat.beats > 0 and self._offers > 0, "the first heartbeat")
        time.sleep(0.5)  # other drivers settle
        beats, beat_costs = self._counted(self._beat)
        ports = (_TO_HOST, _TO_GUEST, _ECHO, _CONNECT)
        steps = [self._counted(lambda n=n: self._step(n, ports[n])) for n in range(4)]  # type: ignore[misc]
        began, ended = bursts[0], bursts[-1]
        return Figures(
            self._offers - self._contact,
            beats,
            beat_costs,
            self._stream / self._results[_TO_HOST],
            steps[0][1],
            self._stream / self._results[_TO_GUEST],
            steps[1][1],
            self._results[_ECHO],
            steps[2][1],
            (ended - began) / (len(bursts) - 1),
            steps[3][1],
        )

    # The bus.

    def _traced(self, to_host: bool, message: Any) -> None:
        from hvkvm.abi import vmbus_messages as wire

        self._messages += 1
        if message.kind.type == wire.INITIATE_CONTACT:
            self._contact = time.monotonic()
        elif message.kind.type == wire.ALLOFFERS_DELIVERED and not self._offers:
            self._machine.platform.io.call_soon(self._all_taken)

    def _all_taken(self) -> None:
        """Look every millisecond whether the guest has taken the last offer."""
        if self._bus.host.snapshot()["to_guest_waiting"]:
            self._machine.platform.io.call_later(0.001, self._all_taken)
        else:
            self._offers = time.monotonic()

    def _beat(self) -> list[float]:
        """Ask for heartbeats one after the other; the seconds that each answer took."""
        from hvkvm.abi import ic

        took: list[float] = []
        done = threading.Event()

        def ask() -> None:
            began = time.monotonic()

            def answered(status: int, body: bytes) -> None:
                took.append(time.monotonic() - began)
                if len(took) == BEATS:
                    done.set()
                else:
                    self._machine.platform.io.call_soon(ask)

            body = ic.heartbeat_msg_data.pack(len(took))
            if not self._bus.heartbeat.ask(ic.ICMSGTYPE_HEARTBEAT, body, answered):
                raise StepError("the guest's heartbeat driver is not there")

        self._machine.platform.io.call_soon(ask)
        self._wait(done.is_set, "heartbeats")
        return took

    # vsock.

    def _serve(self, port: int, end: Callable[[socket.socket], Any]) -> None:
        def serve(sock: socket.socket) -> None:
            with sock:
                sock.settimeout(_DEADLINE)
                self._results[port] = end(sock)

        self._bus.vsock.listen(
            port, lambda sock: threading.Thread(target=serve, args=(sock,), daemon=True).start()
        )

    def _step(self, number: int, port: int) -> None:
        """Let the guest go on with the next program, until it is over and so is the host's end on `port`."""
        self._machine.platform.io.call_soon(self._machine.board.serial.feed, b"go\n")
        self._wait(lambda: self._said.count(b"bench-over") > number, f"vsock program {number + 1}")
        self._wait(lambda: port in self._results or port == _CONNECT, f"the end of the stream on port {port}")

    # Counting and waiting.

    def _counted(self, work: Callable[[], Any]) -> tuple[Any, Costs]:
        before = self._costs()
        result = work()
        return result, self._costs().less(before)

    def _costs(self) -> Costs:
        exits = self._machine.exit_counts()
        signals = self._bus.vsock.connections.counters.signals
        channels: Any = self._bus.host.snapshot()["channels"]
        for channel in channels:
            if channel["open"] is not None and not channel["name"].startswith("vsock"):
                signals += channel["open"]["signals"]
        ours = sum(count for name, count in exits.items() if name != "KVM_EXIT_INTR")
        return Costs(ours, bench_vmm.kvm_exits_of(os.getpid()) or 0, signals, self._messages)

    def _wait(self, happened: Callable[[], object], what: str) -> None:
        end = time.monotonic() + _DEADLINE
        while not happened():
            if self._machine.outcome is not None or time.monotonic() > end:
                raise StepError(f"{what} did not come: {bytes(self._said[-500:])!r}")
            time.sleep(0.01)


def _sink(sock: socket.socket) -> float:
    """Take all that comes; seconds from the first byte to the last."""
    buffer = bytearray(1 << 18)
    began = 0.0
    while sock.recv_into(buffer):
        began = began or time.monotonic()
    return time.monotonic() - began


def _source(sock: socket.socket, size: int) -> float:
    """Send `size` bytes; seconds until the guest has closed, having taken all."""
    block = bytes(range(256)) * 256
    began, left = time.monotonic(), size
    while left:
        sock.sendall(block[:left])
        left -= min(left, len(block))
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(1):
        pass
    return time.monotonic() - began


def _echoes(sock: socket.socket) -> list[float]:
    """Send a little and wait until it is back, again and again."""
    took = []
    for _ in range(ECHOES):
        began = time.monotonic()
        sock.sendall(bytes(_ECHO_SIZE))
        back = 0
        while back < _ECHO_SIZE and (size := len(sock.recv(_ECHO_SIZE))):
            back += size
        took.append(time.monotonic() - began)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(1):
        pass
    return took


def _answer(sock: socket.socket) -> float:
    """Serve one connection of a burst on a thread; when it came."""

    def serve() -> None:
        with sock:
            sock.settimeout(_DEADLINE)
            sock.sendall(sock.recv(4, socket.MSG_WAITALL))
            while sock.recv(64):
                pass

    came = time.monotonic()
    threading.Thread(target=serve, daemon=True).start()
    return came


def rows(found: Figures) -> dict[tuple[str, str], tuple[float, str]]:
    """(figure, unit) -> (value, which way is better)."""
    megabytes = STREAM / 1e6
    return {
        ("VMBus: contact to all offers taken", "ms"): (found.offers * 1e3, "less"),
        ("VMBus: heartbeat round trip, median", "us"): (median(found.beats) * 1e6, "less"),
        ("VMBus: heartbeat round trip, best", "us"): (min(found.beats) * 1e6, "less"),
        **_cost_rows("heartbeat", found.beat_costs, BEATS, "/op"),
        ("vsock: guest to host", "MB/s"): (found.to_host / 1e6, "more"),
        **_cost_rows("vsock, guest to host", found.to_host_costs, megabytes, "/MB"),
        ("vsock: host to guest", "MB/s"): (found.to_guest / 1e6, "more"),
        **_cost_rows("vsock, host to guest", found.to_guest_costs, megabytes, "/MB"),
        ("vsock: echo of 64 bytes, median", "us"): (median(found.echoes) * 1e6, "less"),
        **_cost_rows("vsock echo", found.echo_costs, ECHOES, "/op"),
        ("vsock: connection, 4 bytes each way, end", "ms"): (found.connects * 1e3, "less"),
        **_cost_rows("vsock connection", found.connect_costs, CONNECTS, "/op"),
    }


def _cost_rows(
    what: str, costs: Costs, operations: float, unit: str
) -> dict[tuple[str, str], tuple[float, str]]:
    names = ("exits to the VMM", "exits from the guest (KVM's count)", "interrupts for a channel", "messages")
    return {
        (f"{what}: {name}", unit): (count / operations, "") for name, count in zip(names, costs, strict=True)
    }


def main() -> None:
    bench_vmm.ensure_debugfs()
    for synic in sys.argv[1:] or ("kernel", "user"):
        for (figure, unit), (value, _) in rows(measure(synic)).items():
            print(f"{synic}: {figure} [{unit}]: {value:.2f}", flush=True)


if __name__ == "__main__":
    main()
