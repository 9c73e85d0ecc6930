"""Output to every kind of fd: nothing lost, nobody blocked, the caller's flags untouched."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import resource
import select
import socket
import threading

import pytest

from hvkvm.backends.output import HIGH_WATER, LIMIT, LOW_WATER, Output

DATA = bytes(range(256)) * 4096  # 1 MiB, LIMIT
SECONDS = 100.0


def flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def read_all(fd: int, into: bytearray) -> None:
    while True:
        try:
            piece = os.read(fd, 1 << 16)
        except OSError:
            break
        if not piece:
            break
        into += piece


@pytest.fixture
def pipe():
    ends = list(os.pipe())
    yield ends
    for fd in ends:
        if fd is not None:
            os.close(fd)


@pytest.mark.parametrize("nonblocking", [False, True])
def test_a_slow_pipe_gets_every_byte_and_its_flags_stay(io, until, pipe, nonblocking):
    reader, writer = pipe
    os.set_blocking(writer, not nonblocking)
    before = flags(writer)
    output = Output(writer, io)
    for start in range(0, len(DATA), 4096):
        io.call_soon(output.write, DATA[start : start + 4096])
    done = threading.Event()
    io.call_soon(done.set)
    assert done.wait(100), "the loop was blocked by a pipe nobody reads"
    assert flags(writer) == before
    got = bytearray()
    while len(got) < len(DATA):
        got += os.read(reader, 7777)
    assert got == DATA
    until(lambda: output._watch is None)
    output.close()
    output.close()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
def test_a_host_without_memory_for_a_moment_loses_nothing(io, until, pipe, monkeypatch, number):
    reader, writer = pipe
    write, refused = os.write, []

    def poor(fd, data):
        if fd == output._fd and len(refused) < 3:
            refused.append(fd)
            raise OSError(number, os.strerror(number))
        return write(fd, data)

    monkeypatch.setattr("hvkvm.runtime.retry.RETRY_SECONDS", 0.01)
    output = Output(writer, io)
    monkeypatch.setattr(os, "write", poor)
    output.write(b"hello")
    assert os.read(reader, 100) == b"hello"
    assert len(refused) == 3
    assert (output.failure, output.lost, output.broken) == (None, 0, False)
    until(lambda: output._watch is None)
    output.close()


@pytest.mark.parametrize("watched", [False, True])
def test_a_host_without_memory_is_not_asked_again_at_once(io, until, pipe, monkeypatch, watched):
    """The file is ready all along: watching it would have the loop do nothing else."""
    reader, writer = pipe
    write, refused = os.write, []

    def poor(fd, data):
        if fd == output._fd and not enough:
            refused.append(fd)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return write(fd, data)

    enough = watched
    monkeypatch.setattr("hvkvm.runtime.retry.RETRY_SECONDS", 1e6)
    output = Output(writer, io)
    monkeypatch.setattr(os, "write", poor)
    sent = HIGH_WATER if watched else 5
    output.write(bytes(sent))
    got = 0
    if watched:  # it was full before
        until(lambda: output._watch is not None)
        enough = False
        got += len(os.read(reader, 1 << 16))
    until(lambda: refused)
    turns = threading.Semaphore(0)
    for _ in range(100):
        io.call_soon(turns.release)
        assert turns.acquire(timeout=100)
    assert len(refused) <= 2
    assert not output.drain(0.2)
    assert len(refused) < 20
    enough = True
    reading = threading.Thread(target=read_all, args=(reader, rest := bytearray()))
    reading.start()
    assert output.drain(100)
    os.close(writer)
    output.close()
    pipe[1] = None
    reading.join()
    assert (got + len(rest), output.lost) == (sent, 0)


def test_congestion_is_told_at_high_and_low_water(io, until, pipe):
    reader, writer = pipe
    told = []
    output = Output(writer, io, on_congestion=told.append)
    output.write(bytes(HIGH_WATER // 2))
    assert told == []
    output.write(bytes(HIGH_WATER))
    assert told == [True]
    left = HIGH_WATER + HIGH_WATER // 2
    while left > LOW_WATER + (1 << 17):
        left -= len(os.read(reader, 4096))
    assert told == [True]
    while left:
        left -= len(os.read(reader, 4096))
    until(lambda: told == [True, False])
    output.close()


def test_a_source_that_does_not_wait_is_cut_and_counted(io, pipe):
    output = Output(pipe[1], io)
    output.write(DATA)
    output.write(DATA)
    assert len(output._waiting) <= LIMIT
    assert output.lost == 2 * len(DATA) - len(output._waiting) - _in_pipe(pipe[0])
    output.close()


def _in_pipe(fd: int) -> int:
    import struct
    import termios

    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]


def test_drain_waits_for_a_reader(io, pipe):
    reader, writer = pipe
    output = Output(writer, io)
    output.write(DATA[:300_000])
    assert not output.drain(0.01)
    got = bytearray()
    thread = threading.Thread(target=read_all, args=(reader, got))
    thread.start()
    assert output.drain(30)
    output.close()
    os.close(writer)
    pipe[1] = None
    thread.join()
    assert got == DATA[:300_000]


def test_what_waits_is_sent_though_the_host_refused_to_watch_the_pipe(io, until, pipe, refused):
    output = Output(pipe[1], io)
    output.write(DATA[:200_000])
    until(lambda: refused == [])  # before anybody reads: who reads fast leaves nothing to wait for
    got = bytearray()
    while len(got) < 200_000:
        got += os.read(pipe[0], 1 << 16)
    assert got == DATA[:200_000]
    output.close()


def test_drain_works_after_the_loop_has_stopped(io, pipe):
    output = Output(pipe[1], io)
    io.stop()
    output.write(b"last words")
    assert output.drain(1)
    assert os.read(pipe[0], 100) == b"last words"
    output.write(DATA[:200_000])
    got = bytearray()
    while not output.drain(0):
        got += os.read(pipe[0], 1 << 16)
    while len(got) < 200_000:
        got += os.read(pipe[0], 1 << 16)
    assert got == DATA[:200_000]
    output.close()


@pytest.mark.parametrize("when", ["before", "while waiting"])
def test_a_reader_that_went_away_is_told_once_and_costs_nothing(io, until, pipe, when):
    reader, writer = pipe
    told = []
    output = Output(writer, io, on_broken=lambda: told.append(1))
    if when == "while waiting":
        output.write(DATA[:200_000])
    os.close(reader)
    pipe[0] = None
    output.write(b"x")
    until(lambda: told)
    output.write(b"y")
    assert told == [1]
    assert output.drain(0)
    until(lambda: output._watch is None)
    output.close()


def test_a_file_is_appended_where_the_caller_stood(io, tmp_path):
    path = tmp_path / "out"
    with path.open("wb", buffering=0) as file:
        file.write(b"header\n")
        output = Output(file.fileno(), io)
        output.write(b"body\n")
        assert output.drain(SECONDS)
        output.close()
        file.write(b"footer\n")
    assert path.read_bytes() == b"header\nbody\nfooter\n"


def test_dev_null_takes_everything(io):
    fd = os.open("/dev/null", os.O_WRONLY)
    output = Output(fd, io)
    for _ in range(10):
        output.write(DATA)
    assert output.lost == 0
    assert output.drain(0)
    output.close()
    os.close(fd)


def test_a_full_device_is_told_once_and_what_it_refuses_is_counted(io):
    fd = os.open("/dev/full", os.O_WRONLY)
    gone, failed = [], []
    output = Output(fd, io, on_broken=lambda: gone.append(1), on_failed=failed.append)
    for _ in range(3):
        output.write(b"xy")
    assert [error.errno for error in failed] == [errno.ENOSPC]
    assert output.failure is failed[0]
    assert (gone, output.broken, output.lost, output.waiting) == ([], False, 6, 0)
    assert output.drain(0)
    output.close()
    os.close(fd)


def test_a_terminal_that_hangs_up_is_no_reader_that_wants_no_more(io):
    """Who lets a run outlive its terminal does not want it to end for that."""
    master, slave = pty.openpty()
    gone, failed = [], []
    output = Output(slave, io, on_broken=lambda: gone.append(1), on_failed=failed.append)
    os.close(master)
    output.write(b"x")
    assert ([error.errno for error in failed], gone, output.lost) == ([errno.EIO], [], 1)
    output.close()
    os.close(slave)


def test_a_file_that_has_room_again_is_written_again(io, tmp_path):
    with (tmp_path / "out").open("wb", buffering=0) as file:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        output = Output(file.fileno(), io)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
            output.write(b"123456")
            assert output.drain(SECONDS)
            output.write(b"789")
            assert output.drain(SECONDS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        output.write(b"0")
        assert output.drain(SECONDS)
        output.close()
    assert (tmp_path / "out").read_bytes() == b"12340"
    assert output.failure.errno == errno.EFBIG
    assert output.lost == 5


class StandingDisk:
    """Stands in for write(2) of a file whose disk stands still until `go_on` is set."""

    def __init__(self, monkeypatch, real):
        self.asked, self.go_on = threading.Event(), threading.Event()
        self._real = real
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd, data):
        self.asked.set()
        assert self.go_on.wait(SECONDS)
        return self._real(fd, data)


def test_a_disk_that_stands_still_holds_up_nobody(io, until, tmp_path, monkeypatch):
    with (tmp_path / "out").open("wb", buffering=0) as file:
        disk = StandingDisk(monkeypatch, os.write)
        told = []
        output = Output(file.fileno(), io, on_congestion=told.append)
        io.call_soon(output.write, DATA[: HIGH_WATER + 1])
        assert disk.asked.wait(SECONDS)
        on_loop = threading.Event()
        io.call_soon(on_loop.set)
        assert on_loop.wait(SECONDS), "the loop goes on"
        until(lambda: told == [True])
        assert not output.drain(0)
        assert not select.select([output.ready_fd], [], [], 0)[0]
        disk.go_on.set()
        assert select.select([output.ready_fd], [], [], SECONDS)[0]
        assert output.drain(0)
        until(lambda: told == [True, False])
        output.write(b"more")
        assert output.drain(SECONDS)
        output.close()
    assert (tmp_path / "out").read_bytes() == DATA[: HIGH_WATER + 1] + b"more"
    assert output.lost == 0


def test_what_waits_for_a_disk_at_the_end_is_dropped(io, tmp_path, monkeypatch):
    with (tmp_path / "out").open("wb", buffering=0) as file:
        disk = StandingDisk(monkeypatch, os.write)
        output = Output(file.fileno(), io)
        output.write(b"first")
        assert disk.asked.wait(SECONDS)
        output.write(b"second")
        output.close()
        disk.go_on.set()
        for thread in threading.enumerate():
            if thread.name == "output":
                thread.join(SECONDS)
                assert not thread.is_alive()
    assert (tmp_path / "out").read_bytes() == b"first"


def test_a_write_that_is_under_way_at_the_end_goes_into_no_other_file(io, tmp_path, monkeypatch):
    """Whoever closes the fd next may open another file by its number."""
    disk = StandingDisk(monkeypatch, os.write)
    with (tmp_path / "out").open("wb", buffering=0) as file:
        number = file.fileno()
        output = Output(number, io)
        output.write(b"of the guest")
        assert disk.asked.wait(SECONDS)
        output.close()
    with (tmp_path / "other").open("wb", buffering=0) as other:
        os.dup2(other.fileno(), number)
        disk.go_on.set()
        for thread in threading.enumerate():
            if thread.name == "output":
                thread.join(SECONDS)
        if number != other.fileno():
            os.close(number)
    assert (tmp_path / "other").read_bytes() == b""
    assert (tmp_path / "out").read_bytes() == b"of the guest"


def test_without_a_thread_a_file_is_written_all_the_same(io, tmp_path, monkeypatch):
    def none_left(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with (tmp_path / "out").open("wb", buffering=0) as file:
        output = Output(file.fileno(), io)
        output.write(b"said")
        assert output.drain(0)
        output.close()
    assert (tmp_path / "out").read_bytes() == b"said"


def test_a_socket_is_asked_before_each_piece(io, until):
    left, right = socket.socketpair()
    with left, right:
        output = Output(left.fileno(), io)
        done = threading.Event()
        io.call_soon(output.write, DATA)
        io.call_soon(done.set)
        assert done.wait(100), "the loop was blocked by a socket nobody reads"
        got = bytearray()
        while len(got) < len(DATA):
            got += right.recv(1 << 16)
        assert got == DATA
        output.close()


def test_a_closed_stdout_is_broken_from_the_start(io):
    fd = os.open("/dev/null", os.O_WRONLY)
    os.close(fd)
    output = Output(fd, io)
    assert output.broken
    output.write(b"x")
    output.close()
