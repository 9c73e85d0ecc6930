"""An ioeventfd for each enabled queue of a virtio device, where its BAR is. Owner: the I/O loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hvkvm.devices.pci.bell import BellMaker, Closable
from hvkvm.devices.pci.virtio import function as places
from hvkvm.runtime.guard import call_all


class Bells:
    """By queue. Without `make` there are none, and each notification is an exit."""

    def __init__(self, make: BellMaker | None, rang: Callable[[], object]) -> None:
        self._make = make
        self._rang = rang
        self._bells: dict[int, Closable] = {}
        self._base: int | None = None

    def __len__(self) -> int:
        return len(self._bells)

    def keep(self, base: int | None, queues: set[int]) -> None:
        """Have those of these queues and no others; the BAR is at `base`, or nowhere."""
        if base != self._base:
            self.drop()
            self._base = base
        if base is None or self._make is None:
            return
        for index in set(self._bells) - queues:
            self._bells.pop(index).close()
        for index in queues - set(self._bells):
            with suppress(OSError):  # without one, each notification is an exit
                at = base + places.NOTIFY + places.NOTIFY_MULTIPLIER * index
                self._bells[index] = self._make(at, 2, self._rang)

    def drop(self) -> None:
        """None is there, and the BAR is nowhere."""
        bells, self._bells, self._base = self._bells, {}, None
        call_all([bell.close for bell in bells.values()])
