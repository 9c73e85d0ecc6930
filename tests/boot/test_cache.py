"""The cache when several fill it at once, and after one that was killed halfway."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvkvm import given_file
from hvkvm.boot import cache

SECONDS = 100.0


def test_two_threads_that_write_the_same_file_both_write_it(tmp_path: Path) -> None:
    path, inside, other_done = tmp_path / "folder/file", threading.Event(), threading.Event()
    seen: list[bytes] = []
    errors: list[BaseException] = []

    def slow() -> Iterator[bytes]:
        yield b"first"
        inside.set()
        assert other_done.wait(SECONDS)
        seen.append(path.read_bytes())
        yield b"second"

    def write() -> None:
        try:
            cache.publish(path, slow())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert inside.wait(SECONDS)
        cache.publish(path, [b"first", b"second"])
    finally:
        other_done.set()
        thread.join()
    assert (errors, seen, path.read_bytes()) == ([], [b"firstsecond"], b"firstsecond")
    assert os.listdir(path.parent) == ["file"]


HALFWAY = """
import sys, time
from pathlib import Path
from hvkvm.boot import cache

def pieces():
    yield b"half"
    print("halfway", flush=True)
    time.sleep(1000)

cache.publish(Path(sys.argv[1]), pieces())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_one_takes_away_what_a_killed_one_left_and_nothing_else(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "file"
    words = [sys.executable, "-c", HALFWAY, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"halfway\n"
        (half,) = tmp_path.iterdir()
        cache.publish(tmp_path / "other", [b"x"])
        assert half.exists(), "who made it still lived"
        process.send_signal(number)
    assert half.exists()
    cache.publish(path, [b"whole"])
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]
    assert path.read_bytes() == b"whole"


def test_a_file_system_without_locks_is_filled_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, _how: int) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    cache.publish(tmp_path / "file", [b"whole"])
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_folder_that_somebody_keeps_locked_is_filled_without_the_lock_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was waited for without a limit and without a word."""
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.2)
    holder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        thread = threading.Thread(target=cache.publish, args=(tmp_path / "file", [b"whole"]), daemon=True)
        thread.start()
        thread.join(SECONDS / 5)
        assert not thread.is_alive()
    finally:
        os.close(holder)
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_lock_that_comes_free_is_had(tmp_path: Path) -> None:
    holder, fd = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert not given_file.lock_in_time(fd, fcntl.LOCK_SH, 0.0)
        later = threading.Timer(0.1, fcntl.flock, (holder, fcntl.LOCK_UN))
        later.start()
        assert given_file.lock_in_time(fd, fcntl.LOCK_SH, SECONDS)
        later.join()
    finally:
        os.close(holder)
        os.close(fd)


def test_a_relative_cache_is_the_same_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HVKVM_CACHE", "cache")
    found = cache.root()
    assert found == here / "cache"
    here.rmdir()
    assert cache.root() == Path("cache"), "nothing there can be found, and that is no traceback"


def test_the_oldest_go_also_while_another_process_takes_them_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.state" for number in range(5)]
    for number, path in enumerate(paths):
        path.touch()
        os.utime(path, (number, number))
    (tmp_path / "other").touch()
    found = list(tmp_path.glob("*.state"))
    monkeypatch.setattr(Path, "glob", lambda *_: found)
    paths[1].unlink()
    cache.forget_oldest(tmp_path, "*.state", 3)
    assert sorted(os.listdir(tmp_path)) == ["2.state", "3.state", "4.state", "other"]
    cache.forget_oldest(tmp_path, "*.state", 3)
    assert len(os.listdir(tmp_path)) == 4


def test_a_file_has_its_bytes_on_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file", []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append((os.fstat(fd).st_size, path.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    cache.publish(path, [b"whole", b" file"])
    assert synced == [(10, False)]
