"""Disks: one named result for each request, whatever becomes of the host's file, the worker or the VMM."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from disk_asker import SECONDS, Asker, page_buffer

from hvkvm.block.buffers import Buffers
from hvkvm.block.disk import NOW_BYTES, Disk
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.block.request import Op, Request, Result, Status, failure
from hvkvm.events import Event, Observer

MIB = 1 << 20


def test_data_goes_to_scattered_pages_and_back(asker: Asker, file: Path) -> None:
    disk = asker.disk(RawImage(file))
    data = file.read_bytes()
    pages = [page_buffer(4096) for _ in range(4)]
    results: list[Result] = []
    done = threading.Event()
    request = Request(Op.READ, 512, pages, lambda result: (results.append(result), done.set()))
    asker.submit(disk, [request])
    assert done.wait(SECONDS)
    assert results == [Result(Status.OK, 16384)]
    assert b"".join(pages) == data[512 : 512 + 16384]
    assert asker.ask(disk, Op.WRITE, MIB - 4096, page_buffer(4096, b"tail"), fua=True).status is Status.OK
    assert asker.ask(disk, Op.FLUSH).status is Status.OK
    assert file.read_bytes() == data[:-4096] + b"tail" * 1024


def test_many_in_flight_are_each_answered_once(asker: Asker, file: Path) -> None:
    disk = asker.disk(RawImage(file))
    data = file.read_bytes()
    random = Random(2)
    model = bytearray(data)
    for _ in range(5):
        # Distinct places, since requests in flight have no order; every answer is awaited.
        places = random.sample(range(0, MIB, 4096), 64)
        asked = []
        for place in places:
            if random.random() < 0.5:
                asked.append((Op.READ, place, page_buffer(4096), {}))
            elif random.random() < 0.7:
                asked.append((Op.WRITE, place, page_buffer(4096, random.randbytes(16)), {}))
            else:
                asked.append((Op.WRITE_ZEROES, place, None, {"length": 4096}))
        asked.append((Op.FLUSH, 0, None, {}))
        results = asker.ask_all(disk, asked)
        assert all(result.status is Status.OK for result in results)
        for op, place, buffer, _more in asked:
            if op is Op.READ:
                assert bytes(buffer) == model[place : place + 4096]
            elif op is Op.WRITE:
                model[place : place + 4096] = buffer
            elif op is Op.WRITE_ZEROES:
                model[place : place + 4096] = bytes(4096)
    assert file.read_bytes() == model
    report = disk.inspect()
    assert report["in_flight"] == 0
    assert sum(one["requests"] for one in report["operations"].values()) == 5 * 65


def test_what_the_cache_holds_is_answered_inside_of_begin(asker: Asker, file: Path) -> None:
    image = RawImage(file)
    readv = image.readv
    image.readv_now = readv  # type: ignore[method-assign]  # not every file system can
    disk = asker.disk(image)
    page = page_buffer(4096)

    def ask(op: Op, offset: int) -> list[Result]:
        """What `begin` has answered when it returns; what comes later goes to `late`."""
        results: list[Result] = []
        began: list[list[Result]] = []
        late.clear()

        def begin() -> None:
            disk.begin(Request(op, offset, [page], lambda one: (results.append(one), late.set())))
            began.append(list(results))

        asker.wait(lambda done: (begin(), done()))
        assert late.wait(SECONDS)
        assert len(results) == 1
        return began[0] or [results[0]._replace(detail="later")]

    late = threading.Event()
    assert ask(Op.READ, 8192) == [Result(Status.OK, 4096)]
    assert bytes(page) == file.read_bytes()[8192:12288]
    image.writev_now = lambda _offset, _buffers: -1  # type: ignore[method-assign]
    assert ask(Op.WRITE, 0)[0].detail == "later"
    image.writev_now = image.writev  # type: ignore[method-assign]
    assert ask(Op.WRITE, 0)[0].detail == "later", "it never can"
    disk.writes_now.works = True
    for _ in range(4):  # not tried for a while
        found = ask(Op.WRITE, 4096)
    assert found == [Result(Status.OK, 4096)]
    image.readv_now = lambda _offset, _buffers: 0  # type: ignore[method-assign]
    assert ask(Op.READ, 8192)[0] == Result(Status.OK, 4096, "later")
    image.readv_now = readv  # type: ignore[method-assign]
    report = disk.inspect()
    assert report["operations"]["write"]["requests"] == 6
    assert report["operations"]["read"]["requests"] == 2
    assert report["operations"]["read"]["bytes"] == 8192
    asker.wait(disk.stop)
    assert ask(Op.READ, 8192)[0].status is Status.CANCELLED


def test_a_turn_reads_so_much_on_the_loop_and_workers_the_rest(asker: Asker, file: Path) -> None:
    image = RawImage(file)
    image.readv_now = image.readv  # type: ignore[method-assign]  # not every file system can
    disk = asker.disk(image)
    buffers = [page_buffer(MIB) for _ in range(6)]
    inside: list[int] = []
    came = threading.Semaphore(0)

    def turns(done: Callable[[], object]) -> None:
        for turn in range(2):
            before = len(results)
            for buffer in buffers[3 * turn : 3 * turn + 3]:
                disk.begin(Request(Op.READ, 0, [buffer], lambda one: (results.append(one), came.release())))
            inside.append(len(results) - before)
            disk.poll()
        done()

    results: list[Result] = []
    asker.wait(turns)
    for _ in buffers:
        assert came.acquire(timeout=SECONDS)
    assert inside == [NOW_BYTES // MIB] * 2
    assert results == [Result(Status.OK, MIB)] * 6
    assert all(buffer == file.read_bytes() for buffer in buffers)


def test_what_cannot_be_is_refused_by_name(asker: Asker, file: Path) -> None:
    disk = asker.disk(RawImage(file))
    page = page_buffer(4096)
    assert asker.ask(disk, Op.READ, MIB, page).status is Status.OUT_OF_RANGE
    assert asker.ask(disk, Op.READ, -512, page).status is Status.OUT_OF_RANGE
    assert asker.ask(disk, Op.WRITE_ZEROES, 512, length=1 << 63).status is Status.OUT_OF_RANGE
    assert asker.ask(disk, Op.READ, 100, page).status is Status.MISALIGNED
    assert asker.ask(disk, Op.READ, 0, page_buffer(100)).status is Status.MISALIGNED
    assert asker.ask(disk, Op.READ, 0, page_buffer(0)) == Result(Status.OK)
    asker.wait(disk.close)
    reader = asker.disk(RawImage(file, ImageOptions(read_only=True)))
    for op, more in (
        (Op.WRITE, {"data": page}),
        (Op.DISCARD, {"length": 512}),
        (Op.WRITE_ZEROES, {"length": 512}),
    ):
        assert asker.ask(reader, op, 0, **more).status is Status.READ_ONLY
    assert asker.ask(reader, Op.FLUSH).status is Status.OK


def test_a_file_that_shrinks_gives_a_short_result(asker: Asker, file: Path) -> None:
    disk = asker.disk(RawImage(file))
    os.truncate(file, 8192 + 100)
    result = asker.ask(disk, Op.READ, 8192, page_buffer(4096))
    assert (result.status, result.transferred) == (Status.SHORT, 100)
    assert asker.ask(disk, Op.READ, MIB // 2, page_buffer(4096)).status is Status.SHORT
    assert asker.ask(disk, Op.WRITE, MIB // 2, page_buffer(4096)).status is Status.OK


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """`file_limit(n)`: no file can be written beyond byte n, as on a host disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_host_has_a_name_of_its_own(
    asker: Asker, file: Path, file_limit: Callable[[int], None]
) -> None:
    disk = asker.disk(RawImage(file))
    asker.wait(lambda done: disk.resize(2 * MIB, done))
    file_limit(MIB)
    assert asker.ask(disk, Op.WRITE, MIB, page_buffer(4096)).status is Status.NO_SPACE
    assert asker.ask(disk, Op.WRITE, 0, page_buffer(4096, b"y")).status is Status.OK
    assert asker.ask(disk, Op.FLUSH).status is Status.OK
    assert failure(OSError(errno.ENOSPC, "x")).status is Status.NO_SPACE
    assert failure(OSError(errno.EIO, "x")).status is Status.ERROR
    assert failure(RuntimeError("x")) == Result(Status.ERROR, 0, "x")


class Gate(RawImage):
    """An image whose reads wait until the test says."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open = threading.Event()
        self.began = threading.Semaphore(0)

    def readv_now(self, offset: int, buffers: Buffers) -> int:
        return -1

    def readv(self, offset: int, buffers: Buffers) -> int:
        self.began.release()
        assert self.open.wait(SECONDS)
        return super().readv(offset, buffers)


class Told(Observer):
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.came = threading.Event()

    def event(self, event: Event) -> None:
        self.events.append(event)
        self.came.set()


def test_stopping_waits_for_what_is_in_flight_and_refuses_the_rest(asker: Asker, file: Path) -> None:
    image = Gate(file)
    disk = asker.disk(image)
    pages = [page_buffer(4096) for _ in range(10)]
    results: list[Result] = []
    asker.submit(disk, [Request(Op.READ, 0, [page], results.append) for page in pages])
    assert image.began.acquire(timeout=SECONDS)
    stopped = threading.Event()
    asker.loop.call_soon(disk.stop, stopped.set)
    assert asker.ask(disk, Op.READ, 0, page_buffer(4096)).status is Status.CANCELLED
    assert not stopped.wait(0.05)
    image.open.set()
    assert stopped.wait(SECONDS)
    assert [result.status for result in results] == [Status.OK] * 10
    assert disk.in_flight == 0
    asker.loop.call_soon(disk.start)
    assert asker.ask(disk, Op.READ, 0, page_buffer(4096)).status is Status.OK


def test_everybody_who_waits_for_rest_hears_of_it(asker: Asker, file: Path) -> None:
    image = Gate(file)
    disk = asker.disk(image)
    asker.submit(disk, [Request(Op.READ, 0, [page_buffer(512)], lambda _result: None)])
    assert image.began.acquire(timeout=SECONDS)
    heard = [threading.Event() for _ in range(3)]
    asker.loop.call_soon(disk.drain, heard[0].set)
    asker.loop.call_soon(disk.stop, heard[1].set)
    asker.loop.call_soon(disk.stop, heard[2].set)
    image.open.set()
    assert all(event.wait(SECONDS) for event in heard)


def test_closing_gives_back_what_has_not_begun(asker: Asker, file: Path) -> None:
    image = Gate(file)
    disk = asker.disk(image, width=2)
    pages = [page_buffer(4096) for _ in range(6)]
    results: dict[int, Result] = {}
    four_back = threading.Event()

    def done(number: int, result: Result) -> None:
        results[number] = result
        if len(results) == 4:
            four_back.set()

    asker.submit(
        disk, [Request(Op.READ, 0, [page], lambda r, n=n: done(n, r)) for n, page in enumerate(pages)]
    )
    for _ in range(2):
        assert image.began.acquire(timeout=SECONDS)
    closed = threading.Event()
    asker.loop.call_soon(disk.close, lambda _result: closed.set())
    assert four_back.wait(SECONDS)  # it has begun to close, and the two are in the kernel yet
    assert not closed.wait(0.05)
    image.open.set()
    assert closed.wait(SECONDS)
    statuses = [results[number].status for number in range(6)]
    assert statuses == [Status.OK] * 2 + [Status.CANCELLED] * 4
    assert not any(b"".join(pages[2:]))
    assert image.file.fd == -1


def test_a_request_that_hangs_is_named_not_answered(asker: Asker, file: Path) -> None:
    image, told = Gate(file), Told()
    disk = asker.disk(image, observer=told, hang_seconds=0.05, name="sda")
    results: list[Result] = []
    answered = threading.Event()
    request = Request(Op.READ, 4096, [page_buffer(512)], lambda r: (results.append(r), answered.set()))
    asker.submit(disk, [request])
    assert told.came.wait(SECONDS)
    assert "sda: the host has not answered a read of 512 bytes at 0x1000" in told.events[0].text
    assert disk.inspect()["hung"] == ["read of 512 bytes at 0x1000"]
    assert disk.hung.startswith("read of 512 bytes at 0x1000 for ")
    assert not results
    image.open.set()
    assert answered.wait(SECONDS)
    assert disk.hung == ""
    assert results == [Result(Status.OK, 512)]
    assert len(told.events) == 1


def test_resizing_is_told_and_seen(asker: Asker, file: Path) -> None:
    disk = asker.disk(RawImage(file))
    seen: list[int] = []
    disk.on_resize = lambda: seen.append(disk.size)
    (result,) = asker.wait(lambda done: disk.resize(2 * MIB, done))
    assert result == Result(Status.OK)
    assert seen == [2 * MIB]
    assert asker.ask(disk, Op.WRITE, 2 * MIB - 512, page_buffer(512, b"x")).status is Status.OK
    (result,) = asker.wait(lambda done: disk.resize(2 * MIB + 1, done))
    assert result.status is Status.ERROR
    assert "not a multiple of 512" in result.detail
    assert disk.size == 2 * MIB


@pytest.mark.parametrize("how", ["drain", "stop", "close"])
def test_what_ends_a_disk_waits_for_a_resize(asker: Asker, file: Path, how: str) -> None:
    """Else a machine that is saved meanwhile has the old size, and its guest never hears of the new one."""
    image = RawImage(file)
    disk = asker.disk(image)
    inside, gate, ended = threading.Event(), threading.Event(), threading.Event()
    resize, order = image.resize, []

    def slow(size: int) -> None:
        inside.set()
        assert gate.wait(SECONDS)
        resize(size)

    image.resize = slow  # type: ignore[method-assign]
    disk.on_resize = lambda: order.append("told")
    asker.loop.call_soon(disk.resize, 2 * MIB, lambda result: order.append(str(result.status.value)))
    assert inside.wait(SECONDS)
    assert str(disk.inspect()["oldest"]).startswith(f"resize to {2 * MIB} bytes for ")
    asker.loop.call_soon(getattr(disk, how), lambda *_: (order.append("ended"), ended.set()))
    asker.wait(asker.loop.call_soon)
    assert not order
    gate.set()
    assert ended.wait(SECONDS)
    assert order == ["told", Status.OK.value, "ended"]


def test_a_done_that_raises_is_the_loops_fault_and_nobody_elses(
    asker: Asker, faults: list[BaseException], file: Path
) -> None:
    disk = asker.disk(RawImage(file))
    good: list[Result] = []
    done = threading.Event()
    pages = [page_buffer(512) for _ in range(4)]

    def note(result: Result) -> None:
        good.append(result)
        if len(good) == 2:
            done.set()

    asker.submit(
        disk,
        [
            Request(Op.READ, 0, [pages[0]], lambda _result: 1 // 0),
            Request(Op.READ, MIB, [pages[1]], lambda _result: 1 // 0),
            Request(Op.READ, 0, [pages[2]], note),
            Request(Op.READ, MIB, [pages[3]], note),
        ],
    )
    assert done.wait(SECONDS)
    asker.wait(disk.stop)
    # A worker answers the first where the file system has no RWF_NOWAIT, and that is later.
    assert {result.status for result in good} == {Status.OK, Status.OUT_OF_RANGE}
    assert [type(error) for error in faults] == [ZeroDivisionError] * 2
    faults.clear()


def test_what_the_page_cache_has_is_read_on_the_loop(asker: Asker, file: Path) -> None:
    image = RawImage(file)
    probe = page_buffer(4096)
    file.read_bytes()
    if image.readv_now(0, [probe]) != 4096:
        image.close()
        pytest.skip("this file system has no RWF_NOWAIT")
    disk: Disk = asker.disk(image)
    for number in range(8):
        assert asker.ask(disk, Op.READ, number * 4096, page_buffer(4096)).status is Status.OK
    assert disk.inspect()["answered_on_loop"] == 8
    assert asker.workers.threads == 0


@pytest.mark.parametrize("when", ["no thread", "no workers"])
def test_a_disk_is_closed_though_nobody_else_can(
    asker: Asker, file: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    image = RawImage(file)
    disk = asker.disk(image)
    results: list[Result] = []
    closed = threading.Event()

    def close() -> None:
        disk.close(lambda result: (results.append(result), closed.set()))
        if when == "no workers":
            asker.workers.close()

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    if when == "no thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    asker.loop.call_soon(close)
    assert closed.wait(SECONDS)
    assert [result.status for result in results] == [Status.OK]
    assert image.file.fd < 0
