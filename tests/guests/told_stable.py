"""What a guest wrote and what it was told is stable: so, what each sector may hold after a crash.

Moments are numbers of steps of a log of what was done to the image's file (`crash_log`, `flush_log`).
"""

from __future__ import annotations

from typing import NamedTuple


class Version(NamedTuple):
    """What a sector was to hold from a write on; `maybe` if the write may also have left it as it was."""

    began: int
    data: bytes
    maybe: bool = False


class Told:
    """For each sector the versions that it may have, and when some were told to be stable."""

    def __init__(self) -> None:
        self.written: dict[int, list[Version]] = {}
        """By sector: in the order of the writes, of which no two at one sector are in flight at once."""
        self.stable: list[tuple[int, dict[int, int]]] = []
        """After so many steps, so many versions of each sector were written and flushed."""

    def begin(self, step: int, sector: int, data: bytes, *, maybe: bool = False) -> None:
        """A write is begun when the log has `step` steps; `maybe` if it is a hint only."""
        self.written.setdefault(sector, []).append(Version(step, data, maybe))

    def flushed(self, step: int, versions: dict[int, int]) -> None:
        """With `step` steps in the log, so many versions of each sector were told to be stable."""
        self.stable.append((step, versions))

    def versions(self) -> dict[int, int]:
        """How many writes of each sector were begun."""
        return {sector: len(versions) for sector, versions in self.written.items()}

    def stable_at(self, step: int) -> dict[int, int]:
        """How many versions of each sector had been told to be stable then."""
        found: dict[int, int] = {}
        for when, versions in self.stable:
            if when <= step:
                for sector, n in versions.items():
                    found[sector] = max(found.get(sector, 0), n)
        return found

    def allowed(self, step: int, sector: int, first: bytes, flushed: int) -> set[bytes]:
        """What `sector`, once `first`, may hold after a crash then; `flushed` is its `stable_at`."""
        versions = [Version(-1, first), *(one for one in self.written[sector] if one.began < step)]
        while versions[flushed].maybe:
            flushed -= 1
        return {one.data for one in versions[flushed:]}
