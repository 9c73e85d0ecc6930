"""`cli.signals`: a signal ends the wait whenever it comes, on any thread. And Ctrl-C before there is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from hvkvm.cli.signals import Signals
from hvkvm.kvm.irqfd import EventFd

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)
FAR = 60.0
"""Seconds: nobody waits that long unless a signal is lost."""


def soon(signals: Signals, fd: EventFd) -> int | None:
    """What a wait says that must end by a signal: one that its time limit ended has slept through it."""
    begun = monotonic()
    number = signals.wait(fd.fd, FAR)
    assert monotonic() - begun < FAR, "the signal had come, and nothing woke the wait"
    return number


@pytest.fixture
def never() -> Iterator[EventFd]:
    """An fd that does not become readable."""
    with EventFd() as fd:
        yield fd


@pytest.fixture
def other() -> Iterator[threading.Thread]:
    """A thread that takes signals, as one does that has not come to block them."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield thread
    end.set()
    thread.join()


def test_one_that_another_thread_got_ends_the_wait(never: EventFd, other: threading.Thread) -> None:
    """The main thread sleeps in poll, which nothing interrupts: only what the fd says wakes it."""
    assert other.ident is not None
    with Signals(NUMBERS) as signals:
        later = threading.Timer(0.2, signal.pthread_kill, (other.ident, signal.SIGUSR1))
        later.start()
        assert soon(signals, never) == signal.SIGUSR1
        later.join()


def test_none_is_lost_whenever_it_comes(never: EventFd) -> None:
    """Also one that comes after the interpreter's last look for signals and before poll sleeps."""
    rounds = 3000
    turn = threading.Semaphore(0)

    def send() -> None:
        for _ in range(rounds):
            turn.acquire()
            os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send)
    with Signals(NUMBERS) as signals:
        sender.start()
        for _ in range(rounds):
            turn.release()
            assert soon(signals, never) == signal.SIGUSR1
        sender.join()


def test_they_come_in_order_and_the_rest_of_them_later(never: EventFd) -> None:
    with Signals(NUMBERS) as signals:
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert [soon(signals, never) for _ in range(3)] == [
            signal.SIGUSR2,
            signal.SIGUSR1,
            signal.SIGUSR2,
        ]
        assert signals.wait(never.fd, 0.01) is None


def test_a_readable_fd_and_a_time_limit_end_it_and_others_signals_do_not(never: EventFd) -> None:
    before = signal.signal(signal.SIGWINCH, lambda *_: None)
    try:
        with Signals(NUMBERS) as signals:
            os.kill(os.getpid(), signal.SIGWINCH)
            assert signals.wait(never.fd, 0.01) is None
            os.kill(os.getpid(), signal.SIGWINCH)
            never.signal()
            assert signals.wait(never.fd, FAR) is None
    finally:
        signal.signal(signal.SIGWINCH, before)


def test_everything_is_given_back(never: EventFd) -> None:
    mine = signal.signal(signal.SIGUSR1, lambda *_: None)
    handler = signal.getsignal(signal.SIGUSR1)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writer)
    try:
        with Signals(NUMBERS) as signals:
            assert signal.getsignal(signal.SIGUSR1) is not handler
        signals.close()
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert signal.set_wakeup_fd(writer) == writer
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, mine)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("module", ["hvkvm.cli.output", "hvkvm.errors", "hvkvm.cli.doctor"])
def test_ctrl_c_while_the_command_is_being_loaded_ends_it_without_a_word(module: str) -> None:
    code = f"""
import sys
class Interrupted:
    def find_spec(self, name, *_more):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from hvkvm.cli import main
sys.exit(main(["doctor", "--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
