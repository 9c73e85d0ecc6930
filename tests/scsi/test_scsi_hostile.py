"""Commands that no sane guest sends: one reply to each, memory and disk kept to, and the unit lives on."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from disk_asker import page_buffer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scsi_asker import Scsi

from hvkvm.abi import scsi
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.scsi.dvd import DvdDrive
from hvkvm.devices.scsi.unit import Unit

COMMANDS = int(os.environ.get("HVKVM_SCSI_COMMANDS", "3000"))
SIZE = 1 << 20
WRITES = frozenset((0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x41, 0x93, 0x42))


def units(ask: Scsi, tmp_path: Path) -> list[tuple[Unit, Path]]:
    found: list[tuple[Unit, Path]] = []
    for number, sector in enumerate((512, 4096, 2048)):
        path = tmp_path / f"disk{number}"
        path.write_bytes(Random(number).randbytes(SIZE))
        disk = ask.disk(path, sector_size=sector, read_only=sector == 2048)
        found.append((DvdDrive(disk, "d") if sector == 2048 else ScsiDisk(disk, f"s{number}"), path))
    return found


def shoot(ask: Scsi, unit: Unit, cdb: bytes, n: int, cuts: list[int]) -> Reply:
    """Execute with `n` bytes of buffers, cut at `cuts`, in the midst of memory that must stay."""
    memory = page_buffer(n + 1024, b"\xa5")
    inside = memory[512 : 512 + n]
    buffers, at = [], 0
    for cut in [*sorted(min(cut, n) for cut in cuts), n]:
        buffers.append(inside[at:cut])
        at = cut
    replies: list[Reply] = []
    unit.execute(Command(cdb, buffers, replies.append))
    ask.loop.run()
    assert len(replies) == 1, cdb.hex()
    assert memory[:512] == b"\xa5" * 512
    assert memory[512 + n :] == b"\xa5" * 512
    reply = replies[0]
    assert 0 <= reply.transferred <= n
    if reply.status == scsi.GOOD:
        assert inside[reply.transferred :] == b"\xa5" * (n - reply.transferred)
    return reply


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_get_one_reply(tmp_path: Path, data: st.DataObject) -> None:
    ask = Scsi()
    try:
        found = units(ask, tmp_path)
        for _ in range(8):
            unit, path = data.draw(st.sampled_from(found))
            operation = data.draw(st.one_of(st.sampled_from(sorted(unit.handlers)), st.integers(0, 255)))
            rest = data.draw(st.binary(max_size=15))
            n = data.draw(st.sampled_from((0, 1, 7, 512, 4096, 20000)))
            cuts = data.draw(st.lists(st.integers(0, n), max_size=4))
            shoot(ask, unit, bytes((operation,)) + rest, n, cuts)
            assert path.stat().st_size == SIZE
    finally:
        ask.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_commands(ask: Scsi, tmp_path: Path, seed: int) -> None:
    """Mostly-right commands reach deep: ranges near the end, lists that lie, buffers that are too short."""
    random = Random(seed)
    found = units(ask, tmp_path)
    edges = (0, 1, SIZE // 4096, SIZE // 2048, SIZE // 512, 0xFFFFFFFF, (1 << 64) - 1)
    answered = dict.fromkeys((scsi.GOOD, scsi.CHECK_CONDITION), 0)
    for _ in range(COMMANDS):
        unit, path = random.choice(found)
        raw = bytearray(random.randbytes(16) if random.random() < 0.2 else 16)
        raw[0] = random.choice(sorted(unit.handlers)) if random.random() < 0.95 else random.randrange(256)
        lba = max(0, random.choice(edges) + random.randint(-3, 3))
        blocks = random.choice((0, 1, 2, 8, 255, 256, 0xFFFF, 0xFFFFFFFF))
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
        if random.random() < 0.3:
            raw[1] = random.randrange(256)
        n = random.choice((0, 8, 24, 511, 512, 4096, 8192, 65536, 256 * 512))
        cuts = [random.randint(0, n) for _ in range(random.randrange(4))]
        before = path.read_bytes() if raw[0] not in WRITES and random.random() < 0.02 else None
        reply = shoot(ask, unit, bytes(raw[: random.choice((6, 10, 12, 16, 16, 16))]), n, cuts)
        answered[reply.status] += 1
        if isinstance(unit, DvdDrive) and unit.disk is None:
            unit.insert(ask.disk(path, sector_size=2048, read_only=True))
        if before is not None:
            assert path.read_bytes() == before
        assert path.stat().st_size == SIZE
    assert all(answered.values()), answered
