"""Ports by which a guest ends its machine with a status.

`DebugExit` is isa-debug-exit, which kvm-unit-tests use; `GuestExit` takes the
exit status of the command that `hvkvm run -- command` started in the guest.
Both report the first write only: what a guest says after it said goodbye does
not count. The callback runs on the writing vCPU's thread and must not wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.board import DEBUG_EXIT_PORT, DEBUG_EXIT_SIZE, GUEST_EXIT_PORT, GUEST_EXIT_SIZE

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus


def debug_exit_status(value: int) -> int:
    """The process exit status that isa-debug-exit gives to a written `value`: always odd, 0 to 255."""
    return (value << 1 | 1) & 0xFF


class _OncePort:
    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit
        self._first = threading.Lock()

    def read(self, offset: int, size: int) -> int:
        """Nothing to read: 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Report `value`, if it is the first."""
        if self._first.acquire(blocking=False):  # stays locked for good
            self._on_exit(value)


class DebugExit(_OncePort):
    """isa-debug-exit: `on_exit` gets the written value; see `debug_exit_status`."""

    def attach(self, bus: PortBus, port: int = DEBUG_EXIT_PORT) -> None:
        """Claim the port; ConfigError when taken."""
        bus.add(port, DEBUG_EXIT_SIZE, self)


class GuestExit(_OncePort):
    """One byte: `on_exit` gets the guest command's exit status, 0 to 255."""

    def attach(self, bus: PortBus, port: int = GUEST_EXIT_PORT) -> None:
        """Claim the port; ConfigError when taken."""
        bus.add(port, GUEST_EXIT_SIZE, self, width=1)
