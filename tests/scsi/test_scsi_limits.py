"""What a SCSI disk says that it does at once it does, up to its last block; one more is refused, undone."""

from __future__ import annotations

from pathlib import Path

import pytest
from scsi_asker import Noted, Scsi

from hvkvm.abi import scsi
from hvkvm.block.request import Op, Request
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.disk import ScsiDisk

SECTOR = 512
SIZE = 4 << 30
LAST = SIZE // SECTOR - 1
COMPARE = 0x02


@pytest.fixture
def noted(ask: Scsi, tmp_path: Path) -> Noted:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    unit = ScsiDisk(ask.disk(path), "s")
    ask.sense(unit, bytes(6))
    return Noted(ask, unit, unit.disk)


def cdb(operation: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return scsi.cdb16.pack(operation, flags, lba, blocks, 0, 0)


def unmap(*ranges: tuple[int, int], flags: int = 0) -> tuple[bytes, bytes]:
    """The CDB and the parameters of an UNMAP."""
    rows = b"".join(scsi.unmap_descriptor.pack(*one) for one in ranges)
    data = scsi.unmap_head.pack(6 + len(rows), len(rows)) + rows
    return bytes((scsi.UNMAP, flags)) + bytes(5) + len(data).to_bytes(2, "big") + b"\0", data


def asked(requests: list[Request]) -> list[tuple[Op, int, int]]:
    """What each of them is, where, and how long, in blocks."""
    return [(one.op, one.offset // SECTOR, one.length // SECTOR) for one in requests]


def limits(ask: Scsi, unit: ScsiDisk) -> tuple[int, int, int, int]:
    """Blocks of a transfer, blocks and descriptors of an UNMAP, and blocks of a WRITE SAME."""
    page = ask.good(unit, bytes((scsi.INQUIRY, 1, 0xB0, 0, 64, 0)), 64)
    parts = (8, 4), (20, 4), (24, 4), (36, 8)
    transfer, unmapped, descriptors, same = (
        int.from_bytes(page[at : at + size], "big") for at, size in parts
    )
    return transfer, unmapped, descriptors, same


def test_what_its_block_limits_say(ask: Scsi, noted: Noted) -> None:
    transfer, unmapped, descriptors, same = limits(ask, noted.unit)
    room = transfer * SECTOR
    assert asked(noted.good(cdb(scsi.READ_16, 0, transfer), room)) == [(Op.READ, 0, transfer)]
    assert asked(noted.good(cdb(scsi.WRITE_16, 0, transfer), room)) == [(Op.WRITE, 0, transfer)]
    compared = asked(noted.good(cdb(scsi.VERIFY_16, 0, transfer, COMPARE), bytes(room)))
    assert sum(n for _op, _at, n in compared) == transfer
    for operation, flags in ((scsi.READ_16, 0), (scsi.WRITE_16, 0), (scsi.VERIFY_16, COMPARE)):
        one_more = cdb(operation, 0, transfer + 1, flags)
        assert noted.refused(one_more, room + SECTOR) == scsi.INVALID_FIELD_IN_CDB

    assert asked(noted.good(*unmap((0, unmapped - 1), (unmapped, 1)))) == [
        (Op.DISCARD, 0, unmapped - 1),
        (Op.DISCARD, unmapped, 1),
    ]
    assert noted.refused(*unmap((0, unmapped), (unmapped, 1))) == scsi.INVALID_FIELD_IN_PARAMETERS
    each = [(2 * number, 1) for number in range(descriptors + 1)]
    assert len(noted.good(*unmap(*each[:-1]))) == descriptors
    assert noted.refused(*unmap(*each)) == scsi.INVALID_FIELD_IN_PARAMETERS

    assert asked(noted.good(cdb(scsi.WRITE_SAME_16, 0, same), bytes(SECTOR))) == [(Op.WRITE_ZEROES, 0, same)]
    assert noted.refused(cdb(scsi.WRITE_SAME_16, 0, same + 1), bytes(SECTOR)) == scsi.INVALID_FIELD_IN_CDB


def test_a_verification_without_data_is_bounded(noted: Noted) -> None:
    most = (1 << 30) // SECTOR
    assert sum(n for _op, _at, n in asked(noted.good(cdb(scsi.VERIFY_16, 0, most)))) == most
    assert noted.refused(cdb(scsi.VERIFY_16, 0, most + 1)) == scsi.INVALID_FIELD_IN_CDB


def test_up_to_the_last_block(noted: Noted) -> None:
    block = b"\1" * SECTOR
    assert asked(noted.good(*unmap((LAST - 9, 10)))) == [(Op.DISCARD, LAST - 9, 10)]
    assert noted.refused(*unmap((0, 1), (LAST - 9, 11))) == scsi.LBA_OUT_OF_RANGE
    assert asked(noted.good(*unmap())) == []
    assert asked(noted.good(cdb(scsi.WRITE_SAME_16, LAST, 1), block)) == [(Op.WRITE, LAST, 1)]
    many = (4 << 20) // SECTOR  # longer than a piece of it: the pieces before the end must not be written
    assert noted.refused(cdb(scsi.WRITE_SAME_16, LAST + 2 - many, many), block) == scsi.LBA_OUT_OF_RANGE


def test_zeros_may_be_holes_only_where_the_guest_says_so(noted: Noted) -> None:
    for flags in (0x00, 0x08):
        noted.good(cdb(scsi.WRITE_SAME_16, 0, 8, flags), bytes(SECTOR))
        (request,) = noted.requests
        assert (request.op, request.may_unmap) == (Op.WRITE_ZEROES, bool(flags))


@pytest.mark.parametrize("flags", [0x20, 0xE0])
def test_protection_that_it_does_not_have(noted: Noted, flags: int) -> None:
    for operation in (scsi.READ_16, scsi.WRITE_16, scsi.WRITE_VERIFY_16, scsi.VERIFY_16, scsi.WRITE_SAME_16):
        assert noted.refused(cdb(operation, 0, 1, flags), SECTOR) == scsi.INVALID_FIELD_IN_CDB


def test_anchors_that_it_does_not_have(noted: Noted) -> None:
    assert noted.refused(*unmap((0, 1), flags=0x01)) == scsi.INVALID_FIELD_IN_CDB
    for flags in (0x18, 0x02, 0x04):
        assert noted.refused(cdb(scsi.WRITE_SAME_16, 0, 1, flags), SECTOR) == scsi.INVALID_FIELD_IN_CDB


def test_what_differs_first_is_told_and_ends_a_verification(ask: Scsi, noted: Noted) -> None:
    """The disk has zeros: the later pieces, which are the same, must not make up for the first."""
    blocks = (256 << 10) // SECTOR
    compare = cdb(scsi.VERIFY_16, 5, blocks, COMPARE)
    data = b"\1" + bytes(blocks * SECTOR - 1)
    for _ in range(10):  # more than compare at a time, so none of them may keep its place
        assert ask.sense(noted.unit, compare, data) == scsi.MISCOMPARED
        assert len(noted.requests) == 1
        noted.requests.clear()
    assert noted.good(compare, bytes(len(data)))


def test_no_more_than_four_compare_at_a_time(ask: Scsi, noted: Noted) -> None:
    replies: list[Reply] = []
    for _ in range(6):
        data = [memoryview(bytearray(SECTOR))]
        noted.unit.execute(Command(cdb(scsi.VERIFY_16, 0, 1, COMPARE), data, replies.append))
    assert len(noted.requests) == 4
    ask.loop.run()
    assert [reply.status for reply in replies] == [scsi.GOOD] * 6
