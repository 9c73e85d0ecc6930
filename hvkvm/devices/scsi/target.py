"""The units behind one controller, by target and LUN, and the answers for a LUN without a unit."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hvkvm.abi import scsi
from hvkvm.devices.scsi.command import Command, Rejected
from hvkvm.devices.scsi.inquiry import Identity
from hvkvm.devices.scsi.mode import ModePages
from hvkvm.devices.scsi.unit import Unit


class Bus:
    """Owner: the I/O loop."""

    def __init__(self, *, tells: bool = True) -> None:
        """`tells`: units tell their guest when others come or go; else the transport has a way of its own."""
        self._units: dict[tuple[int, int], Unit] = {}
        self._tells = tells

    def add(self, target: int, lun: int, unit: Unit) -> None:
        """Put `unit` there; the target's others tell their guest. ValueError if something is there."""
        if (target, lun) in self._units:
            raise ValueError(f"target {target} has a LUN {lun}")
        self._tell(target)
        self._units[target, lun] = unit
        unit.luns = lambda: self.luns(target)

    def remove(self, target: int, lun: int) -> Unit:
        """Take the unit away; KeyError if none is there."""
        unit = self._units.pop((target, lun))
        unit.luns = lambda: [0]
        self._tell(target)
        return unit

    def get(self, target: int, lun: int) -> Unit | None:
        """The unit there."""
        return self._units.get((target, lun))

    @property
    def units(self) -> Collection[Unit]:
        """All of them, in no order; while none is added or removed."""
        return self._units.values()

    def __iter__(self) -> Iterator[tuple[int, int, Unit]]:
        """Target, LUN and unit of each, in order. Any thread: dumps ask, while the loop adds and removes."""
        units = list(self._units.items())
        return iter(sorted(((*place, unit) for place, unit in units), key=lambda one: one[:2]))

    def luns(self, target: int) -> list[int]:
        """The LUNs of a target that has any."""
        return sorted(lun for at, lun in self._units if at == target)

    def execute_absent(self, target: int, lun: int, command: Command) -> None:
        """What is answered for a LUN that is not there (SPC-4 6.4.2): that it is not, and which ones are.

        INQUIRY must succeed, or Linux's hv_storvsc takes a buffer of zeros for a disk; REPORT LUNS is
        answered by LUN 0 of every target, with no LUN where there is none.
        """
        _Absent(self.luns(target) if lun == 0 else None).execute(command)

    def _tell(self, target: int) -> None:
        if not self._tells:
            return
        for (at, _lun), unit in self._units.items():
            if at == target:
                unit.attention(scsi.LUNS_CHANGED)


class _Absent(Unit):
    def __init__(self, luns: list[int] | None) -> None:
        super().__init__(scsi.NO_UNIT, Identity("", ""), ModePages({}, lambda: 0), removable=False)
        self._attentions.clear()
        self.luns = lambda: luns or []
        kept = [scsi.INQUIRY, scsi.REQUEST_SENSE] + ([] if luns is None else [scsi.REPORT_LUNS])
        self.handlers = {operation: self.handlers[operation] for operation in kept}

    def execute(self, command: Command) -> None:
        if command.cdb and command.cdb[0] not in self.handlers:
            command.fail(scsi.INVALID_LUN)
        else:
            super().execute(command)

    def check_ready(self) -> None:
        raise Rejected(scsi.INVALID_LUN)
