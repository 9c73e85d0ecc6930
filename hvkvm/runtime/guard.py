"""What a device's callback raises ends that device, not the machine.

Why: a device is reached by guest bytes and by host programs. A mistake in it must cost
that device and nothing else, under a name. So whatever runs for a device runs here:
calls of its bus (`vmbus.host`, `devices.pci.bus`), and what it defers (turns, timers,
sockets) by the `Guard` that it owns. A mistake of the caller's, such as an assertion of a
test that plays a device, is the caller's to hear: `is_callers` tells it.

The I/O loop; a device on PCI is called by vCPU threads too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

MAX_TEXT = 200
"""Longest reason; an exception's text may hold a guest's bytes."""

OnFault = Callable[[Exception], object]


class Guard:
    """Runs the code of one device. Before `attach`, what it raises goes on up."""

    __slots__ = ("_on_fault", "failed")

    def __init__(self) -> None:
        self._on_fault: OnFault | None = None
        self.failed = False
        """Whether something raised: nothing is run any more."""

    def attach(self, on_fault: OnFault) -> None:
        """Give errors to `on_fault(error)`, which ends the device.

        It is called once where one thread runs all of the device, else perhaps once for each thread.
        """
        self._on_fault = on_fault
        self.failed = False

    def run(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn(*args)`."""
        if self.failed:
            return
        try:
            fn(*args)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the device, whose code has raised `error` elsewhere than in `run`."""
        if self._on_fault is None:
            raise error
        self.failed = True
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
    """A device whose work is run by a guard."""

    @property
    def guard(self) -> Guard: ...


def is_callers(error: BaseException) -> bool:
    """Whether code that is not hvkvm's, such as a caller's callback, was at work when `error` was raised."""
    trace = error.__traceback__
    while trace is not None:
        if is_callers_module(trace.tb_frame.f_globals.get("__name__")):
            return True
        trace = trace.tb_next
    return False


def is_callers_module(name: object) -> bool:
    """Whether a module of this name is neither hvkvm's nor Python's own."""
    top = str(name).partition(".")[0]
    return top != "hvkvm" and top not in sys.stdlib_module_names


def fault_text(error: BaseException) -> str:
    """What was raised, and where: one line for people."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_TEXT]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return text
    return f"{text} ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
