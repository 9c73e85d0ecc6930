"""Storage over VMBus (VSTOR): packets between a guest's storvsc and the host's storvsp.

Why: the device, its tests and what explains a trace must mean the same bytes. Names
are those of Linux's drivers/scsi/storvsc_drv.c. Everything is a 64-byte vstor_packet,
as payload of a ring's packet; the data of a request stands in front of it as a
GPA-direct range. Integers are little-endian. Layout only; anyone may import it.

`parse` takes a guest's bytes, already copied: None for what is no packet.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi.vmbus import guid
from hvkvm.tuples import NamedTuple

SCSI = guid("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
"""The interface type of a SCSI controller."""

PACKET_BYTES = 64

COMPLETE_IO = 1
REMOVE_DEVICE = 2
EXECUTE_SRB = 3
RESET_LUN = 4
RESET_ADAPTER = 5
RESET_BUS = 6
BEGIN_INITIALIZATION = 7
END_INITIALIZATION = 8
QUERY_PROTOCOL_VERSION = 9
QUERY_PROPERTIES = 10
ENUMERATE_BUS = 11
FCHBA_DATA = 12
CREATE_SUB_CHANNELS = 13
EVENT_NOTIFICATION = 14

OPERATIONS = {
    COMPLETE_IO: "COMPLETE_IO",
    REMOVE_DEVICE: "REMOVE_DEVICE",
    EXECUTE_SRB: "EXECUTE_SRB",
    RESET_LUN: "RESET_LUN",
    RESET_ADAPTER: "RESET_ADAPTER",
    RESET_BUS: "RESET_BUS",
    BEGIN_INITIALIZATION: "BEGIN_INITIALIZATION",
    END_INITIALIZATION: "END_INITIALIZATION",
    QUERY_PROTOCOL_VERSION: "QUERY_PROTOCOL_VERSION",
    QUERY_PROPERTIES: "QUERY_PROPERTIES",
    ENUMERATE_BUS: "ENUMERATE_BUS",
    FCHBA_DATA: "FCHBA_DATA",
    CREATE_SUB_CHANNELS: "CREATE_SUB_CHANNELS",
    EVENT_NOTIFICATION: "EVENT_NOTIFICATION",
}

VERSION_WIN8 = 0x0501
VERSION_WIN8_1 = 0x0600
VERSION_WIN10 = 0x0602
VERSIONS = (VERSION_WIN8, VERSION_WIN8_1, VERSION_WIN10)

STATUS_SUCCESS = 0
STATUS_INVALID_PARAMETER = 0xC000000D
STATUS_INVALID_DEVICE_REQUEST = 0xC0000010
STATUS_REVISION_MISMATCH = 0xC0000059
STATUS_INVALID_DEVICE_STATE = 0xC0000184

MULTI_CHANNEL = 1
"""Flag of QUERY_PROPERTIES: sub-channels may be asked for."""

SRB_STATUS_SUCCESS = 0x01
SRB_STATUS_ABORTED = 0x02
SRB_STATUS_ERROR = 0x04
SRB_STATUS_BUSY = 0x05
SRB_STATUS_INVALID_REQUEST = 0x06
SRB_STATUS_INVALID_LUN = 0x20
SRB_STATUS_AUTOSENSE_VALID = 0x80

WRITE_TYPE = 0
READ_TYPE = 1
UNKNOWN_TYPE = 2
"""Values of `data_in`: to the device, from it, no data."""

SENSE_BYTES = 20
"""Room for sense data in a completion."""

MAX_PATHS = 8
MAX_TARGETS = 2
MAX_LUNS = 255
"""What Linux scans of a controller."""

_head = Struct("<III")
"""operation, flags, status."""
_version = Struct("<HH")
_properties = Struct("<IHHIIQ")
"""reserved, max_channel_cnt, reserved, flags, max_transfer_bytes, reserved."""
_count = Struct("<H")
_request = Struct("<HBBBBBBBBBBI16s")
"""length, srb_status, scsi_status, port, path, target, lun, cdb_length, sense_info_length, data_in,
reserved, data_transfer_length, CDB."""
_completion = Struct("<IIIHBBBBBBBBBBI20s16x")
"""The head, then vmscsi_request with sense data in place of the CDB."""
_BODY = _head.size
CDB_OFFSET = _BODY + 16
"""Where the CDB stands in a packet."""


_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time that calling its class takes."""


class Srb(NamedTuple):
    """A SCSI request of the guest's (vmscsi_request): each field is the guest's word."""

    path: int
    target: int
    lun: int
    cdb: bytes
    data_in: int
    length: int
    """Bytes of data that the guest expects to be moved."""
    port: int


def operation_of(payload: bytes) -> int:
    """Which operation a packet asks for; -1 if it is too short to be one."""
    return int.from_bytes(payload[:4], "little") if len(payload) >= PACKET_BYTES else -1


def parse_srb(payload: bytes) -> Srb | None:
    """The request of an EXECUTE_SRB of PACKET_BYTES; None if its CDB has no length that there is."""
    (
        _length,
        _srb_status,
        _scsi_status,
        port,
        path,
        target,
        lun,
        cdb_length,
        _sense_length,
        data_in,
        _reserved,
        length,
        cdb,
    ) = _request.unpack_from(payload, _BODY)
    if not 1 <= cdb_length <= len(cdb):
        return None
    return _tuple(Srb, (path, target, lun, cdb[:cdb_length], data_in, length, port))


class Address(NamedTuple):
    """Whom a RESET_LUN is for."""

    path: int
    target: int
    lun: int


def address_of(payload: bytes) -> Address:
    """Of a packet of PACKET_BYTES that carries a vmscsi_request."""
    return Address(*payload[17:20])


def request(srb: Srb) -> bytes:
    """An EXECUTE_SRB packet, as a guest sends it."""
    address = (srb.port, srb.path, srb.target, srb.lun)
    body = _request.pack(52, 0, 0, *address, len(srb.cdb), SENSE_BYTES, srb.data_in, 0, srb.length, srb.cdb)
    return (_head.pack(EXECUTE_SRB, 1, 0) + body).ljust(PACKET_BYTES, b"\0")


def completion(payload: bytes, srb_status: int, scsi_status: int, moved: int, sense: bytes = b"") -> bytes:
    """The COMPLETE_IO for the EXECUTE_SRB `payload`, of which it repeats the address."""
    return _completion.pack(
        COMPLETE_IO,
        0,
        STATUS_SUCCESS,
        52,
        srb_status,
        scsi_status,
        payload[16],
        payload[17],
        payload[18],
        payload[19],
        payload[20],
        len(sense),
        payload[22],
        0,
        moved,
        sense,
    )


def plain_completion(port: int, target: int, lun: int, cdb_length: int, data_in: int, moved: int) -> bytes:
    """As `completion` of a request on path 0 that went well, by its own fields."""
    return _completion.pack(
        COMPLETE_IO, 0, STATUS_SUCCESS, 52, SRB_STATUS_SUCCESS, 0,
        port, 0, target, lun, cdb_length, 0, data_in, 0, moved, b"",
    )  # fmt: skip


def answer(status: int, body: bytes = b"") -> bytes:
    """The COMPLETE_IO for anything else."""
    return (_head.pack(COMPLETE_IO, 0, status) + body).ljust(PACKET_BYTES, b"\0")


def notice(operation: int) -> bytes:
    """A packet that the host sends by itself: ENUMERATE_BUS or REMOVE_DEVICE."""
    return _head.pack(operation, 0, 0).ljust(PACKET_BYTES, b"\0")


def ask(operation: int, body: bytes = b"") -> bytes:
    """A packet that a guest sends, but for EXECUTE_SRB."""
    return (_head.pack(operation, 1, 0) + body).ljust(PACKET_BYTES, b"\0")


def version_of(payload: bytes) -> int:
    """The version that a QUERY_PROTOCOL_VERSION asks for."""
    version: int = _version.unpack_from(payload, _BODY)[0]
    return version


def version_body(version: int) -> bytes:
    """For a guest's QUERY_PROTOCOL_VERSION."""
    return _version.pack(version, 0)


def count_of(payload: bytes) -> int:
    """How many sub-channels a CREATE_SUB_CHANNELS asks for."""
    count: int = _count.unpack_from(payload, _BODY)[0]
    return count


def count_body(count: int) -> bytes:
    """For a guest's CREATE_SUB_CHANNELS."""
    return _count.pack(count)


def properties_body(sub_channels: int, max_transfer_bytes: int) -> bytes:
    """What QUERY_PROPERTIES is answered."""
    return _properties.pack(0, sub_channels, 0, MULTI_CHANNEL if sub_channels else 0, max_transfer_bytes, 0)


class Answer(NamedTuple):
    """A completion as a guest reads it."""

    operation: int
    status: int
    srb_status: int
    scsi_status: int
    moved: int
    sense: bytes


def parse_answer(payload: bytes) -> Answer:
    """The completion of an EXECUTE_SRB."""
    fields = _completion.unpack_from(payload)
    return Answer(fields[0], fields[2], fields[4], fields[5], fields[14], fields[15][: fields[11]])
