"""A vsock and a guest that behaves as Linux's hv_sock, in one process and one thread, for tests.

Why: the interesting orders of a stream (rings full on one side, sockets full on
the other, a wake-up due to neither) are played out one step at a time. If no
step is left and a test still waits, a wake-up was lost, and that is an error at
once, without a clock.

Sockets are real; the loop's timers go by a clock that tests advance.
"""

from __future__ import annotations

import heapq
import select
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.devices.synth.vsock import Vsock
from hvkvm.observe.bus_text import bus_lines
from hvkvm.testing.vmbus_loopback import Loopback, LoopbackTimer
from hvkvm.testing.vsock_guest import RING_PAGES, VsockGuest


class _Handle:
    def __init__(self, io: LoopbackIo, fd: int) -> None:
        self._io = io
        self._fd = fd

    def remove(self) -> None:
        self._io.readers.pop(self._fd, None)


class LoopbackIo:
    """Stands for the I/O loop: `poll` runs what is readable, `advance` what is due."""

    def __init__(self, call_soon: Callable[..., object]) -> None:
        self.call_soon = call_soon
        self.readers: dict[int, Callable[[], object]] = {}
        self.now = 0.0
        self.rounds = 0
        self._timers: list[LoopbackTimer] = []

    def in_loop(self) -> bool:
        """As `IoLoop.in_loop`: whoever calls anything here stands for the loop."""
        return True

    def add_reader(self, fd: int, callback: Callable[[], object]) -> _Handle:
        """As `IoLoop.add_reader`."""
        assert fd not in self.readers
        self.readers[fd] = callback
        return _Handle(self, fd)

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> LoopbackTimer:
        """As `IoLoop.call_later`."""
        timer = LoopbackTimer(self.now + seconds, fn, args)
        heapq.heappush(self._timers, timer)
        return timer

    def poll(self) -> bool:
        """Run the readers that are ready; whether there were any. A round of the loop begins."""
        self.rounds += 1
        poller = select.poll()
        for fd in self.readers:
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _mask in poller.poll(0)]
        for fd in ready:
            if (callback := self.readers.get(fd)) is not None:
                callback()
        return bool(ready)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self._timers and self._timers[0].due <= end:
            timer = heapq.heappop(self._timers)
            self.now = max(self.now, timer.due)
            if timer.active:
                timer.fn(*timer.args)
        self.now = end

    @property
    def timers(self) -> int:
        """How many are set."""
        return sum(timer.active for timer in self._timers)


class HostProgram:
    """A host program's end of a stream. `greeting`: it waits for a line first."""

    def __init__(self, sock: socket.socket, *, greeting: bool = False) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.line: bytes | None = None if greeting else b""
        self.finish = False
        self.reads = True
        self.at_end = self.reset = self.shut = False

    def step(self, random: Random) -> bool:
        """Go on by one step; whether there was one to go."""
        return self._write(random) | self._read(random)

    def _read(self, random: Random) -> bool:
        if not self.reads or self.at_end or self.reset:
            return False
        try:
            data = self.sock.recv(random.choice((1, 500, 1 << 17)))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            self.reset = True
            return True
        self.at_end = not data
        self.incoming += data
        if self.line is None and b"\n" in self.incoming:
            line, _, rest = bytes(self.incoming).partition(b"\n")
            self.line, self.incoming = line, bytearray(rest)
        return True

    def _write(self, random: Random) -> bool:
        if self.line is None or self.shut or self.reset:
            return False
        try:
            if self.outgoing:
                sent = self.sock.send(self.outgoing[: random.choice((3, 5000, 1 << 17))], socket.MSG_NOSIGNAL)
                del self.outgoing[:sent]
                return True
            if self.finish:
                self.shut = True
                self.sock.shutdown(socket.SHUT_WR)
                return True
        except BlockingIOError:
            return False
        except OSError:
            self.reset = True
            return True
        return False


class VsockLoopback:
    """A vsock at `path`, a guest connected at `version`, and whoever runs in `programs`."""

    def __init__(
        self,
        path: Path | None,
        random: Random,
        *,
        version: int = vmbus.VERSION_WIN10_V5_3,
        pages: int = RING_PAGES,
        mix: bool = False,
        **options: Any,
    ) -> None:
        self.random = random
        self.path = path
        self.loopback = Loopback(random=random if mix else None)
        self.io = LoopbackIo(self.loopback.call_soon)
        self.vsock = Vsock(self.loopback.host, self.io, path, observer=self.loopback.notes)
        for name, value in options.items():
            setattr(self.vsock.connections, name, value)
        self.vsock.start()
        self.guest = VsockGuest(self.loopback, pages=pages)
        self.programs: list[HostProgram] = []
        self.loopback.connect(version)

    def caller(self, line: bytes) -> HostProgram:
        """A host program that connects to the path and says `line`."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        sock.sendall(line)
        return self.run_program(sock, greeting=True)

    def run_program(self, sock: socket.socket, *, greeting: bool = False) -> HostProgram:
        """Let a program run on this socket."""
        self.programs.append(HostProgram(sock, greeting=greeting))
        return self.programs[-1]

    def round(self) -> bool:
        """Everybody takes a step, or some do; whether anything happened."""
        actors: list[Callable[[], bool]] = [
            self.io.poll,
            lambda: self.guest.step(self.random),
            *(lambda p=program: p.step(self.random) for program in self.programs),
        ]
        self.random.shuffle(actors)
        moved = False
        for actor in actors:
            for _ in range(self.random.randrange(1, 4)):
                moved |= actor()
            for _ in range(self.random.choice((0, 1, 5, 1000))):
                if not self.loopback.step():
                    break
                moved = True
        return moved

    def run(self, until: Callable[[], object] | None = None) -> None:
        """Until that is so, or (None) until nothing is left to happen. AssertionError if it never is so."""
        while until is None or not until():
            if self.round() or self.loopback.step():
                continue
            if until is None:
                return
            raise AssertionError(
                "stuck: " + "\n".join(self.vsock.describe() + bus_lines(self.loopback.host.snapshot()))
            )

    def close(self) -> None:
        """End everything."""
        self.vsock.close()
        self.loopback.close()
        for program in self.programs:
            program.sock.close()
