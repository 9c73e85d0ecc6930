"""One call that a thread asks of another and waits for.

Why not a Future: a wait that times out must be able to withdraw the call, so
that it cannot run later behind the back of a caller who has given up.

`VcpuThread.call` is the user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from hvkvm.errors import Stopped

T = TypeVar("T")


class Call(Generic[T]):
    """`fn(*args)` on its way to another thread. It is run, cancelled or withdrawn: one of them, once."""

    def __init__(self, fn: Callable[..., T], args: tuple[Any, ...]) -> None:
        self._fn = fn
        self._args = args
        self._lock = threading.Lock()
        self._fate = ""
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    def _becomes(self, fate: str) -> bool:
        """Whether this is what becomes of it; False if something else does already."""
        with self._lock:
            if self._fate:
                return False
            self._fate = fate
            return True

    def run(self) -> None:
        """Do it, unless withdrawn; what it raises goes to the waiter. The thread asked."""
        if not self._becomes("run"):
            return
        try:
            self._result.append(self._fn(*self._args))
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def cancel(self) -> None:
        """It will not run: the thread asked has ended."""
        if self._becomes("cancelled"):
            self._error = Stopped(f"{getattr(self._fn, '__qualname__', self._fn)} was cancelled")
            self._done.set()

    def wait(self, timeout: float | None) -> T:
        """The result, or what it raised; Stopped when cancelled. The thread that asks.

        TimeoutError after `timeout` seconds: the call is withdrawn and never
        runs, unless the error says that it is running already.
        """
        if not self._done.wait(timeout):
            if self._becomes("withdrawn"):
                raise TimeoutError("the call was not begun in time, and is withdrawn")
            if self._fate == "cancelled":
                self._done.wait()  # a moment: nothing is run for it
            elif not self._done.is_set():
                raise TimeoutError("the call was begun but has not ended in time")
        if self._error is not None:
            raise self._error
        return self._result[0]
