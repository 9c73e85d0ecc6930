"""The kick signal: it interrupts, it restarts nothing, it runs nothing, and nobody dies of it."""

from __future__ import annotations

import ctypes
import errno
import signal
import threading
from types import SimpleNamespace

import pytest

from hvkvm.runtime import kick
from hvkvm.runtime.kick import KICK_SIGNAL, Kicker


def test_interrupts_a_system_call_without_restarting_it() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    kicker, run = Kicker(), SimpleNamespace(immediate_exit=0)
    bound = threading.Event()
    results: list[tuple[int, int]] = []

    def wait() -> None:
        kicker.bind(run)  # type: ignore[arg-type]
        bound.set()
        # read(2) on an empty pipe would be restarted under SA_RESTART.
        results.append((libc.read(reader, ctypes.create_string_buffer(1), 1), ctypes.get_errno()))

    import os

    reader, writer = os.pipe()
    thread = threading.Thread(target=wait)
    thread.start()
    assert bound.wait(100)
    while thread.is_alive():  # the first may come before read() begins
        kicker.kick()
        thread.join(0.01)
    os.close(reader)
    os.close(writer)
    assert results == [(-1, errno.EINTR)]
    assert run.immediate_exit == 1


def test_runs_nothing_on_the_main_thread_either() -> None:
    """A Python handler would be called on the main thread; there is none, and no wakeup byte is written."""
    import os

    reader, writer = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        kicker, run = Kicker(), SimpleNamespace(immediate_exit=0)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            kicker.bind(run)  # type: ignore[arg-type]
            for _ in range(100):
                kicker.kick()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def test_before_bind_and_after_unbind_a_kick_does_nothing() -> None:
    kicker, run = Kicker(), SimpleNamespace(immediate_exit=0)
    kicker.kick()
    thread = threading.Thread(target=lambda: (kicker.bind(run), kicker.unbind()))  # type: ignore[arg-type, func-returns-value]
    thread.start()
    thread.join()
    kicker.kick()
    assert run.immediate_exit == 0


def test_kicking_a_thread_that_has_ended_is_harmless() -> None:
    kicker, run = Kicker(), SimpleNamespace(immediate_exit=0)
    thread = threading.Thread(target=lambda: kicker.bind(run))  # type: ignore[arg-type]
    thread.start()
    thread.join()
    for _ in range(100):
        kicker.kick()


def test_a_full_signal_queue_delays_a_kick_and_does_not_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EAGAIN, errno.EAGAIN, 0]
    sent: list[int] = []

    def tgkill(_number: int, _pid: int, _tid: int, sig: int) -> int:
        answer = answers.pop(0)
        ctypes.set_errno(answer)
        sent.append(sig)
        return -1 if answer else 0

    kicker = Kicker()
    kicker._run = SimpleNamespace(immediate_exit=0)  # type: ignore[assignment]
    monkeypatch.setattr(kick, "_syscall", tgkill)
    kicker.kick()
    assert sent == [KICK_SIGNAL] * 3


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def tgkill(*_args: int) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    kicker = Kicker()
    kicker._run = SimpleNamespace(immediate_exit=0)  # type: ignore[assignment]
    monkeypatch.setattr(kick, "_syscall", tgkill)
    with pytest.raises(OSError, match="kick"):
        kicker.kick()
