"""SCSI: operation codes, status, sense and the layouts of CDBs and parameter data.

After SPC-4, SBC-3 and MMC-6 of T10; names are those of include/scsi/scsi_proto.h of Linux. Integers are
big-endian. Layout only; anyone may import it.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

TEST_UNIT_READY = 0x00
REQUEST_SENSE = 0x03
READ_6 = 0x08
WRITE_6 = 0x0A
INQUIRY = 0x12
MODE_SELECT = 0x15
MODE_SENSE = 0x1A
START_STOP = 0x1B
SEND_DIAGNOSTIC = 0x1D
ALLOW_MEDIUM_REMOVAL = 0x1E
READ_CAPACITY = 0x25
READ_10 = 0x28
WRITE_10 = 0x2A
SEEK_10 = 0x2B
WRITE_VERIFY = 0x2E
VERIFY = 0x2F
SYNCHRONIZE_CACHE = 0x35
WRITE_SAME = 0x41
UNMAP = 0x42
READ_TOC = 0x43
GET_CONFIGURATION = 0x46
GET_EVENT_STATUS_NOTIFICATION = 0x4A
READ_DISC_INFO = 0x51
READ_TRACK_INFO = 0x52
MODE_SELECT_10 = 0x55
MODE_SENSE_10 = 0x5A
PERSISTENT_RESERVE_IN = 0x5E
PERSISTENT_RESERVE_OUT = 0x5F
READ_16 = 0x88
WRITE_16 = 0x8A
WRITE_VERIFY_16 = 0x8E
VERIFY_16 = 0x8F
SYNCHRONIZE_CACHE_16 = 0x91
WRITE_SAME_16 = 0x93
SERVICE_ACTION_IN_16 = 0x9E
SAI_READ_CAPACITY_16 = 0x10
REPORT_LUNS = 0xA0
READ_12 = 0xA8
WRITE_12 = 0xAA
READ_DVD_STRUCTURE = 0xAD
WRITE_VERIFY_12 = 0xAE
VERIFY_12 = 0xAF
SET_CD_SPEED = 0xBB
MECHANISM_STATUS = 0xBD

GROUP_BYTES = (6, 10, 10, 0, 16, 12, 0, 0)
"""Bytes of a CDB by the upper three bits of its operation code; 0: reserved or vendor specific."""

GOOD = 0x00
CHECK_CONDITION = 0x02
BUSY = 0x08

NO_SENSE = 0x0
NOT_READY = 0x2
MEDIUM_ERROR = 0x3
HARDWARE_ERROR = 0x4
ILLEGAL_REQUEST = 0x5
UNIT_ATTENTION = 0x6
DATA_PROTECT = 0x7
ABORTED_COMMAND = 0xB
MISCOMPARE = 0xE

TYPE_DISK = 0x00
TYPE_ROM = 0x05
NO_UNIT = 0x7F
"""The first byte of INQUIRY data for a logical unit that is not there."""


class Sense(NamedTuple):
    """Why a command failed: sense key, additional code and qualifier."""

    key: int
    asc: int
    ascq: int = 0

    def fixed(self, information: int | None = None) -> bytes:
        """Its 18 bytes in fixed format (SPC-4 4.5.3); `information` is the LBA that it is about."""
        valid = 0x80 if information is not None and information < 1 << 32 else 0
        return _fixed.pack(0x70 | valid, self.key, information or 0 if valid else 0, 10, self.asc, self.ascq)

    def descriptor(self) -> bytes:
        """Its 8 bytes in descriptor format, without descriptors."""
        return bytes((0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0))


_fixed = Struct(">BxBIB4xBB4x")
SENSE_BYTES = _fixed.size

NOTHING = Sense(NO_SENSE, 0)
NOT_READY_STOPPED = Sense(NOT_READY, 0x04, 0x02)
NO_MEDIUM = Sense(NOT_READY, 0x3A, 0x01)
NO_MEDIUM_TRAY_OPEN = Sense(NOT_READY, 0x3A, 0x02)
WRITE_ERROR = Sense(MEDIUM_ERROR, 0x0C)
UNRECOVERED_READ = Sense(MEDIUM_ERROR, 0x11)
INTERNAL_FAILURE = Sense(HARDWARE_ERROR, 0x44)
COMMUNICATION_FAILURE = Sense(HARDWARE_ERROR, 0x08)
PARAMETER_LIST_LENGTH = Sense(ILLEGAL_REQUEST, 0x1A)
INVALID_OPCODE = Sense(ILLEGAL_REQUEST, 0x20)
LBA_OUT_OF_RANGE = Sense(ILLEGAL_REQUEST, 0x21)
INVALID_FIELD_IN_CDB = Sense(ILLEGAL_REQUEST, 0x24)
INVALID_LUN = Sense(ILLEGAL_REQUEST, 0x25)
INVALID_FIELD_IN_PARAMETERS = Sense(ILLEGAL_REQUEST, 0x26)
SAVING_NOT_SUPPORTED = Sense(ILLEGAL_REQUEST, 0x39)
REMOVAL_PREVENTED = Sense(ILLEGAL_REQUEST, 0x53, 0x02)
INVALID_FOR_TRACK = Sense(ILLEGAL_REQUEST, 0x64)
MEDIUM_CHANGED = Sense(UNIT_ATTENTION, 0x28)
POWER_ON = Sense(UNIT_ATTENTION, 0x29)
DEVICE_RESET = Sense(UNIT_ATTENTION, 0x29, 0x03)
CAPACITY_CHANGED = Sense(UNIT_ATTENTION, 0x2A, 0x09)
LUNS_CHANGED = Sense(UNIT_ATTENTION, 0x3F, 0x0E)
WRITE_PROTECTED = Sense(DATA_PROTECT, 0x27)
SPACE_EXHAUSTED = Sense(DATA_PROTECT, 0x27, 0x07)
DATA_PHASE_ERROR = Sense(ABORTED_COMMAND, 0x4B)
COMMAND_CLEARED = Sense(ABORTED_COMMAND, 0x2F)
MISCOMPARED = Sense(MISCOMPARE, 0x1D)

cdb6 = Struct(">BBHBB")
"""Operation, upper LBA bits, LBA, length, control."""
cdb10 = Struct(">BBIBHB")
"""Operation, flags, LBA, group, length, control."""
cdb12 = Struct(">BBIIBB")
"""Operation, flags, LBA, length, group, control."""
cdb16 = Struct(">BBQIBB")
"""Operation, flags, LBA, length, group, control."""

capacity10 = Struct(">II")
capacity16 = Struct(">QIBBH16x")
"""Last LBA, sector size, protection, physical exponent, provisioning and lowest aligned LBA."""
unmap_head = Struct(">HH4x")
unmap_descriptor = Struct(">QI4x")

FUA = 0x08
PROTECT_MASK = 0xE0
NACA = 0x04
EVPD = 0x01


class Transfer(NamedTuple):
    """What the CDB of a command on blocks says."""

    lba: int
    blocks: int
    flags: int


def transfer_of(cdb: bytes) -> Transfer:
    """Of a CDB of its full length, whose operation is one on blocks."""
    group = cdb[0] >> 5
    if group == 0:
        _op, upper, lower, blocks, _control = cdb6.unpack_from(cdb)
        return Transfer((upper & 0x1F) << 16 | lower, blocks or 256, 0)
    if group == 4:
        _op, flags, lba, blocks, _group, _control = cdb16.unpack_from(cdb)
    elif group == 5:
        _op, flags, lba, blocks, _group, _control = cdb12.unpack_from(cdb)
    else:
        _op, flags, lba, _group, blocks, _control = cdb10.unpack_from(cdb)
    return Transfer(lba, blocks, flags)
