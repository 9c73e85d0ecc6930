"""The host's end of a command's streams, against a guest that is a program of this process."""

from __future__ import annotations

import os
import queue
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polled_line import UnconnectedLine

from hvkvm.abi import guest_command as abi
from hvkvm.backends.host_input import HostInput
from hvkvm.backends.output import HIGH_WATER, Output
from hvkvm.devices.port.serial import Serial16550
from hvkvm.machine import command
from hvkvm.machine.command import Command
from hvkvm.machine.command_serial import CommandSerial
from hvkvm.machine.command_vsock import CONTROL_PIECE, CommandVsock
from hvkvm.machine.command_way import CommandState, Lines
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.timers import Timer

SECONDS = 30.0
MIB = 1 << 20


@given(st.lists(st.binary(max_size=100).map(lambda data: data.replace(b"\n", b"")), max_size=8), st.data())
def test_lines_come_whole_however_they_are_cut_and_long_ones_never(lines: list[bytes], data) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    got: list[bytes] = []
    taker = Lines(got.append)
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        taker.add(stream[:size])
        stream = stream[size:]
    assert got == [line for line in lines if len(line) < abi.MAX_LINE_BYTES]


def test_a_line_without_an_end_is_not_kept() -> None:
    got: list[bytes] = []
    taker = Lines(got.append)
    for _ in range(1000):
        taker.add(bytes(1000))
    assert len(taker._open) <= abi.MAX_LINE_BYTES + 1
    taker.add(b"\nready\n")
    assert got == [b"ready"]


def wait_until(happened: Callable[[], object]) -> None:
    end = monotonic() + SECONDS
    while not happened():
        assert monotonic() < end
        sleep(0.005)


class FakeVsock:
    """Where the guest's programs connect."""

    def __init__(self, io: IoLoop) -> None:
        self._io = io
        self.listeners: dict[int, Callable[[socket.socket], object]] = {}

    def listen(self, port: int, callback: Callable[[socket.socket], object]) -> None:
        self.listeners[port] = callback

    def unlisten(self, port: int) -> None:
        self.listeners.pop(port, None)

    def connect(self, port: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._io.call_soon(self.listeners[port], theirs)
        return ours


class Streams:
    """A CommandVsock between pipes of ours and connections of a guest's."""

    def __init__(self, io: IoLoop, source: int | None = None) -> None:
        self.io = io
        self.vsock = FakeVsock(io)
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.taken = {"out": bytearray(), "err": bytearray()}
        self.source = HostInput(source, io)
        self.way = CommandVsock(io, self.vsock, self.source, self.took, self.lines.put)

    def took(self, name: str, data: bytes) -> None:
        self.taken[name] += data

    def close(self) -> None:
        self.io.stop()
        self.way.close()
        self.source.close()
        assert not self.vsock.listeners


@pytest.fixture
def streams(io: IoLoop) -> Iterator[Callable[..., Streams]]:
    made: list[Streams] = []

    def make(source: int | None = None) -> Streams:
        made.append(Streams(io, source))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_input_and_both_outputs_are_byte_exact(streams, tmp_path: Path) -> None:
    data = os.urandom(MIB) * 8
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as file:
        host = streams(file.fileno())
        guest = {port: host.vsock.connect(port) for port in host.vsock.listeners}

        def echo() -> None:
            while piece := guest[abi.VSOCK_INPUT].recv(100_000):
                guest[abi.VSOCK_OUTPUT].sendall(piece)
                guest[abi.VSOCK_ERROR].sendall(piece[:100])
            guest[abi.VSOCK_OUTPUT].close()
            guest[abi.VSOCK_ERROR].close()

        thread = threading.Thread(target=echo)
        thread.start()
        done = threading.Event()
        thread.join(SECONDS)
        host.io.call_soon(lambda: host.way.take_rest(done.set, until_end=True))
        assert done.wait(SECONDS)
        assert zlib.crc32(host.taken["out"]) == zlib.crc32(data)
        assert host.taken["err"]


def test_a_guest_that_does_not_read_holds_the_input_up(streams) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    host = streams(reading)
    guest = host.vsock.connect(abi.VSOCK_INPUT)
    sent, quiet = 0, 0
    while quiet < 20:  # the pipe stays full for as long as nobody reads
        try:
            sent += os.write(writing, bytes(65536))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            sleep(0.01)
    assert sent < 2 * MIB
    os.close(writing)
    got = 0
    while piece := guest.recv(MIB):
        got += len(piece)
    assert got == sent
    os.close(reading)


def test_a_guest_that_floods_control_gets_a_few_lines_taken_a_round(streams) -> None:
    host = streams()
    seen: list[int] = []
    host.way.lines = Lines(lambda _line: seen.append(host.io.rounds))
    with host.vsock.connect(abi.VSOCK_CONTROL) as guest:
        guest.sendall(b"size\n" * 4000)
        wait_until(lambda: len(seen) == 4000)
    assert max(Counter(seen).values()) <= CONTROL_PIECE // len(b"size\n") + 1


def test_a_command_that_closes_its_input_is_not_waited_for(streams) -> None:
    host = streams(os.open("/dev/zero", os.O_RDONLY))
    guest = host.vsock.connect(abi.VSOCK_INPUT)
    assert guest.recv(10) == bytes(10)
    guest.close()
    wait_until(lambda: host.way._streams[abi.VSOCK_INPUT].sock is None)
    os.close(0 if host.source._fd is None else host.source._fd)


def test_held_output_waits_with_the_guest(streams) -> None:
    host = streams()
    guest = host.vsock.connect(abi.VSOCK_OUTPUT)
    other = host.vsock.connect(abi.VSOCK_ERROR)
    host.way.hold("out", True)
    guest.setblocking(False)
    sent, quiet = 0, 0
    while quiet < 20:
        try:
            sent += guest.send(bytes(65536))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            sleep(0.01)
    assert sent < 2 * MIB
    assert not host.taken["out"]
    other.sendall(b"not held")
    wait_until(lambda: host.taken["err"] == b"not held")
    host.way.hold("out", False)
    wait_until(lambda: len(host.taken["out"]) == sent)


def test_the_rest_is_taken_although_it_is_held(streams) -> None:
    host = streams()
    guest = host.vsock.connect(abi.VSOCK_OUTPUT)
    host.way.hold("out", True)
    guest.sendall(b"last words")
    guest.close()
    done = threading.Event()
    host.io.call_soon(lambda: host.way.take_rest(done.set, until_end=True))
    assert done.wait(SECONDS)
    assert host.taken["out"] == b"last words"


def test_the_rest_of_a_guest_that_died_is_what_has_come(streams) -> None:
    host = streams()
    guest = host.vsock.connect(abi.VSOCK_OUTPUT)
    host.way.hold("out", True)
    guest.sendall(b"last words")
    done = threading.Event()
    host.io.call_soon(lambda: host.way.take_rest(done.set, until_end=False))
    assert done.wait(SECONDS), "it waits for an end that will not come"
    assert host.taken["out"] == b"last words"


def test_control_goes_both_ways_and_a_guest_that_starts_anew_is_served(streams) -> None:
    reading, writing = os.pipe()
    host = streams(reading)
    first = host.vsock.connect(abi.VSOCK_CONTROL)
    for piece, line in ((b"ready\nsig", b"ready"), (b"naled\n", b"signaled"), (b"size\nrea", b"size")):
        first.sendall(piece)
        assert host.lines.get(timeout=SECONDS) == line
    host.io.call_soon(host.way.send_control, b"signal INT\n")
    assert first.recv(100) == b"signal INT\n"
    host.io.call_soon(host.way.reset)
    assert first.recv(100) == b""
    second = host.vsock.connect(abi.VSOCK_CONTROL)
    second.sendall(b"ready\n")
    assert host.lines.get(timeout=SECONDS) == b"ready"
    guest = host.vsock.connect(abi.VSOCK_INPUT)
    os.write(writing, b"for the second")
    assert guest.recv(100) == b"for the second"
    os.close(writing)
    assert guest.recv(100) == b""
    os.close(reading)


def rounds(io: IoLoop) -> None:
    """The loop has looked what is ready since."""
    for _ in range(3):
        done = threading.Event()
        io.call_soon(done.set)
        assert done.wait(SECONDS)


def test_input_that_comes_while_the_guest_starts_anew_is_kept_for_it(streams) -> None:
    """The guest of before had asked for it."""
    reading, writing = os.pipe()
    host = streams(reading)
    first = host.vsock.connect(abi.VSOCK_INPUT)
    wait_until(lambda: host.source._reader is not None)
    host.io.call_soon(host.way.reset)
    assert first.recv(100) == b""
    os.write(writing, b"for the second")
    rounds(host.io)
    second = host.vsock.connect(abi.VSOCK_INPUT)
    second.settimeout(SECONDS)
    assert second.recv(100) == b"for the second"
    os.close(writing)
    os.close(reading)


def test_input_that_found_no_room_and_a_begun_line_go_on_with_the_next_run(streams) -> None:
    reading, writing = os.pipe()
    host = streams(reading)
    host.io.call_soon(host.way.go_on, b"rea", b"left over, ")
    guest = host.vsock.connect(abi.VSOCK_INPUT)
    os.write(writing, b"and new")
    os.close(writing)
    got = b""
    while piece := guest.recv(100):
        got += piece
    assert got == b"left over, and new"
    control = host.vsock.connect(abi.VSOCK_CONTROL)
    control.sendall(b"dy\n")
    assert host.lines.get(timeout=SECONDS) == b"ready"
    os.close(reading)


def test_a_reader_who_is_slow_gets_everything(io: IoLoop) -> None:
    """Output holds the guest up, and lets it go on."""
    reading, writing = os.pipe()
    output = Output(writing, io)
    taken = bytearray()
    data = os.urandom(MIB) * 3
    vsock, source = FakeVsock(io), HostInput(None, io)
    way = CommandVsock(io, vsock, source, lambda _name, piece: output.write(piece), lambda _line: None)
    output.on_congestion = lambda held: way.hold("out", held)
    guest = vsock.connect(abi.VSOCK_OUTPUT)
    thread = threading.Thread(target=lambda: (guest.sendall(data), guest.close()))
    thread.start()
    wait_until(lambda: output.waiting > HIGH_WATER)
    sleep(0.2)
    assert output.waiting < 2 * HIGH_WATER
    while len(taken) < len(data):
        taken += os.read(reading, 65536)
    assert bytes(taken) == data
    thread.join(SECONDS)
    assert output.lost == 0
    io.stop()
    way.close()
    output.close()
    for fd in (reading, writing):
        os.close(fd)


class SerialGuest:
    """A guest that reads and writes three UARTs as a polling driver would."""

    def __init__(self, io: IoLoop, source: int | None) -> None:
        self.io = io
        self.ports = [Serial16550(UnconnectedLine(), lambda _data: None, io) for _ in range(3)]
        for port in self.ports:
            port.write(2, 1, 0x01)
        self.taken = {"out": bytearray(), "err": bytearray()}
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.source = HostInput(source, io)
        self.way = CommandSerial(self.ports, self.source, self.took, self.lines.put)

    def took(self, name: str, data: bytes) -> None:
        self.taken[name] += data

    def read(self, port: int, size: int) -> bytes:
        got = b""
        end = monotonic() + SECONDS
        while len(got) < size:
            if self.ports[port].read(5, 1) & 1:
                got += bytes([self.ports[port].read(0, 1)])
            else:
                assert monotonic() < end, got
        return got

    def read_line(self, port: int) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += self.read(port, 1)
        return line

    def write(self, port: int, data: bytes) -> None:
        for value in data:
            while not self.ports[port].read(5, 1) & 0x20:
                pass
            self.ports[port].write(0, 1, value)

    def ask(self) -> bytes:
        self.write(2, b"input\n")
        return self.read(0, int(self.read_line(0)))


@pytest.fixture
def serial_guest(io: IoLoop) -> Iterator[Callable[..., SerialGuest]]:
    made: list[SerialGuest] = []

    def make(source: int | None = None) -> SerialGuest:
        made.append(SerialGuest(io, source))
        return made[-1]

    yield make
    io.stop()
    for each in made:
        each.way.close()
        each.source.close()


def test_serial_input_comes_when_it_is_asked_for_and_every_byte_of_it(serial_guest, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20 + b"\n0\n0\n"
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as file:
        guest = serial_guest(file.fileno())
        sleep(0.05)
        assert not guest.ports[0].read(5, 1) & 1, "something came that nobody asked for"
        pieces = []
        while piece := guest.ask():
            pieces.append(piece)
        assert b"".join(pieces) == data
        assert guest.ask() == b""


def test_serial_input_that_was_asked_for_comes_from_the_next_run(serial_guest) -> None:
    reading, writing = os.pipe()
    idle, unused = os.pipe()
    first = serial_guest(idle)
    first.write(2, b"input\n")
    wait_until(lambda: first.way.asked)
    second = serial_guest(reading)
    second.io.call_soon(partial(second.way.go_on, connected=True, asked=first.way.asked, line=b""))
    os.write(writing, b"typed")
    assert second.read(0, int(second.read_line(0))) == b"typed"
    assert not second.way.asked
    for fd in (reading, writing, idle, unused):
        os.close(fd)


def test_serial_input_that_comes_while_the_guest_starts_anew_is_kept_for_it(serial_guest) -> None:
    reading, writing = os.pipe()
    guest = serial_guest(reading)
    guest.write(2, b"input\n")
    wait_until(lambda: guest.source._reader is not None)
    guest.io.call_soon(guest.way.reset)
    rounds(guest.io)
    os.write(writing, b"for the second")
    rounds(guest.io)
    assert not guest.ports[0].read(5, 1) & 1, "something came that nobody asked for"
    assert guest.ask() == b"for the second"
    os.close(writing)
    os.close(reading)


def test_the_rest_of_a_piece_and_of_a_line_are_not_the_next_lifes(serial_guest) -> None:
    reading, writing = os.pipe()
    guest = serial_guest(reading)
    os.write(writing, b"for the first")
    guest.write(2, b"ready\ninput\n")
    assert guest.read(0, 5) == b"13\nfo"
    guest.io.call_soon(guest.way.send_control, b"signal INT\n")
    assert guest.read(2, 3) == b"sig"
    guest.io.call_soon(guest.way.reset)
    rounds(guest.io)
    os.write(writing, b"for the second")
    assert guest.ask() == b"for the second"
    guest.write(2, b"ready\n")
    wait_until(lambda: guest.way.connected)
    guest.io.call_soon(guest.way.send_control, b"size 1 2\n")
    assert guest.read_line(2) == b"size 1 2\n"
    os.close(writing)
    os.close(reading)


def test_serial_output_is_byte_exact_and_apart(serial_guest) -> None:
    guest = serial_guest()
    data = bytes(range(256)) * 8
    guest.write(0, data)
    guest.write(1, data[::-1])
    wait_until(lambda: guest.taken == {"out": data, "err": data[::-1]})


def test_serial_control(serial_guest) -> None:
    guest = serial_guest()
    guest.io.call_soon(guest.way.send_control, b"signal INT\n")  # nobody is connected yet
    guest.write(2, b"ready\n")
    assert guest.lines.get(timeout=SECONDS) == b"ready"
    guest.io.call_soon(guest.way.send_control, b"signal TERM\n")
    assert guest.read_line(2) == b"signal TERM\n"


def test_a_guest_that_asks_and_never_reads_costs_nothing(serial_guest) -> None:
    with Path("/dev/zero").open("rb") as endless:
        guest = serial_guest(endless.fileno())
        for _ in range(50):
            guest.write(2, b"input\n")
        wait_until(lambda: guest.ports[0].rx_room() < abi.SERIAL_PIECE)
        for _ in range(1000):
            guest.io.call_soon(guest.way.send_control, b"size 24 80\n")
        guest.write(2, b"ready\n")
        assert guest.lines.get(timeout=SECONDS) == b"ready"
        assert guest.ports[0].rx_room() > 0
        assert guest.ports[2].rx_room() >= 0


class Board:
    """What `Command` needs of a machine's."""

    def __init__(self, io: IoLoop) -> None:
        self.command_ports = [Serial16550(UnconnectedLine(), lambda _data: None, io) for _ in range(3)]
        self.on_reset: Callable[[], object] | None = None
        self.command_loaded: CommandState | None = None
        self.command_state: Callable[[], CommandState | None] = lambda: None

    def note_output(self) -> None:
        pass

    def say(self, line: bytes) -> None:
        for value in line:
            self.command_ports[2].write(0, 1, value)

    def hear(self, end: bytes) -> bytes:
        """What is said to the guest, up to `end`."""
        got = bytearray()
        while not got.endswith(end):
            wait_until(lambda: self.command_ports[2].read(5, 1) & 1)
            got.append(self.command_ports[2].read(0, 1))
        return bytes(got)


class Patience:
    """The loop, with timers whose time passes when the test says so: a busy host answers late."""

    def __init__(self, io: IoLoop) -> None:
        self._io = io
        self.call_soon = io.call_soon
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, fn: Callable[..., object]) -> Timer:
        self.timers.append(Timer(seconds, fn, (), lambda _timer: None))
        return self.timers[-1]

    def ends(self) -> None:
        """Until all that were made have gone off, or not where they were cancelled."""
        wait_until(lambda: self.timers)
        assert {timer.due for timer in self.timers} == {command.SIGNAL_SECONDS}
        done = threading.Event()
        for timer in self.timers:
            self._io.call_soon(timer.run)
        self._io.call_soon(done.set)
        assert done.wait(SECONDS)


@pytest.fixture
def patience(io: IoLoop) -> Patience:
    return Patience(io)


@pytest.fixture
def signalled(io: IoLoop, patience: Patience) -> Iterator[tuple[Board, Command, list[str]]]:
    """A command that has started, and what it is told of guests that do not answer."""
    board = Board(io)
    made = Command(patience, board, None)  # type: ignore[arg-type]
    silences: list[str] = []
    assert not made.signal("INT", lambda: silences.append("too early")), "nobody is there yet"
    board.say(b"ready\n")
    wait_until(lambda: made.started)
    yield board, made, silences
    io.stop()
    made.close()


def test_a_signal_that_is_answered_is_forgotten(
    signalled: tuple[Board, Command, list[str]], patience: Patience
) -> None:
    board, made, silences = signalled
    assert made.signal("INT", lambda: silences.append("INT"))
    wait_until(lambda: board.command_ports[2].read(5, 1) & 1)
    board.say(b"signaled\n")
    wait_until(lambda: made._unanswered is None)
    patience.ends()
    assert silences == []


def test_a_signal_that_is_not_answered_is_told(
    signalled: tuple[Board, Command, list[str]], patience: Patience
) -> None:
    _board, made, silences = signalled
    assert made.signal("INT", lambda: silences.append("INT"))
    patience.ends()
    assert silences == ["INT"]


def test_a_signal_sent_while_ready_is_on_its_way_is_sent_once(
    signalled: tuple[Board, Command, list[str]],
) -> None:
    board, made, _silences = signalled
    assert made.signal("INT", lambda: None)
    rounds(made._io)
    board.say(b"ready\nsize\n")
    assert board.hear(b"size 24 80\n") == b"signal INT\nsize 24 80\n"


def test_however_often_the_size_is_asked_for_one_answer_waits(
    signalled: tuple[Board, Command, list[str]],
) -> None:
    """Else a guest that asks without end makes the loop's queue grow, and all others wait behind it."""
    _board, made, _silences = signalled
    told: list[bytes] = []
    made._ways[0].send_control = told.append  # type: ignore[method-assign]
    inside, go_on = threading.Event(), threading.Event()
    for asked in (1, 2):
        made._io.call_soon(lambda: (inside.set(), go_on.wait(SECONDS)))
        assert inside.wait(SECONDS)
        for _ in range(1000):
            made.tell_window()
        go_on.set()
        rounds(made._io)
        assert told == [b"size 24 80\n"] * asked
        inside.clear()
        go_on.clear()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_signal_that_met_a_reset_is_owed_to_the_next_life(
    signalled: tuple[Board, Command, list[str]], patience: Patience, comes_back: bool
) -> None:
    """Who sent it wants the command to end, in whatever life: a guest that reboots for ever would go on."""
    board, made, silences = signalled
    made.signal("INT", lambda: silences.append("INT"))
    made.signal("INT", lambda: silences.append("twice"))
    rounds(made._io)
    assert board.command_ports[2].read(5, 1) & 1
    for port in board.command_ports:
        port.reset()
    assert board.on_reset is not None
    made._io.call_soon(board.on_reset)
    wait_until(lambda: not made.started)
    rounds(made._io)
    assert not board.command_ports[2].read(5, 1) & 1
    if comes_back:
        board.say(b"ready\n")
        assert board.hear(b"\n") == b"signal INT\n"
        board.say(b"signaled\n")
        wait_until(lambda: made._unanswered is None)
    patience.ends()
    assert silences == ([] if comes_back else ["INT"])


def test_a_command_goes_on_with_another_run(
    signalled: tuple[Board, Command, list[str]], io: IoLoop, patience: Patience
) -> None:
    """Whose signals it gets, and whose line of control may have begun with the run before."""
    board, made, _silences = signalled
    board.say(b"signa")
    wait_until(lambda: made.save().serial_line == b"signa")
    assert board.command_state() == made.save() == CommandState(True, True, False, b"signa", b"", b"")
    other = Board(io)
    other.command_loaded = made.save()
    silences: list[str] = []
    second = Command(patience, other, None)  # type: ignore[arg-type]
    assert second.started
    assert second.signal("INT", lambda: silences.append("INT"))
    wait_until(lambda: other.command_ports[2].read(5, 1) & 1)
    other.say(b"led\n")
    wait_until(lambda: second._unanswered is None)
    patience.ends()
    assert silences == []
    second.close()


def test_output_says_as_well_that_the_command_has_started(io: IoLoop) -> None:
    """Its word for that takes another port, and may come later."""
    reading, writing = os.pipe()
    board, output, source = Board(io), Output(writing, io), HostInput(None, io)
    made = Command(io, board, None, source, {"out": output, "err": output})  # type: ignore[arg-type]
    board.command_ports[0].write(0, 1, 0x0A)
    assert os.read(reading, 10) == b"\n"
    assert made.signal("INT", lambda: None)
    wait_until(lambda: board.command_ports[2].read(5, 1) & 1)
    io.stop()
    made.close()
    output.close()
    os.close(reading)
    os.close(writing)
