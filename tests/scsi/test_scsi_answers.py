"""What a SCSI disk asks of the block layer for a command, and what its guest is told of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
from scsi_asker import Noted, Scsi, sense_in

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.block.request import Op, Status
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.scsi.target import Bus
from hvkvm.errors import StateError

SECTOR = 512
BLOCKS = 64
STOP, START = (bytes((scsi.START_STOP, 0, 0, 0, flag, 0)) for flag in (0, 1))
READY = bytes(6)


@pytest.fixture
def noted(ask: Scsi, tmp_path: Path) -> Noted:
    path = tmp_path / "disk"
    path.write_bytes(bytes(BLOCKS * SECTOR))
    unit = ScsiDisk(ask.disk(path), "s")
    ask.sense(unit, READY)
    return Noted(ask, unit, unit.disk)


def cdb(operation: int, lba: int = 0, blocks: int = 1, flags: int = 0) -> bytes:
    if operation >> 5 == 4:
        return scsi.cdb16.pack(operation, flags, lba, blocks, 0, 0)
    return scsi.cdb10.pack(operation, flags, lba, 0, blocks, 0)


@pytest.mark.parametrize("operation", [scsi.SYNCHRONIZE_CACHE, scsi.SYNCHRONIZE_CACHE_16])
def test_a_cache_is_synchronized_by_a_flush(noted: Noted, operation: int) -> None:
    for flags in (0, 2):  # with IMMED, too
        assert [one.op for one in noted.good(cdb(operation, flags=flags))] == [Op.FLUSH]


def test_what_is_written_goes_through_the_cache_only_where_the_guest_says_so(noted: Noted) -> None:
    for operation, flags, fua in (
        (scsi.WRITE_10, 0, False),
        (scsi.WRITE_10, scsi.FUA, True),
        (scsi.WRITE_16, scsi.FUA, True),
        (scsi.WRITE_VERIFY, 0, True),
        (scsi.WRITE_VERIFY_16, 0, True),
        (scsi.READ_10, scsi.FUA, False),
    ):
        (request,) = noted.good(cdb(operation, flags=flags), SECTOR)
        assert request.fua == fua, hex(operation)


@pytest.mark.parametrize(
    ("status", "reading", "writing"),
    [
        (Status.ERROR, scsi.UNRECOVERED_READ, scsi.WRITE_ERROR),
        (Status.SHORT, scsi.UNRECOVERED_READ, scsi.UNRECOVERED_READ),
        (Status.NO_SPACE, scsi.SPACE_EXHAUSTED, scsi.SPACE_EXHAUSTED),
        (Status.GONE, scsi.COMMUNICATION_FAILURE, scsi.COMMUNICATION_FAILURE),
        (Status.CANCELLED, scsi.COMMAND_CLEARED, scsi.COMMAND_CLEARED),
        (Status.DAMAGED, scsi.INTERNAL_FAILURE, scsi.INTERNAL_FAILURE),
    ],
)
def test_the_guest_is_told_what_went_wrong(
    ask: Scsi, noted: Noted, status: Status, reading: Sense, writing: Sense
) -> None:
    noted.status = status
    for operation, sense in (
        (scsi.READ_10, reading),
        (scsi.VERIFY, reading),
        (scsi.WRITE_10, writing),
        (scsi.WRITE_SAME, writing),
        (scsi.SYNCHRONIZE_CACHE, writing),
    ):
        reply, _memory = ask.execute(noted.unit, cdb(operation, 7), SECTOR)
        assert sense_in(reply) == sense, hex(operation)
        assert int.from_bytes(reply.sense[3:7], "big") == 7


def test_a_disk_that_stops_flushes_once(ask: Scsi, noted: Noted) -> None:
    assert noted.good(START) == []
    assert [one.op for one in noted.good(STOP)] == [Op.FLUSH]
    assert noted.good(STOP) == []
    assert noted.good(START) == []
    noted.status = Status.ERROR
    assert ask.sense(noted.unit, STOP) == scsi.WRITE_ERROR
    assert noted.refused(READY) == scsi.NOT_READY_STOPPED
    assert noted.refused(bytes((scsi.START_STOP, 0, 0, 0, 0x31, 0))) == scsi.INVALID_FIELD_IN_CDB


def test_a_reset_starts_a_disk_that_has_stopped(ask: Scsi, noted: Noted) -> None:
    noted.good(STOP)
    noted.unit.reset(lambda: None)
    ask.loop.run()
    assert noted.refused(READY) == scsi.DEVICE_RESET
    ask.good(noted.unit, READY)


def test_a_disk_that_is_switched_on_again_says_so(ask: Scsi, noted: Noted) -> None:
    noted.good(STOP)
    noted.unit.power_on()
    assert noted.refused(READY) == scsi.POWER_ON
    ask.good(noted.unit, READY)


def test_a_seek_goes_to_a_block_that_there_is(noted: Noted) -> None:
    assert noted.good(cdb(scsi.SEEK_10, BLOCKS - 1)) == []
    assert noted.refused(cdb(scsi.SEEK_10, BLOCKS)) == scsi.LBA_OUT_OF_RANGE


def test_what_waits_for_the_guest_is_told_once_and_a_reset_is_all(noted: Noted) -> None:
    unit = noted.unit
    changes = [Sense(scsi.UNIT_ATTENTION, 0x3F, number) for number in range(10)]
    for sense in [*changes, changes[0]]:
        unit.attention(sense)
    assert unit.saved_attentions() == tuple(changes[:8])
    unit.attention(scsi.POWER_ON)
    assert unit.saved_attentions() == (scsi.POWER_ON,)


def test_saved_attentions_are_bounded_by_what_a_unit_keeps(noted: Noted) -> None:
    most = tuple(Sense(scsi.UNIT_ATTENTION, 0, number) for number in range(248, 256))
    noted.unit.load_attentions(most)
    assert noted.unit.saved_attentions() == most
    for bad in ((*most, scsi.POWER_ON), (most[0]._replace(ascq=256),), (most[0]._replace(asc=-1),)):
        with pytest.raises(StateError):
            noted.unit.load_attentions(bad)


def test_mode_pages_are_selected_without_saving(noted: Noted) -> None:
    """PF must be set; SP, a page's subpage and a piece of a page are refused."""
    page = bytes((0x08, 0x12)) + bytes(18)
    for flags in (0x00, 0x11):
        assert noted.refused(bytes((0x15, flags, 0, 0, 0, 0))) == scsi.INVALID_FIELD_IN_CDB
    for data in (bytes(3), bytes(4) + page[:1], bytes(4) + page[:-1]):
        assert noted.refused(bytes((0x15, 0x10, 0, 0, len(data), 0)), data) == scsi.PARAMETER_LIST_LENGTH
    assert noted.refused(bytes((0x1A, 0, 0x08, 1, 255, 0)), 255) == scsi.INVALID_FIELD_IN_CDB
    assert noted.refused(bytes((0x1A, 0, 0x08, 0xFF, 255, 0)), 255) == scsi.INVALID_FIELD_IN_CDB
    assert noted.good(bytes((0x1A, 0, 0x3F, 0xFF, 255, 0)), 255) == []


def test_only_the_default_self_test(noted: Noted) -> None:
    assert noted.good(bytes((scsi.SEND_DIAGNOSTIC, 0x04, 0, 0, 0, 0))) == []
    assert noted.refused(bytes((scsi.SEND_DIAGNOSTIC, 0, 0, 0, 0, 0))) == scsi.INVALID_FIELD_IN_CDB
    assert noted.refused(bytes((scsi.SEND_DIAGNOSTIC, 0x04, 0, 0, 1, 0))) == scsi.INVALID_FIELD_IN_CDB


def test_luns_are_reported_to_who_has_room_for_one(ask: Scsi, noted: Noted) -> None:
    def report(select: int, room: int) -> bytes:
        return bytes((scsi.REPORT_LUNS, 0, select, 0, 0, 0)) + room.to_bytes(4, "big") + bytes(2)

    noted.unit.luns = lambda: [1, 255, 256]
    luns = b"".join(lun.to_bytes(2, "big") + bytes(6) for lun in (1, 255, 0x4100))
    for select, data in ((0, luns), (1, b""), (2, luns)):
        assert ask.good(noted.unit, report(select, 64), 64) == len(data).to_bytes(4, "big") + bytes(4) + data
    assert ask.good(noted.unit, report(0, 16), 64)[:4] == (24).to_bytes(4, "big")
    assert noted.refused(report(3, 64), 64) == scsi.INVALID_FIELD_IN_CDB
    assert noted.refused(report(0, 15), 64) == scsi.INVALID_FIELD_IN_CDB


def test_the_others_hear_of_one_that_goes(ask: Scsi, noted: Noted) -> None:
    bus = Bus()
    other = ScsiDisk(noted.unit.disk, "other")  # type: ignore[attr-defined]
    for lun, unit in ((0, noted.unit), (5, other)):
        bus.add(0, lun, unit)
    assert noted.refused(READY) == scsi.LUNS_CHANGED
    assert bus.remove(0, 5) is other
    assert noted.refused(READY) == scsi.LUNS_CHANGED
    assert other.luns() == [0]
    replies: list[Reply] = []
    bus.execute_absent(0, 5, Command(b"", [], replies.append))
    assert [sense_in(reply) for reply in replies] == [scsi.INVALID_OPCODE]
