"""Which channel a received frame takes: Toeplitz hash of addresses and ports, and the guest's table.

A stream's packets all have the same hash, and the last ones are kept, so that a frame costs a look-up. Tables
would make each hash quick, but cost the loop 6 ms a key, and a guest may set one as often as it likes. Owner:
the I/O loop.
"""

from __future__ import annotations

from hvkvm.devices.synth.netvsp_offload import ETH_P_IP, ETH_P_IPV6
from hvkvm.net.checksum import IPPROTO_TCP, IPPROTO_UDP
from hvkvm.net.port import ETHERNET_BYTES

_IPV4_BYTES, _IPV6_BYTES = 20, 40
_KNOWN = 1024
"""Most hashes that are kept; then all are forgotten."""


class Toeplitz:
    """The hash with one key of 40 bytes."""

    __slots__ = ("_known", "_number", "key")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._number = int.from_bytes(key, "big")
        self._known: dict[bytes, int] = {}

    def hash(self, data: bytes) -> int:
        """Of at most 36 bytes, 32 bits."""
        found = self._known.get(data)
        if found is None:
            found = 0
            # Of each bit that is set, the 32 bits of the key that stand from its place on.
            first = len(self.key) * 8 - 32
            for at, byte in enumerate(data):
                window = self._number >> first - at * 8 - 7 & 0x7FFFFFFFFF
                for bit in range(8):
                    if byte >> bit & 1:
                        found ^= window >> bit
            found &= 0xFFFFFFFF
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[data] = found
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
