"""Disks for guests whose VMM is killed: new ones of each kind, and what they must hold from kill to kill."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from random import Random

from stable_writes import BLOCK, DISK_BYTES, SECTOR, Known, stamp

from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx

MIB = 1 << 20
KINDS = ("raw", "dynamic", "differencing")
PARENT = 1
"""The generation of what the parent of the last kind holds: no seed makes it."""


class KilledDisks:
    """One disk of each of `kinds` in `folder`."""

    def __init__(self, folder: Path, kinds: tuple[str, ...] = KINDS) -> None:
        self._fresh, self._used = folder / "fresh", folder / "used"
        parent = folder / "parent.vhdx"
        self._held = {kind: new_parent(parent) if kind == "differencing" else {} for kind in kinds}
        names = {kind: "disk.raw" if kind == "raw" else f"{kind}.vhdx" for kind in kinds}
        self._fresh.mkdir()
        for kind, name in names.items():
            new_disk(kind, self._fresh / name, parent)
        self.files = {kind: self._used / name for kind, name in names.items()}
        self.renew()

    def renew(self) -> None:
        """Begin with new ones."""
        shutil.rmtree(self._used, ignore_errors=True)
        subprocess.run(["cp", "-r", "--sparse=always", self._fresh, self._used], check=True)
        self._known = {kind: Known(held) for kind, held in self._held.items()}

    def check(self, kind: str, seed: int, stable: int, chance: Random) -> None:
        """AssertionError unless all is there of what a guest with `seed` was told is stable.

        The file is often only read: then the log of a VHDX is still there for the next VMM.
        """
        known = self._known[kind]
        known.wrote(seed, stable)
        image = open_image(str(self.files[kind]), ImageOptions(read_only=chance.random() < 0.7))
        faults = known.faults(image)
        image.close()
        assert not faults, f"{kind}, seed {seed}: not all of {stable} batches is there: {faults[:9]}"


def new_parent(path: Path) -> dict[int, int]:
    """What the third disk stands on, and what of it is not zero."""
    starts = range(0, DISK_BYTES // BLOCK, 8 * MIB // BLOCK)
    held = {start + block: PARENT for start in starts for block in range(9)}
    create_vhdx(path, VhdxOptions(DISK_BYTES, block_size=MIB))
    image = open_image(str(path), ImageOptions())
    for block, generation in held.items():
        image.writev(block * BLOCK, [memoryview(stamp(block, generation) * (BLOCK // SECTOR))])
    image.close()
    return held


def new_disk(kind: str, path: Path, parent: Path) -> None:
    """An empty one."""
    if kind == "raw":
        with path.open("wb") as file:
            file.truncate(DISK_BYTES)
    elif kind == "dynamic":
        create_vhdx(path, VhdxOptions(DISK_BYTES, block_size=MIB))
    else:
        create_vhdx(path, VhdxOptions(DISK_BYTES, block_size=MIB, parent=parent))
