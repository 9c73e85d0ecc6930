"""What a device's callback raises ends that device, not the machine.

Why: a device is reached by guest bytes, by host programs and by a test's own code. A
mistake in one of them must cost its channel and nothing else, under a name. So whatever
runs for a device runs here: calls of the bus by `host.VmbusHost`, and what a device
defers (timers, sockets) by the `Guard` that it owns.

Owner: the I/O loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

MAX_TEXT = 200
"""Longest reason; an exception's text may hold a guest's bytes."""

OnFault = Callable[[Exception], object]


class Guard:
    """Runs the deferred callbacks of one device. Before `attach`, what they raise goes on up."""

    __slots__ = ("_failed", "_on_fault")

    def __init__(self) -> None:
        self._on_fault: OnFault | None = None
        self._failed = False

    def attach(self, on_fault: OnFault) -> None:
        """Give the first error to `on_fault(error)`, which ends the device; afterwards nothing is run."""
        self._on_fault = on_fault
        self._failed = False

    def run(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn(*args)`."""
        if self._failed:
            return
        try:
            fn(*args)
        except Exception as error:
            if self._on_fault is None:
                raise
            self._failed = True
            self._on_fault(error)


def call_all(calls: Iterable[Callable[[], object]]) -> None:
    """Make every call, though some raise; then raise what the first of those raised.

    For those who wait for an answer: one that raises must not keep it from the others.
    """
    first: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


@runtime_checkable
class Guarded(Protocol):
    """A device that defers work, and has it run by a guard."""

    @property
    def guard(self) -> Guard: ...


def fault_text(error: BaseException) -> str:
    """What was raised, and where: one line for people."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_TEXT]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return text
    return f"{text} ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
