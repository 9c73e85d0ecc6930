"""Integration component messages: the framing that all of their packets have.

struct vmbuspipe_hdr, icmsg_hdr and icmsg_negotiate of include/linux/hyperv.h.
Layout only; anyone may import it. `parse` takes a guest's bytes and raises
nothing.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

ICMSGTYPE_NEGOTIATE = 0
ICMSGTYPE_HEARTBEAT = 1
ICMSGTYPE_KVPEXCHANGE = 2
ICMSGTYPE_SHUTDOWN = 3
ICMSGTYPE_TIMESYNC = 4
ICMSGTYPE_VSS = 5

ICMSGHDRFLAG_TRANSACTION = 1
ICMSGHDRFLAG_REQUEST = 2
ICMSGHDRFLAG_RESPONSE = 4

ICMSG_HDR = 28
"""Bytes of pipe header and message header together."""

HV_S_OK = 0
HV_E_FAIL = 0x80004005
HV_S_CONT = 0x80070103
HV_ERROR_NOT_SUPPORTED = 0x80070032
HV_ERROR_BUSY = 0x800700AA
HV_ERROR_MACHINE_LOCKED = 0x800704F7
HV_ERROR_DEVICE_NOT_CONNECTED = 0x8007048F
HV_INVALIDARG = 0x80070057
HV_GUID_NOTFOUND = 0x80041002
HV_ERROR_ALREADY_EXISTS = 0x80070050
HV_ERROR_DISK_FULL = 0x80070070

_STATUS_TEXTS = {
    HV_S_OK: "done",
    HV_E_FAIL: "the guest failed",
    HV_S_CONT: "nothing there",
    HV_ERROR_NOT_SUPPORTED: "not supported",
    HV_ERROR_BUSY: "busy",
    HV_ERROR_MACHINE_LOCKED: "the guest is locked",
    HV_ERROR_DEVICE_NOT_CONNECTED: "no driver of the guest's is there",
    HV_INVALIDARG: "invalid argument",
    HV_GUID_NOTFOUND: "no such adapter",
    HV_ERROR_ALREADY_EXISTS: "already there",
    HV_ERROR_DISK_FULL: "the guest's disk is full",
}

SD_FLAG_FORCE = 1
SD_FLAG_REBOOT = 2
SD_FLAG_HIBERNATE = 4
shutdown_msg_data = Struct("<III2048s")
"""reason, timeout in seconds, flags, a text in UTF-16."""

ICTIMESYNCFLAG_SYNC = 1
ICTIMESYNCFLAG_SAMPLE = 2
ictimesync_data = Struct("<QQQB")
"""Before 4.0: parent time, child time, round trip, flags."""
ictimesync_ref_data = Struct("<QQBbB3x")
"""From 4.0: parent time, reference time, flags, leap flags, stratum."""
WLTIMEDELTA = 116444736000000000
"""100 ns units between 1601 and 1970."""

heartbeat_msg_data = Struct("<Q32x")
"""Sequence number."""

Version = tuple[int, int]
FRAME_VERSIONS: tuple[Version, ...] = ((1, 0), (3, 0))

_head = Struct("<IIHHHHHHIBBH")
_counts = Struct("<HHI")
_version = Struct("<HH")


def status_text(status: int, note: str = "") -> str:
    """What a guest's HRESULT says, in words where it is one of those that integration components use.

    `note` goes behind it, if there is more to say.
    """
    said = _STATUS_TEXTS.get(status) or f"error {status:#010x}"
    return f"{said}: {note}" if note else said


class IcMessage(NamedTuple):
    """One message: its type, the versions and status of its header, and what follows."""

    type: int
    status: int
    flags: int
    body: bytes


def build(
    kind: int, body: bytes, *, frame: Version = (0, 0), message: Version = (0, 0), transaction: int = 0
) -> bytes:
    """A request of the host, pipe header and all."""
    flags = ICMSGHDRFLAG_TRANSACTION | ICMSGHDRFLAG_REQUEST
    size = ICMSG_HDR - 8 + len(body)
    return _head.pack(1, size, *frame, kind, *message, len(body), 0, transaction & 0xFF, flags, 0) + body


def parse(payload: bytes) -> IcMessage | None:
    """The message of a guest, None for less than its headers. `body` may have padding behind it."""
    if len(payload) < ICMSG_HDR:
        return None
    fields = _head.unpack_from(payload)
    return IcMessage(fields[4], fields[8], fields[10], payload[ICMSG_HDR:])


def negotiate_body(frames: tuple[Version, ...], messages: tuple[Version, ...]) -> bytes:
    """What the host can speak: struct icmsg_negotiate."""
    pairs = b"".join(_version.pack(*version) for version in frames + messages)
    return _counts.pack(len(frames), len(messages), 0) + pairs


def parse_negotiated(body: bytes) -> tuple[Version, Version] | None:
    """The guest's choice of frame and message version; None when it found none, or says nonsense."""
    if len(body) < _counts.size + 2 * _version.size:
        return None
    frames, messages, _reserved = _counts.unpack_from(body)
    if (frames, messages) != (1, 1):
        return None
    frame = _version.unpack_from(body, _counts.size)
    message = _version.unpack_from(body, _counts.size + _version.size)
    return (frame[0], frame[1]), (message[0], message[1])
