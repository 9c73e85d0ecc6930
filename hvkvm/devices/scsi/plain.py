"""What a disk does at once for plain reads and writes, without a command's ceremony."""

from __future__ import annotations

from hvkvm.block.now import Way
from hvkvm.tuples import NamedTuple


class Plain(NamedTuple):
    """Valid for the turn in which it was asked for: nothing stands between a command and the disk."""

    sector: int
    """Bytes."""
    sectors: int
    """How many the disk has."""
    reads: Way
    writes: Way | None
    """None if it may not be written."""
