"""The NBD protocol: numbers and layouts. Integers are big-endian."""

from __future__ import annotations

from struct import Struct

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

greeting = Struct(">8s8sH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

option = Struct(">8sII")
"""IHAVEOPT, option, length of its data."""
option_reply = Struct(">QIII")
"""Magic, option, reply type, length of its data."""
OPT_ABORT = 2
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
REP_ACK = 1
REP_INFO = 3
REP_ERROR = 1 << 31
REP_ERRORS = {
    REP_ERROR + 1: "it does not know how",
    REP_ERROR + 2: "its policy forbids it",
    REP_ERROR + 3: "it finds the request invalid",
    REP_ERROR + 4: "its platform cannot",
    REP_ERROR + 5: "it wants TLS, which is not spoken here; serve it on a Unix socket without",
    REP_ERROR + 6: "it has no export of that name",
    REP_ERROR + 7: "it is shutting down",
    REP_ERROR + 8: "it wants to know of block sizes",
}
MAX_REPLY = 64 << 10
"""Longer replies to options are none that a server has a reason for."""

INFO_EXPORT = 0
INFO_BLOCK_SIZE = 3
info_export = Struct(">HQH")
"""Type, size, transmission flags."""
info_block_size = Struct(">HIII")
"""Type, minimum, preferred and maximum size."""

HAS_FLAGS = 1
READ_ONLY = 2
SEND_FLUSH = 4
SEND_FUA = 8
SEND_TRIM = 32
SEND_WRITE_ZEROES = 64

request = Struct(">IHHQQI")
"""Magic, flags, type, cookie, offset, length."""
CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6
CMD_FLAG_FUA = 1
CMD_FLAG_NO_HOLE = 2

simple_reply = Struct(">IIQ")
"""Magic, error, cookie."""
structured_head = Struct(">IHHQ")
"""Magic, flags, type, cookie; the length follows."""
REPLY_FLAG_DONE = 1
REPLY_NONE = 0
REPLY_OFFSET_DATA = 1
REPLY_OFFSET_HOLE = 2
REPLY_IS_ERROR = 1 << 15
offset_hole = Struct(">QI")
error_chunk = Struct(">IH")
"""Error, length of a message."""

MAX_PAYLOAD = 32 << 20
"""What every server takes in one request, unless it says less."""
MAX_ERROR_TEXT = 4096

EIO = 5
ERRNOS = frozenset((1, EIO, 12, 22, 28, 75, 95, 108))
"""Errors of the protocol, which are Linux's numbers: EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP,
ESHUTDOWN. Others count as EIO."""
