"""Commands that no sane guest sends: one reply to each, memory and disk kept to, and the unit lives on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scsi_asker import Scsi

from hvkvm.abi import scsi
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.scsi.dvd import DvdDrive
from hvkvm.devices.scsi.unit import Unit

COMMANDS = int(os.environ.get("HVKVM_SCSI_COMMANDS", "3000"))
SEED = os.environ.get("HVKVM_SCSI_SEED", "")
SIZE = 1 << 20
MOST = 256 * 512
"""Bytes of a command's buffers."""
MARGIN = 512
UNTOUCHED = b"\xa5" * (MOST + 2 * MARGIN)
T = TypeVar("T")
WRITES = frozenset((0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x41, 0x93, 0x42))


def units(ask: Scsi, tmp_path: Path) -> list[tuple[Unit, Path]]:
    found: list[tuple[Unit, Path]] = []
    for number, sector in enumerate((512, 4096, 2048)):
        path = tmp_path / f"disk{number}"
        path.write_bytes(Random(number).randbytes(SIZE))
        disk = ask.disk(path, sector_size=sector, read_only=sector == 2048)
        found.append((DvdDrive(disk, "d") if sector == 2048 else ScsiDisk(disk, f"s{number}"), path))
    return found


class Memory:
    """Buffers in the midst of memory that must stay; made once, since that is dear."""

    def __init__(self) -> None:
        self._map = mmap(-1, MOST + 2 * MARGIN)
        self._view = memoryview(self._map)
        self._view[:] = UNTOUCHED[: len(self._view)]

    def buffers(self, n: int, cuts: list[int]) -> list[memoryview]:
        """`n` bytes cut at `cuts`."""
        inside, buffers, at = self._view[MARGIN : MARGIN + n], [], 0
        for cut in [*sorted(min(cut, n) for cut in cuts), n]:
            buffers.append(inside[at:cut])
            at = cut
        return buffers

    def check(self, n: int, reply: Reply) -> None:
        """Nothing else than what the reply says was touched; then all is as before."""
        # An mmap's slices are bytes, which are compared at once; memoryviews are byte for byte.
        end = MARGIN + n
        kept = MARGIN + (reply.transferred if reply.status == scsi.GOOD else n)
        assert self._map[:MARGIN] == UNTOUCHED[:MARGIN]
        assert self._map[kept : end + MARGIN] == UNTOUCHED[kept : end + MARGIN]
        self._view[MARGIN:kept] = UNTOUCHED[MARGIN:kept]


def shoot(ask: Scsi, unit: Unit, cdb: bytes, memory: Memory, n: int, cuts: list[int]) -> Reply:
    """Execute with `n` bytes of buffers, cut at `cuts`."""
    replies: list[Reply] = []
    unit.execute(Command(cdb, memory.buffers(n, cuts), replies.append))
    ask.loop.run()
    assert len(replies) == 1, cdb.hex()
    reply = replies[0]
    assert 0 <= reply.transferred <= n
    memory.check(n, reply)
    return reply


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_get_one_reply(tmp_path: Path, data: st.DataObject) -> None:
    ask, memory = Scsi(), Memory()
    try:
        found = units(ask, tmp_path)
        for _ in range(8):
            unit, path = data.draw(st.sampled_from(found))
            operation = data.draw(st.one_of(st.sampled_from(sorted(unit.handlers)), st.integers(0, 255)))
            rest = data.draw(st.binary(max_size=15))
            n = data.draw(st.sampled_from((0, 1, 7, 512, 4096, 20000)))
            cuts = data.draw(st.lists(st.integers(0, n), max_size=4))
            shoot(ask, unit, bytes((operation,)) + rest, memory, n, cuts)
            assert path.stat().st_size == SIZE
    finally:
        ask.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_commands(ask: Scsi, tmp_path: Path, seed: int) -> None:
    """Mostly-right commands reach deep: ranges near the end, lists that lie, buffers that are too short."""
    random = Random(f"{SEED}{seed}")
    chance, bits = random.random, random.getrandbits
    found, memory = units(ask, tmp_path), Memory()
    known = {unit: sorted(unit.handlers) for unit, _path in found}
    files = [os.open(path, os.O_RDONLY) for _unit, path in found]
    edges = (0, 1, SIZE // 4096, SIZE // 2048, SIZE // 512, 0xFFFFFFFF, (1 << 64) - 1)
    sizes = (0, 8, 24, 511, 512, 512, 4096, 4096, 8192, 65536, MOST)
    answered = dict.fromkeys((scsi.GOOD, scsi.CHECK_CONDITION), 0)

    def pick(choices: Sequence[T]) -> T:  # a third of the time that random.choice takes
        return choices[int(chance() * len(choices))]

    for number in range(COMMANDS // 2):
        unit, path = pick(found)
        raw = bytearray(bits(128).to_bytes(16, "big") if chance() < 0.2 else 16)
        raw[0] = pick(known[unit]) if chance() < 0.95 else bits(8)
        lba = max(0, pick(edges) + int(chance() * 7) - 3)
        blocks = pick((0, 1, 2, 8, 255, 256, 0xFFFF, 0xFFFFFFFF))
        if raw[0] >> 5 in (1, 2):
            raw[2:6] = (lba & 0xFFFFFFFF).to_bytes(4, "big")
            raw[7:9] = (blocks & 0xFFFF).to_bytes(2, "big")
        elif raw[0] >> 5 == 4:
            raw[2:10] = (lba & (1 << 64) - 1).to_bytes(8, "big")
            raw[10:14] = blocks.to_bytes(4, "big")
        elif raw[0] >> 5 == 5:
            raw[2:6] = (lba & 0xFFFFFFFF).to_bytes(4, "big")
            raw[6:10] = blocks.to_bytes(4, "big")
        else:
            raw[4] = blocks & 0xFF
        if chance() < 0.3:
            raw[1] = bits(8)
        n = pick(sizes)
        cuts = [int(chance() * (n + 1)) for _ in range(bits(2))]
        before = path.read_bytes() if raw[0] not in WRITES and number % 256 == 0 else None
        reply = shoot(ask, unit, bytes(raw[: pick((6, 10, 12, 16, 16, 16))]), memory, n, cuts)
        answered[reply.status] += 1
        if isinstance(unit, DvdDrive) and unit.disk is None:
            unit.insert(ask.disk(path, sector_size=2048, read_only=True))
        if before is not None:
            assert path.read_bytes() == before
        if number % 32 == 0:
            assert {os.fstat(file).st_size for file in files} == {SIZE}
    assert {os.fstat(file).st_size for file in files} == {SIZE}
    for file in files:
        os.close(file)
    assert all(answered.values()), answered
