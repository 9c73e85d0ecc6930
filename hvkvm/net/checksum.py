"""The Internet checksum (RFC 1071) of bytes, and of TCP and UDP with their pseudo-header. No state, no I/O.

Python sums 16-bit words fastest as one big number: 2**16 is 1 modulo 65535, so that a number's remainder is
the sum of its 16-bit digits with the carries added in.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi.tcp import IPPROTO_TCP as IPPROTO_TCP

IPPROTO_UDP = 17

_length_protocol = Struct(">II")


def checksum(*parts: bytes | bytearray | memoryview) -> int:
    """The checksum of the parts in a row, each of an even number of bytes but the last."""
    total = 0
    for part in parts:
        number = int.from_bytes(part, "big")
        total += number << 8 if len(part) & 1 else number
    # The sum's ones' complement; a sum that is 0 modulo 65535 is 0xffff, unless all bytes are 0.
    return 0xFFFF - (total % 0xFFFF or (0xFFFF if total else 0))


def transport_checksum(addresses: bytes | memoryview, protocol: int, packet: bytes | bytearray) -> int:
    """That of a TCP or UDP packet whose checksum field is 0, between `addresses` (source, destination)."""
    found = checksum(addresses, _length_protocol.pack(len(packet), protocol), packet)
    return 0xFFFF if found == 0 and protocol == IPPROTO_UDP else found
