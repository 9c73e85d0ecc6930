"""Which file system on a machine's disks its root is: the only one that can be.

A candidate is a file system on a whole disk, or on a partition whose GPT type does not say that it is
something else. One on a partition of the type "root" comes before all others. Reads block; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from hvkvm.abi import on_disk
from hvkvm.block.file_systems import FileSystem, identify
from hvkvm.block.image import Image
from hvkvm.block.partitions import partitions
from hvkvm.tuples import NamedTuple


class Candidate(NamedTuple):
    """A file system that may be the root. `partition` 0: the whole disk `disk`, as its user named it."""

    disk: str
    partition: int
    system: FileSystem
    typed: bool
    """Its partition says that it is a root."""

    def __str__(self) -> str:
        where = f"partition {self.partition} of {self.disk}" if self.partition else self.disk
        label = f' "{self.system.label}"' if self.system.label else ""
        return f"{self.system.kind}{label} on {where}"


def candidates(name: str, image: Image) -> list[Candidate]:
    """Those on the disk `name`. OSError, ImageError."""
    # A file system on the whole disk may begin like an MBR, and overwrites none of a GPT.
    table = partitions(image)
    if table is None:
        system = identify(image, 0, image.size)
        return [] if system is None else [Candidate(name, 0, system, False)]
    found = []
    for part in table:
        if part.type not in on_disk.GPT_NO_ROOT:
            system = identify(image, part.offset, part.length)
            if system is not None:
                found.append(Candidate(name, part.number, system, part.type == on_disk.GPT_ROOT_X86_64))
    return found


def likely(found: Iterable[Candidate]) -> list[Candidate]:
    """Those of `found` among which the choice is; none, one, or several between which nobody can choose.

    The devices of one Btrfs are one.
    """
    everything = list(found)
    best = [one for one in everything if one.typed] or everything
    pools = set()
    chosen = []
    for one in best:
        if one.system.kind == "btrfs":
            if one.system.uuid in pools:
                continue
            pools.add(one.system.uuid)
        chosen.append(one)
    return chosen
