"""Holds the machine's disks: makes `Disks`, and imports all that needs, when the first disk is wanted.

A machine that boots without a disk may get one while it runs. Owner: the I/O loop; whoever makes the machine
before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm.errors import ConfigError

if TYPE_CHECKING:
    from hvkvm.machine.attached import Attached, Spec
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.disks import Disks
    from hvkvm.machine.pci import Pci
    from hvkvm.machine.pci_disks import PciDisks
    from hvkvm.machine.platform import Platform
    from hvkvm.state.file import Saved
    from hvkvm.state.manifest import SavedDisk


class DiskShelf:
    """Of a machine with a VMBus or PCI. ConfigError for disks that cannot be had."""

    def __init__(
        self,
        platform: Platform,
        bus: Bus | None,
        pci: Pci | None,
        stack: ExitStack,
        saved: Saved | None = None,
    ) -> None:
        self._platform = platform
        self._bus = bus
        self._stack = stack.enter_context(ExitStack())
        self._saved = () if saved is None else saved.manifest.config.disks
        self.disks: Disks | None = None
        """The disks on the VMBus; None while there has been none."""
        self.pci_disks: PciDisks | None = None
        """Those on PCI, where none comes or goes while the machine runs."""
        config = platform.config
        buses = {config.bus_of(one) for one in config.media}
        if bus is not None and "vmbus" in buses:
            self.make()
        if bus is not None and saved is not None:
            # A controller whose disks have all gone stays with its guest, and no disk asks for it.
            for index in _controllers(saved):
                self.make().controller(index)
        if pci is not None and buses - {"vmbus"}:
            from hvkvm.machine.pci_disks import PciDisks

            self.pci_disks = PciDisks(
                platform, pci, self._stack, [one for one in self._saved if one.bus != "vmbus"]
            )

    @property
    def _all(self) -> list[Disks]:
        return [one for one in (self.disks, self.pci_disks) if one is not None]

    def make(self) -> Disks:
        """The disks on the VMBus, made if there has been none. ConfigError without a VMBus."""
        if self._bus is None:
            raise ConfigError("this VM has no VMBus for disks; start it with --vmbus on")
        if self.disks is None:
            from hvkvm.machine.disks import Disks

            saved = [one for one in self._saved if one.bus == "vmbus"]
            self.disks = Disks(self._platform, self._bus, self._stack, saved)
        return self.disks

    @property
    def attached(self) -> dict[str, Attached]:
        """All disks and drives by name: those on the VMBus first."""
        return {name: one for disks in self._all for name, one in disks.attached.items()}

    @property
    def specs(self) -> list[Spec]:
        """What each of them was asked for by, with the image that it has now."""
        return [one.spec._replace(file=one.file) for one in self.attached.values()]

    def inspect(self) -> dict[str, object]:
        """As `Disks.inspect`, of all."""
        return {name: found for disks in self._all for name, found in disks.inspect().items()}

    def why_not_saved(self) -> str:
        """As `Disks.why_not_saved`."""
        return next((why for one in self._all if (why := one.why_not_saved())), "")

    def flush(self, done: Callable[[str], object]) -> None:
        """As `Disks.flush`."""
        left = self._all

        def flush_next(why: str) -> None:
            if why or not left:
                done(why)
            else:
                left.pop().flush(flush_next)

        flush_next("")

    def saved(self) -> tuple[SavedDisk, ...]:
        """As `Disks.saved`."""
        return tuple(disk for one in self._all for disk in one.saved())

    def check(self, saved: Sequence[SavedDisk]) -> None:
        """As `Disks.check`."""
        if self.disks is not None:
            self.disks.check([disk for disk in saved if disk.bus == "vmbus"])
        if self.pci_disks is not None:
            self.pci_disks.check([disk for disk in saved if disk.bus != "vmbus"])

    def end(self, done: Callable[[], object]) -> None:
        """As `Disks.end`."""
        left = self._all

        def end_next() -> None:
            if left:
                left.pop().end(end_next)
            else:
                done()

        end_next()


def _controllers(saved: Saved) -> list[int]:
    """Those of a saved machine by its bus's word, of which loading it believes no more."""
    bus = saved.parts.get("VMBus")
    names = bus.get("devices") if isinstance(bus, dict) else None
    if not isinstance(names, dict):
        return []
    from hvkvm.machine.disk_spec import MAX_CONTROLLERS

    return [index for index in range(MAX_CONTROLLERS) if f"scsi{index}" in names]
