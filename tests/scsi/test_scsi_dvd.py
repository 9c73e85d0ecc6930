"""The DVD drive: what sr and installers ask, and a medium that comes and goes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from scsi_asker import Scsi

from hvkvm.abi import scsi
from hvkvm.block.disk import Disk
from hvkvm.devices.scsi import mmc
from hvkvm.devices.scsi.dvd import DvdDrive, DvdState
from hvkvm.errors import StateError
from hvkvm.state.codec import plain, restored

READY = bytes(6)
EVENT = bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "image.iso"
    path.write_bytes(Random(1).randbytes(100 * 2048))
    return path


@pytest.fixture
def drive(ask: Scsi, file: Path) -> DvdDrive:
    drive = DvdDrive(ask.disk(file, sector_size=2048, read_only=True), "dvd-1")
    assert ask.sense(drive, READY) == scsi.POWER_ON
    ask.good(drive, READY)
    return drive


def test_a_medium_is_read(ask: Scsi, drive: DvdDrive, file: Path) -> None:
    data = file.read_bytes()
    assert ask.good(drive, bytes((0x25,)) + bytes(9), 8) == scsi.capacity10.pack(99, 2048)
    assert ask.good(drive, scsi.cdb10.pack(0x28, 0, 16, 0, 3, 0), 3 * 2048) == data[16 * 2048 : 19 * 2048]
    assert ask.good(drive, scsi.cdb12.pack(0xA8, 0, 99, 1, 0, 0), 2048) == data[99 * 2048 :]
    assert ask.sense(drive, scsi.cdb10.pack(0x28, 0, 99, 0, 2, 0), 4096) == scsi.LBA_OUT_OF_RANGE
    assert ask.sense(drive, scsi.cdb10.pack(0x2A, 0, 0, 0, 1, 0), 2048) == scsi.INVALID_OPCODE
    ask.good(drive, scsi.cdb10.pack(0x2F, 0, 0, 0, 100, 0))
    inquiry = ask.good(drive, bytes((0x12, 0, 0, 0, 96, 0)), 96)
    assert inquiry[:2] == bytes((scsi.TYPE_ROM, 0x80))
    capabilities = ask.good(drive, bytes((0x5A, 0, 0x2A)) + bytes(4) + bytes((0, 128, 0)), 128)
    assert capabilities[8] == 0x2A
    assert capabilities[10] & 0x08  # reads DVD-ROM


def test_the_table_of_contents(ask: Scsi, drive: DvdDrive) -> None:
    toc = ask.good(drive, bytes((0x43, 0, 0, 0, 0, 0, 1, 0, 20, 0)), 20)
    assert toc[:4] == bytes((0, 18, 1, 1))
    assert toc[4:8] == bytes((0, 0x14, 1, 0))
    assert int.from_bytes(toc[16:20], "big") == 100
    msf = ask.good(drive, bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0, 12, 0)), 12)
    assert msf[8:12] == bytes((0, 0, 3, 25))
    ask.good(drive, bytes((0x43, 0, 1, 0, 0, 0, 0, 0, 12, 0)), 12)
    assert len(ask.good(drive, bytes((0x43, 2, 2, 0, 0, 0, 0, 0, 200, 0)), 200)) == 4 + 4 * 11
    for bad in (bytes((0x43, 0, 0, 0, 0, 0, 2, 0, 12, 0)), bytes((0x43, 0, 5, 0, 0, 0, 0, 0, 12, 0))):
        assert ask.sense(drive, bad, 12) == scsi.INVALID_FIELD_IN_CDB


def test_features_disc_and_track(ask: Scsi, drive: DvdDrive) -> None:
    every = ask.good(drive, bytes((0x46, 0)) + bytes(5) + bytes((1, 0, 0)), 256)
    assert int.from_bytes(every[:4], "big") == len(every) - 4
    assert int.from_bytes(every[6:8], "big") == mmc.PROFILE_CD_ROM
    codes, at = [], 8
    while at < len(every):
        codes.append(int.from_bytes(every[at : at + 2], "big"))
        at += 4 + every[at + 3]
    assert at == len(every)
    assert codes == sorted(codes)
    assert {0, 1, 2, 3, 0x10, 0x1E, 0x1F} <= set(codes)
    one = ask.good(drive, bytes((0x46, 2, 0, 3)) + bytes(3) + bytes((1, 0, 0)), 256)
    assert int.from_bytes(one[8:10], "big") == 3
    assert len(one) == 16
    info = ask.good(drive, bytes((0x51, 0)) + bytes(5) + bytes((0, 34, 0)), 34)
    assert info[:3] == bytes((0, 32, 0x0E))
    track = ask.good(drive, bytes((0x52, 1, 0, 0, 0, 1, 0, 0, 36, 0)), 36)
    assert int.from_bytes(track[24:28], "big") == 100
    assert ask.sense(drive, bytes((0x52, 1, 0, 0, 0, 2, 0, 0, 36, 0)), 36) == scsi.INVALID_FIELD_IN_CDB
    # A CD has no DVD structure.
    assert (
        ask.sense(drive, bytes((0xAD,)) + bytes(7) + bytes((8, 0, 0, 0)), 2048) == scsi.INVALID_FIELD_IN_CDB
    )


def test_a_large_image_is_a_dvd(ask: Scsi, tmp_path: Path) -> None:
    path = tmp_path / "large.iso"
    with path.open("wb") as file:
        file.truncate(4 << 30)
    drive = DvdDrive(ask.disk(path, sector_size=2048, read_only=True), "s")
    ask.sense(drive, READY)
    assert int.from_bytes(ask.good(drive, bytes((0x46,)) + bytes(7) + b"\x08\0", 8)[6:8], "big") == 0x10
    structure = ask.good(drive, bytes((0xAD,)) + bytes(7) + bytes((8, 4, 0, 0)), 2052)
    assert (
        int.from_bytes(structure[13:16], "big") - int.from_bytes(structure[9:12], "big")
        == (4 << 30) // 2048 - 1
    )
    ask.good(drive, bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0, 12, 0)), 12)


def test_a_medium_that_changes(ask: Scsi, drive: DvdDrive, file: Path, tmp_path: Path) -> None:
    assert ask.good(drive, EVENT, 8) == bytes((0, 6, 4, 0x10, 0, 2, 0, 0))
    ask.good(drive, bytes((0x1E, 0, 0, 0, 1, 0)))  # the guest has it mounted
    assert ask.sense(drive, bytes((0x1B, 0, 0, 0, 2, 0))) == scsi.REMOVAL_PREVENTED
    with pytest.raises(PermissionError, match="locked"):
        drive.eject()
    assert ask.good(drive, EVENT, 8)[4] == mmc.EVENT_EJECT_REQUEST
    ejected: list[Disk] = []
    drive.on_eject = ejected.append
    first = drive.disk
    ask.good(drive, bytes((0x1E, 0, 0, 0, 0, 0)))
    ask.good(drive, bytes((0x1B, 0, 0, 0, 2, 0)))
    assert ejected == [first]
    assert ask.sense(drive, READY) == scsi.NO_MEDIUM_TRAY_OPEN
    for cdb in (bytes((0x25,)) + bytes(9), scsi.cdb10.pack(0x28, 0, 0, 0, 1, 0), bytes((0x43,)) + bytes(9)):
        assert ask.sense(drive, cdb, 2048) == scsi.NO_MEDIUM_TRAY_OPEN
    assert ask.good(drive, EVENT, 8)[4:6] == bytes((mmc.EVENT_MEDIA_REMOVAL, 1))
    ask.good(drive, bytes((0x46,)) + bytes(7) + b"\xff\0", 255)
    ask.good(drive, bytes((0x1B, 0, 0, 0, 3, 0)))
    assert ask.sense(drive, READY) == scsi.NO_MEDIUM
    other = tmp_path / "other.iso"
    other.write_bytes(bytes(7 * 2048))
    drive.insert(ask.disk(other, sector_size=2048, read_only=True))
    with pytest.raises(ValueError, match="eject it first"):
        drive.insert(drive.disk)  # type: ignore[arg-type]
    assert ask.good(drive, EVENT, 8)[4:6] == bytes((mmc.EVENT_NEW_MEDIA, 2))
    assert ask.sense(drive, READY) == scsi.MEDIUM_CHANGED, "who polls for events has not taken the news"
    assert ask.good(drive, bytes((0x25,)) + bytes(9), 8)[:4] == bytes((0, 0, 0, 6))
    ask.good(drive, bytes((0x1E, 0, 0, 0, 1, 0)))
    assert drive.eject(force=True) is not None


def test_its_state_is_saved_and_loaded(ask: Scsi, drive: DvdDrive) -> None:
    ask.good(drive, bytes((0x1E, 0, 0, 0, 1, 0)))
    with pytest.raises(PermissionError):
        drive.eject()
    state = restored(DvdState, plain(drive.save()), "dvd")
    other = DvdDrive(drive.disk, "other")
    other.load(state)
    assert other.save() == state == drive.save()
    assert ask.good(other, EVENT, 8)[4] == mmc.EVENT_EJECT_REQUEST
    with pytest.raises(StateError):
        other.load(state._replace(events=(1,) * 5))


def test_a_saved_drive_is_one_that_can_be(ask: Scsi, drive: DvdDrive) -> None:
    state = drive.save()
    for events, good in (((0, 15, 1, 2), True), ((16,), False), ((-1,), False)):
        if good:
            drive.load(state._replace(events=events))
            assert drive.save().events == events
        else:
            with pytest.raises(StateError, match="are no events of a drive"):
                drive.load(state._replace(events=events))
    empty = DvdDrive(None, "s")
    for one, is_open in ((drive, False), (empty, True)):
        one.load(state._replace(tray_open=True))
        assert one.tray_open == is_open, "a tray with a medium is shut"
    empty.load(state)
    assert not empty.tray_open


def test_the_host_changes_the_medium(ask: Scsi, drive: DvdDrive) -> None:
    ask.good(drive, bytes((0x1E, 0, 0, 0, 1, 0)))
    medium = drive.eject(force=True)
    assert medium is not None
    assert drive.eject() is None, "nothing is locked any more"
    assert (drive.tray_open, drive.locked) == (True, False)
    drive.insert(medium)
    assert not drive.tray_open
    assert ask.sense(drive, READY) == scsi.MEDIUM_CHANGED
    ask.good(drive, READY)
    drive.power_on()
    assert drive.save().events == ()


def test_what_a_disc_does_not_have(ask: Scsi, drive: DvdDrive) -> None:
    ask.good(drive, scsi.cdb10.pack(scsi.SEEK_10, 0, 99, 0, 0, 0))
    assert ask.sense(drive, scsi.cdb10.pack(scsi.SEEK_10, 0, 100, 0, 0, 0)) == scsi.LBA_OUT_OF_RANGE
    ask.good(drive, bytes((0x52, 0, 0, 0, 0, 99, 0, 0, 36, 0)), 36)
    for cdb in (
        bytes((0x52, 0, 0, 0, 0, 100, 0, 0, 36, 0)),  # a track that begins beyond the end
        bytes((0x52, 2, 0, 0, 0, 1, 0, 0, 36, 0)),  # a session
        bytes((0x51, 1)) + bytes(6) + bytes((34, 0)),
    ):
        assert ask.sense(drive, cdb, 64) == scsi.INVALID_FIELD_IN_CDB
    # READ TOC's format was in the last byte once.
    session = ask.good(drive, bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 12, 0x40)), 12)
    assert session == ask.good(drive, bytes((0x43, 0, 1, 0, 0, 0, 0, 0, 12, 0)), 12)


def test_a_reset_gives_the_medium_free(ask: Scsi, drive: DvdDrive) -> None:
    ask.good(drive, bytes((0x1E, 0, 0, 0, 1, 0)))
    done: list[bool] = []
    drive.reset(lambda: done.append(drive.locked))
    ask.loop.run()
    assert done == [False]
    assert ask.sense(drive, READY) == scsi.DEVICE_RESET
    empty = DvdDrive(None, "s")
    empty.reset(lambda: done.append(True))
    assert done == [False, True]
