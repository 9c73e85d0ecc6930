"""The SCSI disk: every command of its table, its errors, and what it says of itself."""

from __future__ import annotations

from errno import EIO
from pathlib import Path
from random import Random

import pytest
from scsi_asker import Scsi, sense_in

from hvkvm.abi import scsi
from hvkvm.block.request import Request
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.disk import ScsiDisk, ScsiDiskState
from hvkvm.devices.scsi.target import Bus
from hvkvm.errors import StateError
from hvkvm.state.codec import plain, restored

MIB = 1 << 20
READY = bytes(6)
CAPACITY_16 = bytes((0x9E, 0x10)) + bytes(11) + bytes((32, 0, 0))


def cdb(operation: int, lba: int = 0, blocks: int = 0, flags: int = 0) -> bytes:
    """A CDB on blocks, of the length that its operation has."""
    group = operation >> 5
    if group == 0:
        return scsi.cdb6.pack(operation, lba >> 16, lba & 0xFFFF, blocks & 0xFF, 0)
    if group == 4:
        return scsi.cdb16.pack(operation, flags, lba, blocks, 0, 0)
    if group == 5:
        return scsi.cdb12.pack(operation, flags, lba, blocks, 0, 0)
    return scsi.cdb10.pack(operation, flags, lba, 0, blocks, 0)


@pytest.fixture(params=[512, 4096])
def sector(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(Random(1).randbytes(4 * MIB))
    return path


@pytest.fixture
def unit(ask: Scsi, file: Path, sector: int) -> ScsiDisk:
    unit = ScsiDisk(ask.disk(file, sector_size=sector), "serial-1")
    assert ask.sense(unit, READY) == scsi.POWER_ON
    ask.good(unit, READY)
    return unit


@pytest.mark.parametrize("length", [6, 10, 12, 16])
def test_reads_and_writes_of_every_length(
    ask: Scsi, unit: ScsiDisk, file: Path, sector: int, length: int
) -> None:
    read, write = {6: (0x08, 0x0A), 10: (0x28, 0x2A), 12: (0xA8, 0xAA), 16: (0x88, 0x8A)}[length]
    data = file.read_bytes()
    assert ask.good(unit, cdb(read, 7, 9), 9 * sector) == data[7 * sector : 16 * sector]
    # More room than is asked for stays as it is.
    reply, memory = ask.execute(unit, cdb(read, 7, 1), bytes([9]) * 2 * sector)
    assert reply == Reply(scsi.GOOD, b"", sector)
    assert memory == data[7 * sector : 8 * sector] + bytes([9]) * sector
    fresh = Random(length).randbytes(5 * sector)
    flags = scsi.FUA if length > 6 else 0
    ask.good(unit, cdb(write, 20, 5, flags), fresh)
    assert file.read_bytes() == data[: 20 * sector] + fresh + data[25 * sector :]
    assert ask.sense(unit, cdb(read, 7, 2), 2 * sector - 1) == scsi.DATA_PHASE_ERROR
    assert ask.sense(unit, cdb(write, 7, 2), bytes(sector)) == scsi.DATA_PHASE_ERROR


def test_six_bytes_with_no_length_mean_256_blocks(ask: Scsi, unit: ScsiDisk, file: Path, sector: int) -> None:
    assert ask.good(unit, cdb(scsi.READ_6, 0, 0), 256 * sector) == file.read_bytes()[: 256 * sector]
    assert ask.good(unit, cdb(scsi.READ_10, 0, 0)) == b""


@pytest.mark.parametrize(
    "operation", [0x08, 0x28, 0xA8, 0x88, 0x0A, 0x2A, 0x8A, 0x2F, 0x8F, 0x35, 0x91, 0x41, 0x93]
)
def test_ranges_beyond_the_end(ask: Scsi, unit: ScsiDisk, sector: int, operation: int) -> None:
    last = 4 * MIB // sector - 1
    replies = []
    for lba, blocks in ((last, 2), (last + 1, 1), (last + 2, 1)):
        reply, _memory = ask.execute(unit, cdb(operation, lba, blocks), 2 * sector)
        assert sense_in(reply) == scsi.LBA_OUT_OF_RANGE
        assert int.from_bytes(reply.sense[3:7], "big") == lba
        replies.append(reply)
    if operation >> 5 == 4:
        assert ask.sense(unit, cdb(operation, (1 << 64) - 1, 1), sector) == scsi.LBA_OUT_OF_RANGE


def test_capacity(ask: Scsi, unit: ScsiDisk, sector: int) -> None:
    blocks = 4 * MIB // sector
    assert ask.good(unit, bytes((0x25,)) + bytes(9), 8) == scsi.capacity10.pack(blocks - 1, sector)
    long = ask.good(unit, CAPACITY_16, 32)
    assert int.from_bytes(long[:8], "big") == blocks - 1
    assert int.from_bytes(long[8:12], "big") == sector
    assert sector << (long[13] & 0x0F) == 4096
    assert long[14] & 0x80
    assert ask.sense(unit, cdb(scsi.READ_CAPACITY, 5)) == scsi.INVALID_FIELD_IN_CDB
    assert ask.sense(unit, bytes((0x9E, 0x12)) + bytes(14)) == scsi.INVALID_FIELD_IN_CDB


def test_more_blocks_than_ten_bytes_count(ask: Scsi, tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(3 << 40)
    unit = ScsiDisk(ask.disk(path), "s")
    ask.sense(unit, READY)
    assert ask.good(unit, bytes((0x25,)) + bytes(9), 8)[:4] == b"\xff" * 4
    assert int.from_bytes(ask.good(unit, CAPACITY_16, 32)[:8], "big") == (3 << 40) // 512 - 1


def test_inquiry_and_vital_product_data(ask: Scsi, unit: ScsiDisk, sector: int) -> None:
    standard = ask.good(unit, bytes((0x12, 0, 0, 0, 255, 0)), 255)
    assert standard[0] == scsi.TYPE_DISK
    assert standard[4] == len(standard) - 5
    assert standard[8:32] == b"HVKVM   VIRTUAL-DISK    "
    assert ask.good(unit, bytes((0x12, 0, 0, 0, 5, 0)), 255) == standard[:5]
    pages = ask.good(unit, bytes((0x12, 1, 0, 0, 255, 0)), 255)
    assert pages[4:] == bytes((0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
    for page in pages[4:]:
        data = ask.good(unit, bytes((0x12, 1, page, 0, 255, 0)), 255)
        assert data[1] == page
        assert int.from_bytes(data[2:4], "big") == len(data) - 4
    assert ask.good(unit, bytes((0x12, 1, 0x80, 0, 255, 0)), 255)[4:] == b"serial-1"
    limits = ask.good(unit, bytes((0x12, 1, 0xB0, 0, 255, 0)), 255)
    assert len(limits) == 64
    assert int.from_bytes(limits[8:12], "big") * sector == 32 * MIB
    for bad in (
        bytes((0x12, 1, 0x90, 0, 255, 0)),
        bytes((0x12, 0, 0x80, 0, 255, 0)),
        bytes((0x12, 2, 0, 0, 9, 0)),
    ):
        assert ask.sense(unit, bad, 255) == scsi.INVALID_FIELD_IN_CDB


def test_two_disks_have_two_names(ask: Scsi, tmp_path: Path) -> None:
    names = set()
    for serial in ("a", "b"):
        (tmp_path / serial).write_bytes(bytes(4096))
        unit = ScsiDisk(ask.disk(tmp_path / serial), serial)
        names.add(ask.good(unit, bytes((0x12, 1, 0x83, 0, 255, 0)), 255))
    assert len(names) == 2


def test_mode_pages(ask: Scsi, unit: ScsiDisk, sector: int, file: Path) -> None:
    six = ask.good(unit, bytes((0x1A, 0, 0x3F, 0, 255, 0)), 255)
    assert six[0] == len(six) - 1
    assert six[2] & 0x10  # DPOFUA
    assert six[3] == 8
    assert int.from_bytes(six[4:8], "big") == 4 * MIB // sector
    assert int.from_bytes(six[9:12], "big") == sector
    ten = ask.good(unit, bytes((0x5A, 0x08, 0x08)) + bytes(4) + bytes((1, 0, 0)), 256)
    assert int.from_bytes(ten[:2], "big") == len(ten) - 2
    assert ten[8] == 0x08
    assert ten[10] & 4  # WCE
    long = ask.good(unit, bytes((0x5A, 0x10, 0x08)) + bytes(4) + bytes((1, 0, 0)), 256)
    assert long[4] == 1
    assert int.from_bytes(long[8:16], "big") == 4 * MIB // sector
    changeable = ask.good(unit, bytes((0x1A, 8, 0x48, 0, 255, 0)), 255)
    assert not any(changeable[6:])
    assert ask.sense(unit, bytes((0x1A, 0, 0xC8, 0, 255, 0)), 255) == scsi.SAVING_NOT_SUPPORTED
    assert ask.sense(unit, bytes((0x1A, 0, 0x05, 0, 255, 0)), 255) == scsi.INVALID_FIELD_IN_CDB
    # What says what is so already is fine; a change is not.
    page = ten[8:28]
    ask.good(unit, bytes((0x15, 0x10, 0, 0, 24, 0)), bytes(4) + page)
    changed = page[:2] + bytes((0,)) + page[3:]
    assert (
        ask.sense(unit, bytes((0x15, 0x10, 0, 0, 24, 0)), bytes(4) + changed)
        == scsi.INVALID_FIELD_IN_PARAMETERS
    )
    assert ask.sense(unit, bytes((0x15, 0x10, 0, 0, 24, 0)), bytes(4)) == scsi.PARAMETER_LIST_LENGTH


def test_block_descriptors_change_nothing(ask: Scsi, unit: ScsiDisk, sector: int) -> None:
    """What would give the disk other blocks, as `sg_format --resize` asks, must not seem to have done so."""
    blocks = 4 * MIB // sector

    def select(descriptor: bytes, *, ten: bool = False, long_lba: int = 0) -> tuple[bytes, bytes]:
        n = len(descriptor)
        if not ten:
            return bytes((0x15, 0x10, 0, 0, 4 + n, 0)), bytes((0, 0, 0, n)) + descriptor
        return bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, 8 + n, 0)), bytes(
            (0, 0, 0, 0, long_lba, 0, 0, n)
        ) + descriptor

    def short(count: int, size: int) -> bytes:
        return count.to_bytes(4, "big") + size.to_bytes(4, "big")

    def long(count: int, size: int) -> bytes:
        return count.to_bytes(8, "big") + bytes(4) + size.to_bytes(4, "big")

    for count in (0, blocks):
        ask.good(unit, *select(short(count, sector)))
        ask.good(unit, *select(short(count, sector), ten=True))
        ask.good(unit, *select(long(count, sector), ten=True, long_lba=1))
    for bad in (
        select(short(blocks - 1, sector)),
        select(short(blocks, 520)),
        select(bytes(8)),
        select(bytes(5)),
        select(short(blocks, sector) * 2),
        select(short(blocks // 2, sector), ten=True),
        select(long(blocks, sector), ten=True),
        select(long(blocks // 8, 8 * sector), ten=True, long_lba=1),
    ):
        assert ask.sense(unit, *bad) == scsi.INVALID_FIELD_IN_PARAMETERS


def test_a_disk_that_is_read_only(ask: Scsi, file: Path) -> None:
    unit = ScsiDisk(ask.disk(file, read_only=True), "s")
    ask.sense(unit, READY)
    assert ask.good(unit, bytes((0x1A, 0, 0x3F, 0, 255, 0)), 255)[2] & 0x80
    for operation in (0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x41, 0x93):
        assert ask.sense(unit, cdb(operation, 0, 1), 512) == scsi.WRITE_PROTECTED
    assert ask.sense(unit, bytes((0x42,)) + bytes(9)) == scsi.WRITE_PROTECTED
    ask.good(unit, cdb(scsi.SYNCHRONIZE_CACHE))


def parameters(*ranges: tuple[int, int]) -> bytes:
    """What an UNMAP of `ranges` brings along."""
    rows = b"".join(scsi.unmap_descriptor.pack(*one) for one in ranges)
    return scsi.unmap_head.pack(6 + len(rows), len(rows)) + rows


def unmap(data: bytes) -> bytes:
    """The CDB for them."""
    return bytes((0x42,)) + bytes(6) + len(data).to_bytes(2, "big") + b"\0"


def test_unmap(ask: Scsi, unit: ScsiDisk, file: Path, sector: int) -> None:
    before = file.read_bytes()
    per = 65536 // sector
    data = parameters((per, per), (3 * per, per))
    ask.good(unit, unmap(data), data)
    after = file.read_bytes()
    for start in (65536, 3 * 65536):
        assert after[start : start + 65536] in (bytes(65536), before[start : start + 65536])
    assert after[2 * 65536 : 3 * 65536] == before[2 * 65536 : 3 * 65536]
    # One bad range, and nothing is discarded.
    data = parameters((8 * per, per), (4 * MIB // sector, 1))
    assert ask.sense(unit, unmap(data), data) == scsi.LBA_OUT_OF_RANGE
    assert file.read_bytes() == after
    ask.good(unit, unmap(b""))
    assert ask.sense(unit, unmap(bytes(7)), bytes(7)) == scsi.PARAMETER_LIST_LENGTH
    assert ask.sense(unit, unmap(data), data[:20]) == scsi.PARAMETER_LIST_LENGTH
    many = parameters(*[(0, 1)] * 300)
    assert ask.sense(unit, unmap(many), many) == scsi.INVALID_FIELD_IN_PARAMETERS


def test_unmap_goes_from_range_to_range(ask: Scsi, unit: ScsiDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command has one request in flight; the first range that fails is told, and is the last."""
    tried: list[int] = []

    def discard(offset: int, length: int) -> None:
        tried.append(offset // length)
        if tried[-1] == 7:
            raise OSError(EIO, "broken")

    monkeypatch.setattr(unit.disk.image, "discard", discard)
    told: list[Reply] = []
    for first in (0, 0x100, 0):
        data = parameters((first + 1, 0), *((first + number, 1) for number in range(10)), (first + 2, 0))
        unit.execute(Command(unmap(data), [memoryview(bytearray(data))], told.append))
    assert unit.disk.in_flight == 3
    ask.loop.run()
    assert sorted(tried) == sorted([*range(8), *range(0x100, 0x10A), *range(8)])
    assert [reply.status for reply in told].count(scsi.GOOD) == 1
    failed = [reply for reply in told if reply.status != scsi.GOOD]
    assert [reply.sense for reply in failed] == [scsi.WRITE_ERROR.fixed(7)] * 2


@pytest.mark.parametrize("operation", [scsi.WRITE_SAME, scsi.WRITE_SAME_16])
def test_write_same(ask: Scsi, unit: ScsiDisk, file: Path, sector: int, operation: int) -> None:
    model = bytearray(file.read_bytes())
    block = Random(5).randbytes(sector)
    blocks = (MIB + 65536) // sector
    ask.good(unit, cdb(operation, 3, blocks), block)
    model[3 * sector : (3 + blocks) * sector] = block * blocks
    assert file.read_bytes() == model
    ask.good(unit, cdb(operation, 10, 20, 0x08), bytes(sector))
    model[10 * sector : 30 * sector] = bytes(20 * sector)
    assert file.read_bytes() == model
    assert ask.sense(unit, cdb(operation, 0, 0), block) == scsi.INVALID_FIELD_IN_CDB
    assert ask.sense(unit, cdb(operation, 0, 1), block[1:]) == scsi.DATA_PHASE_ERROR
    if operation == scsi.WRITE_SAME_16:
        ask.good(unit, cdb(operation, 40, 1, 0x01))
        model[40 * sector : 41 * sector] = bytes(sector)
    else:
        assert ask.sense(unit, cdb(operation, 40, 1, 0x01)) == scsi.INVALID_FIELD_IN_CDB
    assert file.read_bytes() == model


@pytest.mark.parametrize("operation", [scsi.VERIFY, scsi.VERIFY_12, scsi.VERIFY_16])
def test_verify(ask: Scsi, unit: ScsiDisk, file: Path, sector: int, operation: int) -> None:
    data = file.read_bytes()
    blocks = (MIB + 65536) // sector
    ask.good(unit, cdb(operation, 1, blocks))
    same = data[sector : (1 + blocks) * sector]
    ask.good(unit, cdb(operation, 1, blocks, 0x02), same)
    assert (
        ask.sense(unit, cdb(operation, 1, blocks, 0x02), same[:-1] + bytes((same[-1] ^ 1,)))
        == scsi.MISCOMPARED
    )
    assert ask.sense(unit, cdb(operation, 1, 2, 0x02), bytes(sector)) == scsi.DATA_PHASE_ERROR
    assert ask.sense(unit, cdb(operation, 1, 2, 0x06), bytes(sector)) == scsi.INVALID_FIELD_IN_CDB


@pytest.mark.parametrize(
    ("operation", "flags"), [(scsi.VERIFY, 0), (scsi.VERIFY, 0x02), (scsi.WRITE_SAME, 0)]
)
def test_many_at_once_take_little_memory(
    ask: Scsi,
    unit: ScsiDisk,
    file: Path,
    sector: int,
    monkeypatch: pytest.MonkeyPatch,
    operation: int,
    flags: int,
) -> None:
    """A guest may have a thousand in flight; each is answered, and before the disk counts as drained."""
    data = file.read_bytes()[: MIB if flags else sector]
    given = [memoryview(bytearray(data))] if flags or operation == scsi.WRITE_SAME else []
    asked: list[Request] = []
    submit = unit.disk.submit

    def seen(request: Request) -> None:
        asked.append(request)
        submit(request)

    monkeypatch.setattr(unit.disk, "submit", seen)
    told: list[Reply | None] = []
    for _ in range(100):
        unit.execute(Command(cdb(operation, 0, MIB // sector, flags), given, told.append))
    unit.drain(lambda: told.append(None))
    memory = {id(view.obj): memoryview(view.obj) for request in asked for view in request.buffers}
    assert sum(view.nbytes for view in memory.values()) <= 100 * 4096
    ask.loop.run()
    assert told.pop() is None
    assert told == [Reply(scsi.GOOD, b"", sum(map(len, given)))] * 100


@pytest.mark.parametrize("operation", [scsi.WRITE_VERIFY, scsi.WRITE_VERIFY_12, scsi.WRITE_VERIFY_16])
def test_write_and_verify(ask: Scsi, unit: ScsiDisk, file: Path, sector: int, operation: int) -> None:
    block = Random(6).randbytes(sector)
    ask.good(unit, cdb(operation, 2, 1), block)
    assert file.read_bytes()[2 * sector : 3 * sector] == block


def test_what_is_not_there(ask: Scsi, unit: ScsiDisk) -> None:
    for operation in (0x5E, 0x5F, 0x16, 0x17, 0x04, 0x4D, 0x7F, 0xC0, 0xFF):
        assert ask.sense(unit, bytes((operation,)) + bytes(15)) == scsi.INVALID_OPCODE
    assert ask.sense(unit, b"") == scsi.INVALID_OPCODE
    assert ask.sense(unit, bytes((0x28, 0, 0))) == scsi.INVALID_FIELD_IN_CDB
    assert ask.sense(unit, bytes((0, 0, 0, 0, 0, scsi.NACA))) == scsi.INVALID_FIELD_IN_CDB


def test_stopping_and_starting(ask: Scsi, unit: ScsiDisk, sector: int) -> None:
    ask.good(unit, bytes((0x1B, 0, 0, 0, 0, 0)))
    assert ask.sense(unit, READY) == scsi.NOT_READY_STOPPED
    assert ask.sense(unit, cdb(0x28, 0, 1), sector) == scsi.NOT_READY_STOPPED
    sense = ask.good(unit, bytes((0x03, 0, 0, 0, 18, 0)), 18)
    assert (sense[2], sense[12], sense[13]) == scsi.NOT_READY_STOPPED
    ask.good(unit, bytes((0x1B, 0, 0, 0, 1, 0)))
    ask.good(unit, cdb(0x28, 0, 1), sector)


def test_unit_attentions_after_resize_and_reset(ask: Scsi, unit: ScsiDisk, file: Path, sector: int) -> None:
    results: list[object] = []
    unit.disk.resize(8 * MIB, results.append)
    ask.loop.run()
    ask.good(unit, bytes((0x12, 0, 0, 0, 36, 0)), 36)
    assert ask.sense(unit, READY) == scsi.CAPACITY_CHANGED
    ask.good(unit, READY)
    assert int.from_bytes(ask.good(unit, CAPACITY_16, 32)[:8], "big") == 8 * MIB // sector - 1
    # In flight when the reset comes: completed, then the reset is told.
    replies: list[Reply] = []
    unit.execute(Command(cdb(scsi.SYNCHRONIZE_CACHE), (), replies.append))
    done: list[int] = []
    unit.reset(lambda: done.append(len(replies)))
    early: list[Reply] = []
    unit.execute(Command(READY, (), early.append))
    assert early == [Reply(scsi.BUSY)]
    ask.loop.run()
    assert done == [1]
    sense = ask.good(unit, bytes((0x03, 1, 0, 0, 18, 0)), 18)
    assert (sense[0], *sense[1:4]) == (0x72, *scsi.DEVICE_RESET)
    ask.good(unit, READY)


def test_its_state_is_saved_and_loaded(ask: Scsi, unit: ScsiDisk, file: Path, tmp_path: Path) -> None:
    ask.good(unit, bytes((0x1B, 0, 0, 0, 0, 0)))
    unit.attention(scsi.CAPACITY_CHANGED)
    state = restored(ScsiDiskState, plain(unit.save()), "disk")
    other = ScsiDisk(unit.disk, "other")
    other.load(state)
    assert other.save() == state == unit.save()
    assert ask.sense(other, READY) == scsi.CAPACITY_CHANGED
    assert ask.sense(other, READY) == scsi.NOT_READY_STOPPED
    for attentions in ((scsi.POWER_ON,) * 9, (scsi.INVALID_LUN,), (scsi.POWER_ON._replace(asc=256),)):
        with pytest.raises(StateError):
            other.load(state._replace(attentions=attentions))


def test_who_answers_where_nobody_is(ask: Scsi, file: Path, unit: ScsiDisk) -> None:
    bus = Bus()
    bus.add(0, 3, unit)
    with pytest.raises(ValueError, match="has a LUN 3"):
        bus.add(0, 3, unit)

    def absent(target: int, lun: int, cdb: bytes, room: int = 0) -> Reply:
        replies: list[Reply] = []
        memory = memoryview(bytearray(room))
        bus.execute_absent(target, lun, Command(cdb, [memory] if room else [], replies.append))
        (reply,) = replies
        absent.memory = bytes(memory)  # type: ignore[attr-defined]
        return reply

    assert absent(0, 0, bytes((0x12, 0, 0, 0, 36, 0)), 36).status == scsi.GOOD
    assert absent.memory[0] == scsi.NO_UNIT  # type: ignore[attr-defined]
    assert absent(0, 0, bytes((0xA0,)) + bytes(5) + (64).to_bytes(4, "big") + bytes(2), 64).transferred == 16
    assert absent.memory[:16] == bytes((0, 0, 0, 8, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0))  # type: ignore[attr-defined]
    assert sense_in(absent(0, 0, READY)) == scsi.INVALID_LUN
    assert absent(1, 0, bytes((0xA0,)) + bytes(5) + (64).to_bytes(4, "big") + bytes(2), 64).transferred == 8
    assert absent.memory[:8] == bytes(8)  # type: ignore[attr-defined]
    assert sense_in(absent(1, 2, bytes((0xA0,)) + bytes(11))) == scsi.INVALID_LUN
    assert ask.good(unit, bytes((0xA0,)) + bytes(5) + (64).to_bytes(4, "big") + bytes(2), 64)[9] == 3
    other = ScsiDisk(unit.disk, "other")
    bus.add(0, 4, other)
    assert ask.sense(unit, READY) == scsi.LUNS_CHANGED
    assert bus.luns(0) == [3, 4]
    assert bus.remove(0, 4) is other
    assert bus.get(0, 4) is None
