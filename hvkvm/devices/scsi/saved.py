"""The state of a logical unit of any kind, as a saved machine has it.

Owner: the I/O loop.
"""

from __future__ import annotations

from hvkvm.devices.scsi.disk import ScsiDiskState
from hvkvm.devices.scsi.dvd import DvdState
from hvkvm.devices.scsi.unit import Unit
from hvkvm.errors import StateError
from hvkvm.tuples import NamedTuple


class UnitState(NamedTuple):
    """The state of one unit, under its kind; exactly one is given."""

    disk: ScsiDiskState | None
    dvd: DvdState | None


def save_unit(unit: Unit) -> UnitState:
    """Only while nothing of it is in flight."""
    state = unit.save()
    return UnitState(
        state if isinstance(state, ScsiDiskState) else None, state if isinstance(state, DvdState) else None
    )


def load_unit(unit: Unit, state: UnitState) -> None:
    """Put it back. StateError for a state of another kind, or of none that this unit can have."""
    given = [one for one in state if one is not None]
    if len(given) != 1 or not isinstance(given[0], unit.State):
        raise StateError(f"{unit.identity.serial}: the saved machine had something else in its place")
    unit.load(given[0])
