"""TCP over IP over Ethernet: where fields stand (RFC 791, 7323, 8200, 9293). No state, no I/O.

`at` is where the TCP header of a frame begins, as `tcp_header` finds it. All numbers are big endian.
"""

from __future__ import annotations

IPPROTO_TCP = 6
FIN, SYN, RST, PSH, ACK, CWR = 0x01, 0x02, 0x04, 0x08, 0x10, 0x80
TCP_BYTES = 20
"""Of a header without options."""
DEEPEST_BYTES = 14 + 40 + TCP_BYTES
"""So many bytes of a frame hold the headers of either IP version, TCP's without its options."""

SEQUENCE, ACKNOWLEDGEMENT, DATA_OFFSET, FLAGS, WINDOW, CHECKSUM = 4, 8, 12, 13, 14, 16

_IPV4_AT, _IPV6_AT = 14 + 20, 14 + 40
_END_OF_OPTIONS, _NO_OPERATION, _SEGMENT_SIZE, _WINDOW_SCALE = 0, 1, 2, 3
MAX_WINDOW_SCALE = 14
DEFAULT_SEGMENT_BYTES = 536


def tcp_header(frame: bytes | memoryview) -> int:
    """Where the TCP header begins; 0 where there is none whole, or behind options of IP or in a fragment."""
    size = len(frame)
    if size < _IPV4_AT + TCP_BYTES:
        return 0
    if frame[12] == 0x08 and frame[13] == 0x00:
        whole = not (frame[20] & 0x3F or frame[21])
        return _IPV4_AT if frame[14] == 0x45 and frame[23] == IPPROTO_TCP and whole else 0
    if frame[12] == 0x86 and frame[13] == 0xDD:
        return _IPV6_AT if size >= DEEPEST_BYTES and frame[20] == IPPROTO_TCP else 0
    return 0


def address_bytes(at: int) -> int:
    """The size of an IP address in a frame whose TCP header `tcp_header` found there."""
    return 4 if at == _IPV4_AT else 16


def sender_and_receiver(frame: bytes | memoryview, at: int) -> bytes:
    """Both addresses and both ports, as they stand in the frame."""
    return bytes(frame[at - 2 * address_bytes(at) : at + 4])


def receiver_and_sender(frame: bytes | memoryview, at: int) -> bytes:
    """The same in the order of the frames that go the other way."""
    size = address_bytes(at)
    middle = at - size
    return b"".join(
        (frame[middle:at], frame[middle - size : middle], frame[at + 2 : at + 4], frame[at : at + 2])
    )


def window_scale(frame: bytes | memoryview, at: int) -> int | None:
    """The shift that a SYN offers for its sender's windows (RFC 7323); None where it offers none."""
    option = _option(frame, at, _WINDOW_SCALE, 3)
    return min(frame[option + 2], MAX_WINDOW_SCALE) if option else None


def segment_size(frame: bytes | memoryview, at: int) -> int:
    """The most bytes of data in a segment that a SYN asks for (RFC 9293, 3.7.1)."""
    option = _option(frame, at, _SEGMENT_SIZE, 4)
    return frame[option + 2] << 8 | frame[option + 3] if option else DEFAULT_SEGMENT_BYTES


def _option(frame: bytes | memoryview, at: int, kind: int, size: int) -> int:
    """Where the option `kind` of `size` bytes begins; 0 if it is not there, or not whole."""
    end = min(at + (frame[at + DATA_OFFSET] >> 4) * 4, len(frame))
    option = at + TCP_BYTES
    while option + 1 < end and frame[option] != _END_OF_OPTIONS:
        if frame[option] == _NO_OPERATION:
            option += 1
        elif frame[option] == kind:
            return option if option + size <= end else 0
        else:
            option += max(frame[option + 1], 2)
    return 0


def set_window(frame: memoryview, at: int, window: int) -> None:
    """Write another window field, and have the checksum follow (RFC 1624, equation 3)."""
    field = slice(at + WINDOW, at + WINDOW + 2)
    checksum = slice(at + CHECKSUM, at + CHECKSUM + 2)
    before = int.from_bytes(frame[field], "big")
    total = (int.from_bytes(frame[checksum], "big") ^ 0xFFFF) + (before ^ 0xFFFF) + window
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    frame[field] = window.to_bytes(2, "big")
    frame[checksum] = (total ^ 0xFFFF).to_bytes(2, "big")
