"""A distribution kernel's hv_sock on our vsock, on KVM with Hyper-V."""

from __future__ import annotations

import os
import re
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import pytest
from linux_guest import KERNELS, MAIN_KERNELS, LinuxGuest, linux_guest
from linux_programs import ahead, program
from linux_shell import SHELL, Shell

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]
ahead("vsock")
MB = 1_000_000
STREAM = (100 if os.environ.get("HVKVM_SOAK") else 25) * MB
DONE = re.compile(
    r"(\w+) done: sent (\d+) crc ([0-9a-f]{8}), received (\d+) crc ([0-9a-f]{8}), (\d+) ms", re.MULTILINE
)
BLOCK = Random(1).randbytes(1_000_003)  # no multiple of any packet, so that a piece out of place shows
CURT = [BLOCK[:size] for size in (0, 1, 15_000, 100_000)]
SECONDS = 600
LISTENING = "waits() { until grep -q listening $1; do sleep 0.1; done; }; waits"


class Program(threading.Thread):
    """A host program on a socket: `to_send` bytes go out while all that comes is counted."""

    def __init__(self, sock: socket.socket, to_send: int = 0, *, waits: bool = False) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.sock.settimeout(SECONDS)
        self.to_send = to_send
        self.waits = waits
        self.sent_crc = self.crc = self.received = 0
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        sender = threading.Thread(target=self._send, daemon=True)
        if not self.waits:
            sender.start()
        buffer = bytearray(1 << 18)
        view = memoryview(buffer)
        try:
            while size := self.sock.recv_into(buffer):
                self.received += size
                self.crc = zlib.crc32(view[:size], self.crc)
        except OSError as error:
            self.error = error
        if self.waits:
            sender.start()
        sender.join()
        self.sock.close()

    def _send(self) -> None:
        left = self.to_send
        try:
            while left:
                piece = BLOCK[:left]
                self.sock.sendall(piece)
                self.sent_crc = zlib.crc32(piece, self.sent_crc)
                left -= len(piece)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.error = error

    def finish(self) -> Program:
        """Wait for both ends of the stream."""
        self.join(SECONDS)
        assert not self.is_alive()
        return self


class Host:
    """The host's programs: what the guest connects to is served by what `expect` was told."""

    def __init__(self, guest: LinuxGuest) -> None:
        self.guest = guest
        self.came: dict[int, list[Program]] = {}

    def expect(self, port: int, **options: Any) -> Callable[[], Program]:
        """Serve `port`; a function that waits for the next program there and its end."""
        programs = self.came.setdefault(port, [])
        self.guest.bus.vsock.listen(port, lambda sock: programs.append(Program(sock, **options)))

        def next_one() -> Program:
            self.guest.wait_until(lambda: programs, f"a connect to port {port}")
            return programs.pop(0).finish()

        return next_one

    def begun(self, port: int, received: int = 0) -> None:
        """Wait until a program serves `port`, to which the guest has sent so much."""
        programs = self.came[port]
        self.guest.wait_until(
            lambda: programs and programs[0].received >= received, f"a stream on port {port}"
        )


def ran(output: str) -> tuple[str, int, str, int, str, int]:
    """What the guest's program says of a connection: action, bytes and CRC each way, milliseconds."""
    match = DONE.search(output)
    assert match is not None, output
    return match[1], int(match[2]), match[3], int(match[4]), match[5], int(match[6])


def calm(guest: LinuxGuest) -> None:
    """All connections are over, the guest has given the channels back, and broke no rule."""
    server = guest.bus.host.server

    def over() -> bool:
        return not any(c.offer.name.startswith("vsock") for c in server.channels.all)

    guest.wait_until(lambda: guest.call(over), "the channels' end")
    assert server.reports.total == 0
    assert "0 connections" in guest.bus.vsock.describe()[0]


def vsock_guest(path: Path, **options: Any) -> Any:
    """A guest with the program, at a shell."""
    return linux_guest(
        SHELL,
        modules=("hv_vmbus", "hv_sock"),
        files={"/vsock": program("vsock")},
        vsock=path,
        memory=256 << 20,
        **options,
    )


@pytest.mark.parametrize("kernel", MAIN_KERNELS)
def test_streams_arrive_unchanged_and_end_with_the_machine(tmp_path: Path, kernel: str) -> None:
    path = tmp_path / "v"
    with vsock_guest(path, kernel=kernel) as guest:
        guest.start()
        shell, host = Shell(guest).ready(), Host(guest)
        sink, source = host.expect(1000), host.expect(1001, to_send=STREAM)
        with cost(guest, "guest to host, the guest connects"):
            _, sent, crc, received, _, _ = ran(shell.check(f"/vsock connect 1000 send {STREAM}"))
        peer = sink()
        assert (sent, received) == (peer.received, 0) == (STREAM, 0)
        assert crc == f"{peer.crc:08x}"
        with cost(guest, "host to guest, the guest connects"):
            _, _, _, received, crc, _ = ran(shell.check("/vsock connect 1001 recv"))
        assert received == STREAM
        assert crc == f"{source().sent_crc:08x}"

        # Linux gives the connections that it accepts larger rings.
        with cost(guest, "guest to host, the host connects"):
            shell.check(f"/vsock listen 2000 1 send {STREAM} >/sent & {LISTENING} /sent")
            peer = Program(call(path, b"CONNECT 2000\n")).finish()
            assert ran(shell.check("wait; cat /sent"))[1:3] == (STREAM, f"{peer.crc:08x}")
        with cost(guest, "host to guest, the host connects"):
            shell.check(f"/vsock listen 2001 1 recv >/received & {LISTENING} /received")
            peer = Program(call(path, b"CONNECT 2001\n"), to_send=STREAM).finish()
            assert ran(shell.check("wait; cat /received"))[3:5] == (STREAM, f"{peer.sent_crc:08x}")

        # A reset in the middle of a stream ends it, and the next life of the guest has its own.
        cut = host.expect(1006)
        shell.check("/vsock connect 1006 send 100000000000 &")
        host.begun(1006, 1)
        shell.send("reboot -f")
        assert cut().received > 0
        shell.ready()
        sink = host.expect(1007)
        shell.check("/vsock connect 1007 send 1000")
        assert sink().received == 1000
        calm(guest)


@contextmanager
def cost(guest: LinuxGuest, what: str) -> Iterator[None]:
    """Print what a stream took, for people: pytest -s."""
    before, start = guest.bus.vsock.connections.counters, monotonic()
    yield
    calm(guest)
    took = monotonic() - start
    after = guest.bus.vsock.connections.counters
    moved = {name: n - getattr(before, name) for name, n in after._asdict().items()}
    megabytes = (moved["bytes_to_guest"] + moved["bytes_to_host"]) / MB
    packets = moved["packets_to_guest"] + moved["packets_to_host"]
    print(
        f"{what}: {megabytes:.0f} MB, {megabytes / took:.1f} MB/s, per MB {packets / megabytes:.1f} packets, "
        f"{moved['signals'] / megabytes:.1f} signals, {moved['wakes'] / megabytes:.1f} wakes"
    )


@pytest.mark.usefixtures("each_synic")
@pytest.mark.parametrize("kernel", KERNELS)
def test_connections_of_every_kind(tmp_path: Path, kernel: str) -> None:
    path = tmp_path / "v"
    with vsock_guest(path, kernel=kernel) as guest:
        guest.start()
        guest.bus.vsock.connections.linger_seconds = 5.0
        shell, host = Shell(guest).ready(), Host(guest)

        # Both directions at a time.
        both = host.expect(1002, to_send=3 * MB)
        output = shell.check(f"/vsock connect 1002 both {3 * MB}")
        peer = both()
        assert ran(output)[1:3] == (3 * MB, f"{peer.crc:08x}")
        assert f"received {3 * MB} crc {peer.sent_crc:08x}" in output

        # The guest says at once that it sends nothing; the host's answer comes behind that.
        late = host.expect(1003, to_send=MB, waits=True)
        assert ran(shell.check("/vsock connect 1003 half"))[3:5] == (MB, f"{late().sent_crc:08x}")

        # Host programs on the path, several at a time, while others are told off.
        shell.check(f"/vsock listen 2000 3 echo >/echoes & {LISTENING} /echoes")
        peers = [Program(call(path, b"CONNECT 2000\n"), to_send=MB) for _ in range(3)]
        for peer in peers:
            peer.finish()
            assert peer.error is None
            assert (peer.received, peer.crc) == (MB, peer.sent_crc)
        for line in (b"CONNECT 2001\n", b"CONNECT x\n"):
            assert call(path, line, ok=False).recv(100) == b""
        assert shell.check("wait; grep -c done /echoes").strip() == "3"

        # Many short ones, to a socket of the host.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{path}_3000")
            listener.listen(8)
            threading.Thread(target=answer, args=(listener, 40), daemon=True).start()
            assert "burst done: 40 of 40" in shell.check("/vsock burst 3000 40")

        # Host programs that close behind their last word, before the guest's connect has come back.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{path}_3002")
            listener.listen(8)
            threading.Thread(target=say_and_close, args=(listener, CURT), daemon=True).start()
            for data in CURT:
                output = shell.check("/vsock connect 3002 recv")
                assert ran(output)[3:5] == (len(data), f"{zlib.crc32(data):08x}")
        for data in CURT:
            guest.bus.vsock.listen(1008, lambda sock, data=data: (sock.sendall(data), sock.close()))
            assert ran(shell.check("/vsock connect 1008 recv"))[3] == len(data)
        shell.check(f"/vsock listen 2002 1 recv >/curt & {LISTENING} /curt")
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
            caller.sendall(b"CONNECT 2002\n" + CURT[-1])
        assert ran(shell.check("wait; cat /curt"))[3:5] == (len(CURT[-1]), f"{zlib.crc32(CURT[-1]):08x}")

        # Nobody is there: Linux goes by its own patience.
        refused = shell.run("/vsock -t 1 connect 3001 recv")
        assert (refused.status, "connect: Connection timed out" in refused.output) == (1, True), (
            refused.output
        )

        # A program that is killed while it sends, and one that is while it does not read.
        killed = host.expect(1004)
        shell.check("/vsock connect 1004 send 1000000000 &")
        host.begun(1004, 1)
        shell.check("kill -9 $!; wait")
        assert killed().error is None
        full = host.expect(1005, to_send=STREAM)
        shell.check("/vsock connect 1005 hold >/dev/null &")
        host.begun(1005)
        shell.check("kill -9 $!; wait")
        assert isinstance(full().error, ConnectionError)
        calm(guest)
        assert guest.bus.vsock.connections.counters.bytes_to_host > 0


def call(path: Path, line: bytes, *, ok: bool = True) -> socket.socket:
    """A host program's connection to the path; with `ok`, behind its greeting."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(str(path))
    sock.sendall(line)
    if ok:
        greeting = b""
        while not greeting.endswith(b"\n"):
            greeting += sock.recv(1)
        assert re.fullmatch(rb"OK \d+\n", greeting)
    return sock


def answer(listener: socket.socket, count: int) -> None:
    """Send back the first bytes of each connection."""
    for _ in range(count):
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(SECONDS)
            sock.sendall(sock.recv(4))
            sock.recv(1)


def say_and_close(listener: socket.socket, words: list[bytes]) -> None:
    """Say one of the words to each who comes, and leave at once."""
    for word in words:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(word)
