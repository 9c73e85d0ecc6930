"""A user-mode network: passt, one process a NIC, which carries the guest's traffic over sockets of its own.

It needs no permission. We hold the one end of a socket pair and passt the other: when ours is closed, however
we end, passt ends. The guest gets its address by DHCP, DHCPv6 or router advertisement. As in QEMU's user
network the guest is 10.0.2.15 and the host answers at 10.0.2.2, wherever hvkvm runs.

Starting it blocks, so before the machine runs or on a thread of its own; else the owner is the I/O loop.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hvkvm.abi.virtio_net_hdr import VALID
from hvkvm.errors import ConfigError, HostExhausted, HvkvmError, Stopped, exhausted
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.net.port import ALL_OFFLOADS, Frame
from hvkvm.net.stream import LENGTH_BYTES, StreamPort
from hvkvm.net.tcp_help import TcpHelp, little_room
from hvkvm.runtime.protocols import Loop
from hvkvm.runtime.retry import Retry
from hvkvm.tuples import NamedTuple

PROGRAM = "passt"
GUEST, PREFIX, GATEWAY = "10.0.2.15", 24, "10.0.2.2"
GUEST6, GATEWAY6 = "fd68:766b:766d::15", "fd68:766b:766d::2"
GATEWAY_MAC = "52:55:0a:00:02:02"
DEFAULT_MTU = 65520
"""Of which passt tells the guest. Few frames carry much, since no frame leaves the host as it is."""

READY_SECONDS = 60.0
"""passt answers in some 10 ms; one that does not in this time may still do so later."""
END_SECONDS = 5.0
_MAX_SAID = 4096


class Forward(NamedTuple):
    """What comes to `port` of the host goes to `guest_port` of the guest. `address` "": every address."""

    protocol: str
    address: str
    port: int
    guest_port: int


class UserPort(StreamPort):
    """The network `process` is. Made by `start_user`."""

    kind = "user"
    call_bytes = 32 * 1024
    """What one system call writes, Linux gives to a reader in pieces of at least 36,544 bytes. passt, until
    its commit 57a21d2 of July 2024, loses its place in the stream where the rest of a frame is in two of
    them, or where a piece ends within a length. So several frames make one piece, and a longer one has a
    call for itself and makes two."""

    def __init__(
        self, io: Loop, process: subprocess.Popen[bytes], sock: socket.socket, mtu: int, observer: Observer
    ) -> None:
        # passt looks at no checksum, and makes a stream's bytes of a TCP packet of whatever length.
        super().__init__(io, mtu, offloads=ALL_OFFLOADS, header=VALID, observer=observer)
        self.process = process
        self._help = TcpHelp(io, self.send, little_room=little_room())
        self._said = b""
        self._listening: Any = None
        self._gone = True  # passt's process, or it was not ended yet
        self._when_gone: list[Callable[[], object]] = []
        self._listen_retry = Retry(io, self._watch_words)
        self.lost = self._ended
        self.on_close(self._end_process)
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        sock.setblocking(False)
        io.call_soon(self._watch_words)
        self.connected(sock)

    def stop(self, done: Callable[[], object]) -> None:
        """See `Port.stop`."""
        self._help.stop()
        super().stop(done)

    def _details(self) -> Mapping[str, object]:
        shown = {"passt": self.process.pid, "guest": f"{GUEST}/{PREFIX}", "gateway": GATEWAY}
        return {**shown, **self._help.inspect()}

    def _transmit(self, frames: Sequence[Frame], queue: int) -> int:
        taken = super()._transmit(frames, queue)
        self._help.from_guest(frames[:taken])
        return taken

    def _read(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        return self._help.from_passt(frames)

    def _watch_words(self) -> None:
        if self.process.stderr is not None and not self.process.stderr.closed:
            try:
                self._listening = self.io.add_reader(self.process.stderr.fileno(), self._hear)
            except OSError:  # the host has no memory for it now
                self._listen_retry.later()

    def _hear(self) -> None:
        assert self.process.stderr is not None
        with suppress(BlockingIOError):
            said = os.read(self.process.stderr.fileno(), _MAX_SAID)
            self._said = (self._said + said)[-_MAX_SAID:]
            if not said:
                self._listen_no_more()

    def _listen_no_more(self) -> None:
        self._listen_retry.cancel()
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.remove()

    def _ended(self, reason: str) -> None:
        words = reason_in(self._said)
        self._fail(f"passt has ended: {words or reason}")

    def _end_process(self) -> None:
        """passt ends by itself, its socket being closed; one that does not is killed."""
        self._help.stop()
        self._listen_no_more()
        if self.process.stderr is not None:
            self.process.stderr.close()
        with suppress(OSError):
            self.process.send_signal(signal.SIGKILL)
        # A killed process is gone soon, but not at once: until then it has the ports that it forwards.
        if not self.io.in_loop():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
            return
        with suppress(RuntimeError):  # no thread to be had: subprocess waits for it some time later
            threading.Thread(target=self._wait_for_process, name="passt-end", daemon=True).start()
            self._gone = False

    def _wait_for_process(self) -> None:
        self.process.wait()
        with suppress(Stopped):
            self.io.call_soon(self._process_is_gone)

    def _process_is_gone(self) -> None:
        self._gone = True
        waiting, self._when_gone = self._when_gone, []
        for done in waiting:
            done()

    def when_closed(self, done: Callable[[], object]) -> None:
        """See `Port.when_closed`."""
        if self._gone:
            done()
        else:
            self._when_gone.append(done)


def _not_started(program: str, error: OSError | subprocess.TimeoutExpired) -> HvkvmError:
    if (none_left := exhausted(error)) is not None:
        return HostExhausted(f"--net user: {program}: {none_left}")
    return ConfigError(f"--net user: {program}: {getattr(error, 'strerror', None) or error}; reinstall passt")


def start_user(
    io: Loop,
    *,
    mtu: int = DEFAULT_MTU,
    forwards: tuple[Forward, ...] = (),
    program: str = PROGRAM,
    observer: Observer = NULL_OBSERVER,
) -> UserPort:
    """Start passt; returns when it works. ConfigError with what it says against it, HostExhausted."""
    try:
        known = subprocess.run([program, "--help"], capture_output=True, timeout=READY_SECONDS, check=False)
    except FileNotFoundError:
        raise ConfigError("--net user: needs passt; install it by: apt-get install passt") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_started(program, error) from None
    known_options = (known.stdout + known.stderr).decode(errors="replace")
    if "--foreground" not in known_options:  # it has not come as far as its options
        why = " ".join(known_options.split())[:200] or f"exit status {known.returncode}"
        raise ConfigError(f"--net user: {program}: {why}; try {program} --help by hand")
    if "--fd" not in known_options:
        raise ConfigError("--net user: this passt is older than 2023 and knows no --fd; install a newer one")
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [program, *arguments(["--fd", str(theirs.fileno())], mtu, forwards, known_options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us
        )
    except OSError as error:
        ours.close()
        raise _not_started(program, error) from None
    finally:
        theirs.close()
    try:
        if not _answers(ours):
            said, silence = _last_words(process)
            raise ConfigError(f"--net user: passt: {reason_in(said) or silence}; {_remedy(said)}")
        return UserPort(io, process, ours, mtu, observer)
    except BaseException:
        ours.close()
        process.kill()
        process.wait()
        raise


def _last_words(process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
    """What passt said before it gave its guest up, and what there is to say where that is nothing.

    One that is still there in END_SECONDS is killed. Another process may have its standard error then.
    """
    try:
        return process.communicate(timeout=END_SECONDS)[1], "ended at once"
    except subprocess.TimeoutExpired as late:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        return late.stderr or b"", "closed its socket and did not end"


def arguments(where: list[str], mtu: int, forwards: tuple[Forward, ...], known: str) -> list[str]:
    """passt's: `where` it finds its guest, and what `--help` says that it knows."""
    made = ["--foreground", "--quiet", *where, "--mtu", str(mtu)]
    # Without it an older one tells syslog alone; a newer one has no such option, and needs none.
    made += ["--stderr"] if "--stderr" in known else []
    made += ["-a", GUEST, "-n", str(PREFIX), "-g", GATEWAY, "-a", GUEST6, "-g", GATEWAY6, "-M", GATEWAY_MAC]
    made += [] if _has_default_route() else ["-i", "lo"]
    for protocol, flag in (("tcp", "-t"), ("udp", "-u")):
        for each in forwards:
            if each.protocol == protocol:
                address = f"{each.address}/" if each.address else ""
                made += [flag, f"{address}{each.port}:{each.guest_port}"]
    return made


def _has_default_route() -> bool:
    """Whether passt finds an interface by itself. Without one, guest and host still reach one another."""
    try:
        with open("/proc/net/route") as table:
            if any(line.split()[1:2] == ["00000000"] for line in table):
                return True
        with open("/proc/net/ipv6_route") as table:
            return any(line.startswith("0" * 32 + " 00 ") and line.split()[-1] != "lo" for line in table)
    except OSError:
        return True


def _answers(sock: socket.socket) -> bool:
    """Whether passt works: False once it has ended. It is asked for its gateway's MAC as by a guest.

    What it says unasked is no answer: one of 2026 announces its addresses before it listens for what is
    forwarded, and ends where it cannot.
    """
    mac = bytes.fromhex("525500000015")
    question = b"\xff" * 6 + mac + bytes.fromhex("08060001080006040001")
    question += mac + bytes(4) + bytes(6) + socket.inet_aton(GATEWAY)
    sock.settimeout(READY_SECONDS)
    try:
        sock.sendall(len(question).to_bytes(LENGTH_BYTES, "big") + question)
        while length := sock.recv(LENGTH_BYTES, socket.MSG_WAITALL):
            frame = sock.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            if frame[:6] == mac and frame[12:14] == b"\x08\x06":
                return True
        return False
    except TimeoutError:
        return True
    except OSError:
        return False


_PORT = ("bind", "listen")
"""How passt calls what forward= asks for; a newer one says in its last line just that something failed."""


def reason_in(said: bytes) -> str:
    """The line of what passt said that means something: of a port that it cannot have, or the last."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line and "to syslog" not in line and "Don't run as root" not in line]
    about_ports = [line for line in lines if any(word in line.lower() for word in _PORT)]
    return "".join(c for c in [*lines, *about_ports[:1]][-1] if c.isprintable()) if lines else ""


def _remedy(said: bytes) -> str:
    if any(word.encode() in said.lower() for word in _PORT):
        return "another program has a port that forward= names, or it is below 1024: name another"
    return "try passt --foreground by hand"
