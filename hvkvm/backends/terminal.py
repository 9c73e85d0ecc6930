"""The host terminal in raw mode, and back, whatever ends the process.

Restored by the context manager, at interpreter exit, and on the signals that
would end the process without either (where nobody else handles them). Any
thread, signal handlers too; signals are taken over by the main thread only.
"""

from __future__ import annotations

import atexit
import os
import signal
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _ISPEED, _OSPEED, _CC = range(7)


def in_foreground(fd: int) -> bool:
    """Whether `fd` is a terminal this process may read from without being stopped (SIGTTIN)."""
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # A terminal, but not our controlling one: no job control there.
        return os.isatty(fd)


def raw_attributes(saved: list[Any]) -> list[Any]:
    """termios attributes for a guest's console: every key is data, Ctrl-c too.

    Output processing stays on, so that hvkvm's own lines end where they should;
    a guest's "\\r\\n" becomes "\\r\\r\\n", which looks the same.
    """
    raw = [*saved[:_CC], list(saved[_CC])]
    raw[_IFLAG] &= ~(
        termios.BRKINT
        | termios.ICRNL
        | termios.IGNBRK
        | termios.IGNCR
        | termios.INLCR
        | termios.INPCK
        | termios.ISTRIP
        | termios.IXON
        | termios.PARMRK
    )
    raw[_CFLAG] = raw[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
    raw[_CC][termios.VMIN] = 1
    raw[_CC][termios.VTIME] = 0
    return raw


class RawTerminal:
    """Raw mode of the terminal `fd` from `enter` to `restore`. Raises termios.error if it is none.

    Job control: SIGTSTP gives the terminal back before it stops the process.
    After SIGCONT it is raw again if the shell gave it to us; `on_continue()` is
    called then in any case, in the signal's handler.
    """

    def __init__(self, fd: int, *, on_continue: Callable[[], object] | None = None) -> None:
        self._fd = fd
        self._on_continue = on_continue
        self._pid = os.getpid()
        self._saved: list[Any] | None = None
        self._handled: list[signal.Signals] = []
        self._raw = False
        # Reentrant: a signal's handler may find the main thread in here.
        self._lock = threading.RLock()

    def enter(self) -> None:
        """Switch to raw mode; twice does nothing. Only in the foreground, else it stops the process."""
        with self._lock:
            if not self._raw:
                if self._saved is None:
                    self._saved = termios.tcgetattr(self._fd)
                    atexit.register(self.restore)
                self._raw = True  # before the switch: a signal between the two must find it
                self._switch(raw_attributes(self._saved))
        self.handle_signals()

    def handle_signals(self) -> None:
        """Take over the signals that end or stop the process, where nobody else has. Main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _ENDING_SIGNALS:
            self._handle(number, self._end)
        self._handle(signal.SIGTSTP, self._stop)
        self._handle(signal.SIGCONT, self._continue)

    def restore(self) -> None:
        """Put the terminal back. Any thread, signal handlers; never raises."""
        self._give_back()
        if threading.current_thread() is threading.main_thread():
            for number in self._handled:
                if signal.getsignal(number) in (self._end, self._stop, self._continue):
                    signal.signal(number, signal.SIG_DFL)
            self._handled.clear()

    def _give_back(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: what its parent made of the terminal is not its own to undo
        with self._lock:
            raw, self._raw = self._raw, False
            saved, self._saved = self._saved, None
            if saved is None:
                return
            if raw and in_foreground(self._fd):  # else it is somebody else's by now
                self._switch(saved)
        atexit.unregister(self.restore)

    def _switch(self, attributes: list[Any]) -> None:
        # Not TCSADRAIN: output that the user has stopped with Ctrl-s would hold us up.
        with suppress(termios.error, OSError):  # the terminal may be gone
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        if number not in self._handled and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, handler)
            self._handled.append(number)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Restore, then let the signal do what it would have done."""
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Give the terminal back, then stop. Where no shell would continue us the kernel ignores it."""
        raw = self._raw
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # we stop here
        signal.signal(number, self._stop)
        if raw:
            self._take_again()

    def _continue(self, number: int, frame: FrameType | None) -> None:
        """After a stop the shell has put its own modes back: be raw again, if still in the foreground."""
        if self._raw:
            self._take_again()
        if self._on_continue is not None:
            self._on_continue()

    def _take_again(self) -> None:
        """What was saved before a SIGSTOP stays the truth: that left no time to give the terminal back."""
        with self._lock:
            self._raw = False
            if in_foreground(self._fd):
                with suppress(termios.error, OSError):
                    self.enter()

    def __enter__(self) -> RawTerminal:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
