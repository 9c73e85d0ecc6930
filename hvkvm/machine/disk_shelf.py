"""Where the machine's disks are, or would be: `Disks` and all it imports, made when the first disk is wanted.

A machine that boots without a disk may get one while it runs. Owner: the I/O loop; whoever makes the machine
before that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.disks import Disks
    from hvkvm.machine.platform import Platform


class DiskShelf:
    """Of a machine with a bus. ConfigError for disks that cannot be had."""

    def __init__(self, platform: Platform, bus: Bus, stack: ExitStack) -> None:
        self._platform = platform
        self._bus = bus
        self._stack = stack.enter_context(ExitStack())
        self.disks: Disks | None = None
        """The disks; None while there has been none."""
        if platform.config.disks or platform.config.cdroms:
            self.make()

    def make(self) -> Disks:
        """The disks, made if there has been none."""
        if self.disks is None:
            from hvkvm.machine.disks import Disks

            self.disks = Disks(self._platform, self._bus, self._stack)
        return self.disks

    def end(self, done: Callable[[], object]) -> None:
        """As `Disks.end`."""
        if self.disks is None:
            done()
        else:
            self.disks.end(done)
