"""What a DVD drive tells of itself and of its medium: MMC-6's data, built from the size of the medium.

Bytes only; no state.
"""

from __future__ import annotations

SECTOR = 2048

PROFILE_NONE = 0x0000
PROFILE_CD_ROM = 0x0008
PROFILE_DVD_ROM = 0x0010
MAX_CD_BLOCKS = 450_000
"""A CD holds no more (100 minutes): a larger image is shown as a DVD."""

CLASS_MEDIA = 4
EVENT_EJECT_REQUEST = 1
EVENT_NEW_MEDIA = 2
EVENT_MEDIA_REMOVAL = 3

_LEAD_OUT = 0xAA
_DATA_TRACK = 0x14
"""ADR 1, control 4: a data track."""
_DVD_FIRST_SECTOR = 0x30000

MODE_PAGES = {
    0x01: bytes((0x80, 3, 0, 0, 0, 0, 0, 0, 0, 0)),
    0x0E: bytes((4, 0, 0, 0, 0, 0x4B, 1, 0xFF, 2, 0xFF, 0, 0, 0, 0)),
    # Reads CD-R, CD-RW, DVD-ROM, -R and -RAM; mode 2 forms, multi-session; a tray that locks and ejects.
    0x2A: bytes((0x3B, 0, 0x71, 0x60, 0x29, 0, 0x1B, 0x90, 0, 2, 2, 0, 0x1B, 0x90, 0, 0, 0, 0, 0, 0)),
}


def profile_of(blocks: int) -> int:
    """The kind of medium that an image of so many sectors is shown as."""
    if not blocks:
        return PROFILE_NONE
    return PROFILE_CD_ROM if blocks <= MAX_CD_BLOCKS else PROFILE_DVD_ROM


def _msf(lba: int) -> bytes:
    """Minute, second, frame of an address; the largest there is for one beyond."""
    frames = min(lba + 150, 255 * 4500 + 59 * 75 + 74)
    return bytes((0, frames // 4500, frames // 75 % 60, frames % 75))


def toc(form: int, msf: bool, track: int, blocks: int) -> bytes | None:
    """READ TOC data of one data track; None for a format or track that is not there."""

    def at(lba: int) -> bytes:
        return _msf(lba) if msf else lba.to_bytes(4, "big")

    if form == 0:
        if track > 1 and track != _LEAD_OUT:
            return None
        body = bytes((1, 1))
        if track <= 1:
            body += bytes((0, _DATA_TRACK, 1, 0)) + at(0)
        body += bytes((0, _DATA_TRACK, _LEAD_OUT, 0)) + at(blocks)
    elif form == 1:
        body = bytes((1, 1, 0, _DATA_TRACK, 1, 0)) + at(0)
    elif form == 2:
        body = bytes((1, 1))
        for point, where in (
            (0xA0, bytes((0, 1, 0, 0))),
            (0xA1, bytes((0, 1, 0, 0))),
            (0xA2, _msf(blocks)),
            (1, _msf(0)),
        ):
            body += bytes((1, _DATA_TRACK, 0, point, 0, 0, 0)) + where
    else:
        return None
    return len(body).to_bytes(2, "big") + body


def disc_information() -> bytes:
    """READ DISC INFORMATION: one complete session of one track."""
    body = bytearray(32)
    body[0] = 0x0E  # last session complete, disc finalized
    body[1] = body[2] = body[3] = body[4] = 1
    body[5] = 0x20  # unrestricted use
    body[14:22] = b"\xff" * 8  # no lead-in and lead-out to write
    return len(body).to_bytes(2, "big") + bytes(body)


def track_information(blocks: int) -> bytes:
    """READ TRACK INFORMATION of the one track."""
    body = bytearray(34)
    body[0] = body[1] = 1
    body[3] = 4  # data
    body[4] = 1  # mode 1
    body[22:26] = blocks.to_bytes(4, "big")
    return len(body).to_bytes(2, "big") + bytes(body)


def dvd_structure(form: int, blocks: int) -> bytes | None:
    """READ DVD STRUCTURE: physical format, copyright, manufacturing; None for another."""
    if form == 0x00:
        body = bytearray(2048)
        body[0] = 0x01  # DVD-ROM, version 1
        body[1] = 0x0F  # 12 cm, no rate given
        body[2] = 0x01  # one layer, embossed
        body[5:8] = _DVD_FIRST_SECTOR.to_bytes(3, "big")
        body[9:12] = min(_DVD_FIRST_SECTOR + blocks - 1, 0xFFFFFF).to_bytes(3, "big")
    elif form == 0x01:
        body = bytearray(4)  # not protected, all regions
    elif form == 0x04:
        body = bytearray(2048)
    else:
        return None
    return (len(body) + 2).to_bytes(2, "big") + b"\0\0" + bytes(body)


def _feature(
    code: int, version: int, *, current: bool, persistent: bool, data: bytes = b""
) -> tuple[int, bool, bytes]:
    flags = version << 2 | (2 if persistent else 0) | (1 if current else 0)
    return code, current, code.to_bytes(2, "big") + bytes((flags, len(data))) + data


def configuration(profile: int, kind: int, first: int, *, locked: bool) -> bytes:
    """GET CONFIGURATION: features from `first`; kind 0 all, 1 those in use, 2 only `first` itself."""
    profiles = b"".join(
        one.to_bytes(2, "big") + bytes((one == profile, 0)) for one in (PROFILE_DVD_ROM, PROFILE_CD_ROM)
    )
    cd, dvd = profile == PROFILE_CD_ROM, profile == PROFILE_DVD_ROM
    readable = SECTOR.to_bytes(4, "big") + (16 if dvd else 1).to_bytes(2, "big") + bytes(2)
    features = (
        _feature(0x0000, 0, current=True, persistent=True, data=profiles),
        _feature(
            0x0001, 2, current=True, persistent=True, data=bytes((0, 0, 0, 1, 1, 0, 0, 0))
        ),  # core: SCSI
        _feature(0x0002, 1, current=True, persistent=True, data=bytes((2, 0, 0, 0))),  # morphing
        # Removable medium: a tray that ejects and locks.
        _feature(0x0003, 0, current=True, persistent=True, data=bytes((0x29, 0, 0, 0))),
        _feature(0x0010, 0, current=cd or dvd, persistent=False, data=readable),
        _feature(0x001D, 0, current=cd, persistent=False),  # multi-read
        _feature(0x001E, 2, current=cd, persistent=False, data=bytes(4)),  # reads CDs
        _feature(0x001F, 1, current=dvd, persistent=False, data=bytes(4)),  # reads DVDs
        _feature(0x0100, 0, current=True, persistent=True),  # power management
        _feature(0x0105, 1, current=True, persistent=True, data=bytes(4)),  # timeouts
    )
    body = b"".join(
        data
        for code, current, data in features
        if (code == first if kind == 2 else code >= first and (current or kind == 0))
    )
    head = bytes(2) + profile.to_bytes(2, "big")
    return (len(head) + len(body)).to_bytes(4, "big") + head + body


def event_status(asked: int, event: int, status: int) -> bytes:
    """GET EVENT STATUS NOTIFICATION, polled: of the media class if it was asked for, or none."""
    supported = 1 << CLASS_MEDIA
    if not asked & supported:
        return bytes((0, 2, 0x80, supported))
    return bytes((0, 6, CLASS_MEDIA, supported, event, status, 0, 0))
