"""Standard input of every kind: read as it is asked for, and its end told."""

from __future__ import annotations

import os
import pty
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvkvm.backends import host_input
from hvkvm.backends.host_input import HostInput
from hvkvm.runtime.io_loop import IoLoop

SECONDS = 30.0


class Reader:
    """Asks on the loop, and collects what it is given."""

    def __init__(self, fd: int | None, io: IoLoop) -> None:
        self.io = io
        self.input = HostInput(fd, io)
        self.got: queue.Queue[bytes] = queue.Queue()

    def ask(self, size: int = 100) -> None:
        self.io.call_soon(self.input.request, size, self.got.put)

    def next(self, size: int = 100) -> bytes:
        self.ask(size)
        return self.got.get(timeout=SECONDS)

    def all(self) -> bytes:
        return b"".join(iter(lambda: self.next(1000), b""))


@pytest.fixture
def read_from(io: IoLoop) -> Iterator[Callable[[int | None], Reader]]:
    readers: list[Reader] = []

    def make(fd: int | None) -> Reader:
        readers.append(Reader(fd, io))
        return readers[-1]

    yield make
    for reader in readers:
        reader.input.close()
        reader.input.close()


DATA = bytes(range(256)) * 40


def test_a_file_from_where_it_stands(read_from, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 10, os.SEEK_SET)
    assert read_from(fd).all() == DATA[10:]
    os.close(fd)


def test_a_pipe_in_pieces_and_no_more_than_was_asked_for(read_from) -> None:
    reading, writing = os.pipe()
    reader = read_from(reading)
    os.write(writing, DATA[:1000])
    assert reader.next(300) == DATA[:300]
    assert os.read(reading, 100) == DATA[300:400]  # what nobody asked for is there for others
    assert reader.next(1000) == DATA[400:1000]
    reader.ask()
    with pytest.raises(queue.Empty):
        reader.got.get(timeout=0.2)
    os.write(writing, b"later")
    assert reader.got.get(timeout=SECONDS) == b"later"
    os.close(writing)
    assert [reader.next(), reader.next()] == [b"", b""]
    os.close(reading)


def test_a_callers_pipe_stays_blocking(read_from) -> None:
    reading, writing = os.pipe()
    read_from(reading)
    assert os.get_blocking(reading)
    os.close(reading)
    os.close(writing)


def test_a_socket(read_from) -> None:
    ours, theirs = socket.socketpair()
    reader = read_from(ours.fileno())
    reader.ask()
    theirs.sendall(b"hello")
    assert reader.got.get(timeout=SECONDS) == b"hello"
    theirs.close()
    assert reader.next() == b""
    ours.close()


def test_a_socket_that_the_host_refused_to_watch_is_not_read_before_it_is_ready(
    read_from, until, refused: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    reader = read_from(ours.fileno())
    reader.ask()
    until(lambda: refused == [])
    theirs.sendall(b"hello")
    assert reader.got.get(timeout=SECONDS) == b"hello"
    theirs.close()
    ours.close()


@pytest.mark.parametrize("what", ["closed", "none", "null", "folder", "for writing"])
def test_what_has_nothing_to_read_is_at_its_end(read_from, tmp_path: Path, what: str) -> None:
    fd: int | None = None
    if what == "null":
        fd = os.open("/dev/null", os.O_RDONLY)
    elif what == "folder":
        fd = os.open(tmp_path, os.O_RDONLY)
    elif what == "for writing":
        fd = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    elif what == "closed":
        fd = os.open("/dev/null", os.O_RDONLY)
        os.close(fd)
    assert read_from(fd).next() == b""
    if fd is not None and what != "closed":
        os.close(fd)


def test_a_later_request_takes_the_place_of_an_open_one(read_from) -> None:
    reading, writing = os.pipe()
    reader = read_from(reading)
    wrong: queue.Queue[bytes] = queue.Queue()
    asked: queue.Queue[None] = queue.Queue()
    reader.io.call_soon(reader.input.request, 10, wrong.put)
    reader.ask()
    reader.io.call_soon(asked.put, None)
    asked.get(timeout=SECONDS)  # else what is readable may come before what is queued
    os.write(writing, b"x")
    assert reader.got.get(timeout=SECONDS) == b"x"
    assert wrong.empty()
    os.close(writing)
    os.close(reading)


def test_a_taker_may_ask_again(io: IoLoop, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    got: list[bytes] = []
    done: queue.Queue[None] = queue.Queue()
    with path.open("rb") as file:
        source = HostInput(file.fileno(), io)

        def take(data: bytes) -> None:
            got.append(data)
            if data:
                source.request(100, take)
            else:
                done.put(None)

        io.call_soon(source.request, 100, take)
        done.get(timeout=SECONDS)
        source.close()
    assert b"".join(got) == DATA
    assert max(map(len, got)) == 100


def test_a_background_job_reads_its_terminal_only_in_the_foreground(
    read_from, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading there would stop it (SIGTTIN). Who may read is the shell's to say at any time."""
    leader, follower = pty.openpty()
    allowed: list[bool] = []
    monkeypatch.setattr(host_input, "in_foreground", lambda _fd: bool(allowed))
    reader = read_from(follower)
    os.write(leader, b"typed\n")
    reader.ask()
    with pytest.raises(queue.Empty):
        reader.got.get(timeout=3 * host_input.FOREGROUND_SECONDS)
    allowed.append(True)
    assert reader.got.get(timeout=SECONDS) == b"typed\n"
    reader.ask()
    watches = threading.Event()
    reader.io.call_soon(watches.set)
    assert watches.wait(SECONDS)  # the terminal, now: the loop does what it is asked in order
    allowed.clear()
    os.write(leader, b"more\n")
    with pytest.raises(queue.Empty):
        reader.got.get(timeout=3 * host_input.FOREGROUND_SECONDS)
    allowed.append(True)
    assert reader.got.get(timeout=SECONDS) == b"more\n"
    reader.input.close()
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_terminal_that_hangs_up_is_at_its_end(read_from, waiting: bool) -> None:
    """Also where the signal for that, SIGHUP, is ignored or goes to somebody else."""
    leader, follower = pty.openpty()
    reader = read_from(follower)
    if waiting:
        reader.ask()
        watches = threading.Event()
        reader.io.call_soon(watches.set)
        assert watches.wait(SECONDS)
    os.close(leader)
    if not waiting:
        reader.ask()
    assert reader.got.get(timeout=SECONDS) == b""
    assert reader.next() == b""
    reader.input.close()
    os.close(follower)
