"""Ioeventfds for the doorbells of submission queues whose driver keeps their values in memory.

Without that KVM would keep the value that the guest writes, and nobody would learn it. Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from hvkvm.abi import nvme
from hvkvm.devices.pci.bell import BellMaker, Closable
from hvkvm.runtime.guard import call_all


class Bells:
    """By queue. `base` is where the BAR is, as far as they know."""

    def __init__(self, make: BellMaker | None, rang: Callable[[], object]) -> None:
        self._make = make
        self._rang = rang
        self._bells: dict[int, Closable] = {}
        self.base: int | None = None

    def __len__(self) -> int:
        return len(self._bells)

    def add(self, qid: int) -> None:
        """One for this queue, if it has none and there can be one."""
        if self._make is not None and self.base is not None and qid not in self._bells:
            gpa = self.base + nvme.NVME_REG_DBS + 8 * qid
            with suppress(OSError):  # without one, each ring is an exit
                self._bells[qid] = self._make(gpa, 4, self._rang)

    def drop(self, qid: int) -> None:
        """Of a queue that goes."""
        bell = self._bells.pop(qid, None)
        if bell is not None:
            bell.close()

    def drop_all(self) -> None:
        """Of all queues."""
        call_all([partial(self.drop, qid) for qid in list(self._bells)])

    def move(self, base: int | None, queues: Iterable[int]) -> None:
        """The BAR is elsewhere: ring there, for these queues."""
        self.drop_all()
        self.base = base
        for qid in queues:
            self.add(qid)
