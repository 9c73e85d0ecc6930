"""The host terminal in raw mode, and back, whatever ends the process.

Restored by the context manager, at interpreter exit, and on the signals that
would end the process without either (where nobody else handles them). Owner:
the main thread; `restore` may be called from anywhere, a signal handler too: it
takes no lock and does nothing the second time.
"""

from __future__ import annotations

import atexit
import os
import signal
import termios
import threading
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
    """Raw mode of the terminal `fd` from `enter` to `restore`. Raises termios.error if it is none."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None
        self._handled: list[signal.Signals] = []

    def enter(self) -> None:
        """Switch to raw mode; twice does nothing."""
        if self._saved is not None:
            return
        saved = termios.tcgetattr(self._fd)
        atexit.register(self.restore)
        self._saved = saved  # before the switch: a signal between the two must find it
        termios.tcsetattr(self._fd, termios.TCSADRAIN, raw_attributes(saved))
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING_SIGNALS:
                self._handle(number, self._end)
            self._handle(signal.SIGCONT, self._continue)

    def restore(self) -> None:
        """Put the terminal back. Any thread, signal handlers; never raises."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        with suppress(termios.error, OSError):  # the terminal may be gone
            termios.tcsetattr(self._fd, termios.TCSANOW, saved)
        atexit.unregister(self.restore)
        if threading.current_thread() is threading.main_thread():
            for number in self._handled:
                if signal.getsignal(number) in (self._end, self._continue):
                    signal.signal(number, signal.SIG_DFL)
            self._handled.clear()

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, handler)
            self._handled.append(number)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Restore, then let the signal do what it would have done."""
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _continue(self, number: int, frame: FrameType | None) -> None:
        """After a stop the shell has put its own modes back: be raw again, if still in the foreground."""
        saved = self._saved
        if saved is not None and in_foreground(self._fd):
            with suppress(termios.error, OSError):
                termios.tcsetattr(self._fd, termios.TCSANOW, raw_attributes(saved))

    def __enter__(self) -> RawTerminal:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
