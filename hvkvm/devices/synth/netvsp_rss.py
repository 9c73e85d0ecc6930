"""Which channel a received frame takes: Toeplitz hash of addresses and ports, and the guest's table.

Why a table of tables: the hash of a byte at a place is the same each time, so a frame costs a look-up and an
exclusive or for each byte. Pure; any thread.
"""

from __future__ import annotations

from hvkvm.devices.synth.netvsp_offload import ETH_P_IP, ETH_P_IPV6
from hvkvm.net.checksum import IPPROTO_TCP, IPPROTO_UDP
from hvkvm.net.port import ETHERNET_BYTES

_IPV4_BYTES, _IPV6_BYTES = 20, 40
_INPUT_BYTES = 36
"""Two IPv6 addresses and two ports."""


class Toeplitz:
    """The hash with one key of 40 bytes."""

    __slots__ = ("_tables", "key")

    def __init__(self, key: bytes) -> None:
        self.key = key
        number = int.from_bytes(key, "big")
        bits = len(key) * 8
        self._tables = []
        for at in range(_INPUT_BYTES):
            # The 32 bits of the key that stand from each bit of this byte on.
            windows = [number >> (bits - 32 - at * 8 - bit) & 0xFFFFFFFF for bit in range(8)]
            table = [0] * 256
            for value in range(1, 256):
                low = value & -value
                table[value] = table[value ^ low] ^ windows[8 - low.bit_length()]
            self._tables.append(table)

    def hash(self, data: bytes) -> int:
        """Of at most 36 bytes, 32 bits."""
        found = 0
        for table, byte in zip(self._tables, data, strict=False):
            found ^= table[byte]
        return found


def hash_input(front: bytes) -> bytes:
    """Addresses and ports of a frame without VLAN tag, of which `front` is the beginning; empty for none.

    Ports are part of it for TCP and UDP over IPv4 without options and IPv6 without extension headers, and
    not for fragments: all of a datagram takes one channel.
    """
    if len(front) < ETHERNET_BYTES + _IPV4_BYTES:
        return b""
    kind = front[12] << 8 | front[13]
    ip = ETHERNET_BYTES
    if kind == ETH_P_IP:
        found = front[ip + 12 : ip + 20]
        whole = front[ip] == 0x45 and not (front[ip + 6] & 0x3F or front[ip + 7])
        protocol, l4 = front[ip + 9], ip + _IPV4_BYTES
    elif kind == ETH_P_IPV6 and len(front) >= ip + _IPV6_BYTES:
        found = front[ip + 8 : ip + 40]
        whole = True
        protocol, l4 = front[ip + 6], ip + _IPV6_BYTES
    else:
        return b""
    if whole and protocol in (IPPROTO_TCP, IPPROTO_UDP) and len(front) >= l4 + 4:
        found += front[l4 : l4 + 4]
    return found
