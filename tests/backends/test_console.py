"""The console between real ttys, pipes and files and a real UART."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

import pytest
from polled_line import UnconnectedLine

from hvkvm.backends.console import Console
from hvkvm.backends.terminal import RawTerminal
from hvkvm.devices.port.serial import Serial16550
from hvkvm.devices.port.serial_input import RX_LIMIT


class Guest:
    """A UART on a console, and a thread that reads it as a polling guest would."""

    def __init__(self, io, **console) -> None:
        self.console = Console(io, **console)
        self.serial = Serial16550(UnconnectedLine(), self.console.write, io)
        self.console.connect(self.serial)
        self.serial.write(2, 1, 0x01)
        self.got = bytearray()
        self._stop = False
        self._thread: threading.Thread | None = None

    def listen(self) -> None:
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop:
            if self.serial.read(5, 1) & 1:
                self.got.append(self.serial.read(0, 1))
            else:
                time.sleep(0.0005)

    def print(self, data: bytes) -> None:
        for byte in data:
            while not self.serial.read(5, 1) & 0x20:
                pass
            self.serial.write(0, 1, byte)

    def close(self) -> None:
        self._stop = True
        if self._thread is not None:
            self._thread.join()
        self.serial.output.flush(even_if_held=True)
        self.console.close()


@pytest.fixture
def guest(io):
    guests = []

    def make(**console) -> Guest:
        guests.append(Guest(io, **console))
        return guests[-1]

    yield make
    for each in guests:
        each.close()


@pytest.fixture
def tty():
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def read_until(fd: int, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        assert select.select([fd], [], [], 30)[0], f"only {got!r} came"
        got += os.read(fd, 4096)
    return got


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


# --- a terminal -----------------------------------------------------------------------------------


def test_typing_and_printing_on_a_tty(guest, tty, until):
    master, slave = tty
    before = termios.tcgetattr(slave)
    g = guest(input_fd=slave, output_fd=slave)
    g.console.start()
    assert is_raw(slave)
    g.listen()
    os.write(master, b"ls\r\x03\x1a\x11")
    until(lambda: g.got == b"ls\r\x03\x1a\x11")
    g.print(b"file\r\n")
    assert b"file" in read_until(master, b"\n")
    g.close()
    assert termios.tcgetattr(slave) == before


def test_ctrl_a_x_quits_and_h_helps_and_ctrl_a_is_itself(guest, tty, until):
    master, slave = tty
    quits = []
    g = guest(input_fd=slave, output_fd=slave, on_quit=lambda: quits.append(1))
    g.console.start()
    g.listen()
    os.write(master, b"a\x01hb\x01\x01c\x01")
    help_text = read_until(master, b"it ends the guest\r\r\n")
    assert b"Ctrl-a x" in help_text
    until(lambda: g.got == b"ab\x01c")
    assert quits == []
    os.write(master, b"x")
    until(lambda: quits)
    assert g.got == b"ab\x01c"
    assert g.console.tail.lines() == [], "help is not the guest's output"


def test_ctrl_a_b_is_a_break_in_its_place_among_the_keys(guest, tty, until):
    master, slave = tty
    g = guest(input_fd=slave, output_fd=slave)
    g.console.start()
    long = b"k" * (RX_LIMIT - 1)
    for start in range(0, len(long), 1000):
        os.write(master, long[start : start + 1000])
        until(lambda start=start: g.serial.rx_room() == RX_LIMIT - min(len(long), start + 1000))
    os.write(master, b"x\x01bh")  # the UART is full behind the x
    until(lambda: g.serial.rx_room() == 0)
    seen = bytearray()
    breaks = []

    def read() -> bool:
        while (status := g.serial.read(5, 1)) & 0x01:
            if status & 0x10:
                breaks.append(len(seen))
            seen.append(g.serial.read(0, 1))
        return len(seen) == RX_LIMIT + 2

    until(read)
    assert seen == long + b"x\0h"
    assert breaks == [RX_LIMIT]


def test_ctrl_c_is_the_guests_and_ends_it_only_while_nothing_there_listens(guest, tty, until):
    master, slave = tty
    quits = []
    g = guest(input_fd=slave, output_fd=slave, on_quit=lambda: quits.append(1))
    g.console.start()
    g.listen()
    g.serial.write(1, 1, 0x01)
    os.write(master, b"\x03")
    until(lambda: g.got == b"\x03")
    assert quits == []
    g.serial.write(1, 1, 0x00)
    os.write(master, b"\x03")
    until(lambda: quits)
    until(lambda: g.got == b"\x03\x03")


def test_an_error_inside_restores_the_terminal(guest, tty):
    slave = tty[1]
    before = termios.tcgetattr(slave)
    console = guest(input_fd=slave, output_fd=slave).console

    def fail_inside() -> None:
        with console:
            assert is_raw(slave)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert termios.tcgetattr(slave) == before


def test_a_terminal_that_hangs_up_ends_input_only(guest, io, until):
    master, slave = pty.openpty()
    out = os.open("/dev/null", os.O_WRONLY)
    g = guest(input_fd=slave, output_fd=out)
    g.console.start()
    until(lambda: g.console._reader is not None)
    os.close(master)
    until(lambda: g.console._reader is None)
    assert not g.console._look_again.waits, "and nobody asks any more whether it is in front"
    g.print(b"still here\n")
    g.close()
    assert g.console.tail.lines() == ["still here"]
    os.close(slave)
    os.close(out)


RAW_CHILD = """
import os, signal, sys, time
from hvkvm.backends.terminal import RawTerminal
terminal = RawTerminal(0)
terminal.enter()
os.write(1, b"raw")
{body}
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)", -signal.SIGHUP),
        ("sys.exit(3)", 3),
        ("raise RuntimeError", 1),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT),
        ("terminal.restore(); terminal.restore()", 0),
    ],
)
def test_whatever_ends_the_process_the_terminal_is_restored(tty, body, status):
    master, slave = tty
    before = termios.tcgetattr(slave)
    child = subprocess.run(
        [sys.executable, "-c", RAW_CHILD.format(body=body)],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert child.returncode == status
    assert read_until(master, b"raw") == b"raw"
    assert termios.tcgetattr(slave) == before


def test_after_a_stop_and_continue_it_is_raw_again(tty):
    slave = tty[1]
    before = termios.tcgetattr(slave)
    with RawTerminal(slave):
        termios.tcsetattr(slave, termios.TCSANOW, before)
        os.kill(os.getpid(), signal.SIGCONT)
        assert is_raw(slave)
    assert termios.tcgetattr(slave) == before
    assert signal.getsignal(signal.SIGCONT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_others_are_left_alone(tty):
    def mine(number, frame):
        pass

    old = signal.signal(signal.SIGTERM, mine)
    try:
        with RawTerminal(tty[1]):
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, old)


BACKGROUND_CHILD = """
import fcntl, os, signal, sys, termios
from hvkvm.backends.console import Console
from hvkvm.backends.terminal import in_foreground
os.setsid()
tty = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(tty, termios.TIOCSCTTY, 0)
assert in_foreground(tty)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    from types import SimpleNamespace
    from hvkvm.devices.port.serial import Serial16550
    from hvkvm.runtime.io_loop import IoLoop
    io = IoLoop()
    console = Console(io, input_fd=tty, output_fd=tty)
    console.connect(Serial16550(SimpleNamespace(pulse=lambda: None), console.write, io))
    before = termios.tcgetattr(tty)
    console.start()
    io.start()
    ok = not in_foreground(tty) and termios.tcgetattr(tty) == before
    io.stop()
    console.close()
    os._exit(0 if ok else 1)
pid, status = os.waitpid(child, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.kill(child, signal.SIGKILL)
    sys.exit(2)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_background_job_leaves_the_terminal_alone_and_is_not_stopped(tty):
    child = subprocess.run(
        [sys.executable, "-c", BACKGROUND_CHILD, os.ttyname(tty[1])], timeout=60, check=False
    )
    assert child.returncode == 0


# --- pipes and files ------------------------------------------------------------------------------

SCRIPT = bytes(i & 0xFF for i in range(5 * RX_LIMIT))


def test_a_long_input_waits_for_the_guest_and_arrives_whole(guest, until):
    reader, writer = os.pipe()
    out = os.open("/dev/null", os.O_WRONLY)
    g = guest(input_fd=reader, output_fd=out)
    g.console.start()
    feeder = threading.Thread(target=lambda: (os.write(writer, SCRIPT), os.close(writer)))
    feeder.start()
    until(lambda: g.serial.rx_room() == 0)
    until(lambda: g.console._reader is None)  # nobody reads while the UART is full
    g.listen()
    until(lambda: len(g.got) == len(SCRIPT))
    feeder.join()
    assert g.got == SCRIPT, "and Ctrl-a from a pipe is the guest's"
    until(lambda: g.console._reader is None)
    g.close()
    os.close(reader)
    os.close(out)


def test_input_from_a_file(guest, until, tmp_path):
    path = tmp_path / "script"
    path.write_bytes(SCRIPT)
    with path.open("rb") as script, path.with_name("out").open("wb") as out:
        g = guest(input_fd=script.fileno(), output_fd=out.fileno())
        g.console.start()
        g.listen()
        until(lambda: len(g.got) == len(SCRIPT))
        assert g.got == SCRIPT
        g.print(b"done\n")
        until(lambda: path.with_name("out").read_bytes() == b"done\n")
        g.close()


def test_input_that_the_host_refused_to_watch_is_not_read_before_it_is_ready(guest, until, refused):
    ours, theirs = socket.socketpair()
    out = os.open("/dev/null", os.O_WRONLY)
    g = guest(input_fd=ours.fileno(), output_fd=out)
    g.console.start()
    g.listen()
    until(lambda: refused == [])
    theirs.sendall(b"hello")
    until(lambda: g.got == b"hello")
    theirs.close()
    g.close()
    ours.close()
    os.close(out)


@pytest.mark.parametrize("fd", [None, -1, "null"])
def test_no_input_at_all(guest, fd):
    null = os.open("/dev/null", os.O_RDWR)
    g = guest(input_fd=null if fd == "null" else fd, output_fd=null)
    g.console.start()
    g.print(b"hello\n")
    g.close()
    os.close(null)
    assert g.console.tail.lines() == ["hello"]


def test_a_reader_that_pauses_holds_the_guest_up_and_loses_nothing(guest, until):
    reader, writer = os.pipe()
    g = guest(input_fd=None, output_fd=writer)
    data = b"0123456789abcde\n" * 40000  # 640 KB, more than everything that buffers
    printer = threading.Thread(target=g.print, args=(data,))
    printer.start()
    until(lambda: g.serial.output.full)
    assert printer.is_alive()
    got = bytearray()
    while len(got) < len(data):
        got += os.read(reader, 1 << 16)
    printer.join()
    assert got == data
    assert (g.serial.output.overruns, g.console.output.lost) == (0, 0)
    g.close()
    os.close(reader)
    os.close(writer)


def test_closing_in_the_middle_of_everything(io):
    for _ in range(30):
        reader, writer = os.pipe()
        out_reader, out = os.pipe()
        g = Guest(io, input_fd=reader, output_fd=out)
        g.console.start()
        feeder = threading.Thread(target=os.write, args=(writer, SCRIPT[:10000]))
        feeder.start()
        g.listen()
        g.print(b"x\n" * 50)
        g.close()
        feeder.join()
        for fd in (reader, writer, out, out_reader):
            os.close(fd)
