"""The short way of a plain READ or WRITE does what the way of all commands does, or leaves it to that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from disk_asker import page_buffer
from scsi_asker import Scsi

from hvkvm.abi import scsi
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.scsi.disk import ScsiDisk

SIZE = 1 << 18
STEPS = 3000
TENS = (scsi.READ_10, scsi.READ_10, scsi.WRITE_10, scsi.WRITE_10, scsi.VERIFY, scsi.WRITE_VERIFY)
SIXTEENS = (scsi.READ_16, scsi.READ_16, scsi.WRITE_16, scsi.WRITE_16, scsi.WRITE_SAME_16)


@pytest.fixture
def ask() -> Iterator[Scsi]:
    asker = Scsi()
    yield asker
    asker.close()


def cdb_of(random: Random, sector: int) -> tuple[bytes, int]:
    """A CDB, mostly a plain one, and how many bytes come with it."""
    flags = random.choice((0, 0, 0, 0, scsi.FUA, 0x20, 0x10))
    control = random.choice((0, 0, 0, 0, 0, scsi.NACA))
    blocks = random.choice((1, 1, 2, 8, 0, 40))
    lba = random.choice((random.randrange(SIZE // sector), SIZE // sector - 1, 1 << 31))
    length = random.choice((blocks * sector,) * 6 + (blocks * sector + 512, max(0, blocks - 1) * sector))
    if random.random() < 0.5:
        cdb = scsi.cdb10.pack(random.choice(TENS), flags, lba, 0, blocks, control)
    else:
        cdb = scsi.cdb16.pack(random.choice(SIXTEENS), flags, lba, blocks, 0, control)
    return (cdb if random.random() < 0.95 else cdb[: random.randrange(1, len(cdb))]), length


@pytest.mark.parametrize(("sector", "read_only"), [(512, False), (4096, False), (512, True)])
def test_both_ways_are_one(ask: Scsi, tmp_path: Path, sector: int, read_only: bool) -> None:
    random = Random(sector + read_only)
    paths = [tmp_path / name for name in ("short", "long")]
    data = random.randbytes(SIZE)
    for path in paths:
        path.write_bytes(data)
    short, long = (
        ScsiDisk(ask.disk(path, sector_size=sector, read_only=read_only), "serial") for path in paths
    )
    begun = 0
    for _ in range(STEPS):
        cdb, length = cdb_of(random, sector)
        if random.random() < 0.05:
            cdb, length = bytes((scsi.START_STOP, 0, 0, 0, int(random.random() < 0.8), 0)), 0
        if random.random() < 0.05:
            for unit in (short, long):
                unit.attention(scsi.CAPACITY_CHANGED)
        content = random.randbytes(length)
        memory = page_buffer(length)
        memory[:] = content
        results: list[Result] = []
        request = Request(Op.READ, 0, [memory], results.append)
        taken = short.begin(cdb, request)
        ask.loop.run()
        reply, seen = ask.execute(long, cdb, content)
        if taken:
            begun += 1
            assert [result.status for result in results] == [Status.OK], cdb.hex()
            assert (reply.status, reply.transferred) == (scsi.GOOD, length), cdb.hex()
            assert bytes(memory) == seen, cdb.hex()
        else:
            assert not results, "it was left to the other way, and answered all the same"
            assert (reply, seen) == ask.execute(short, cdb, content), cdb.hex()
    assert begun > STEPS // 20
    assert paths[0].read_bytes() == paths[1].read_bytes()
