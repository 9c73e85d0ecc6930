"""Frames for tests, with checksums by a sum written out word for word, by none of `hvkvm.net`'s code."""

from __future__ import annotations

import socket
import struct

OURS = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")
BROADCAST = b"\xff" * 6


def word_sum(data):
    """The folded sum of 16-bit words, one by one."""
    data = bytes(data) + bytes(len(data) % 2)
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | data[at + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(source, target, protocol, length):
    return source + target + struct.pack(">II", length, protocol)


def ethernet(target, source, kind, payload, vlan=None):
    tag = b"" if vlan is None else struct.pack(">HH", 0x8100, vlan)
    return target + source + tag + struct.pack(">H", kind) + payload


def ipv4(source, target, protocol, payload, *, identity=1, options=b""):
    source, target = socket.inet_aton(source), socket.inet_aton(target)
    length = 20 + len(options)
    header = (
        struct.pack(
            ">BBHHHBBH4s4s",
            0x40 | length // 4,
            0,
            length + len(payload),
            identity,
            0x4000,
            64,
            protocol,
            0,
            source,
            target,
        )
        + options
    )
    return header[:10] + struct.pack(">H", 0xFFFF ^ word_sum(header)) + header[12:] + payload


def ipv6(source, target, protocol, payload):
    source, target = (socket.inet_pton(socket.AF_INET6, a) for a in (source, target))
    return struct.pack(">IHBB16s16s", 6 << 28, len(payload), protocol, 64, source, target) + payload


def addresses(source, target):
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    return socket.inet_pton(family, source), socket.inet_pton(family, target)


def udp(source, target, sport, dport, data, *, partial=False):
    """A UDP packet; with `partial`, its checksum is the pseudo-header's sum."""
    length = 8 + len(data)
    head = pseudo(*addresses(source, target), 17, length)
    packet = struct.pack(">HHHH", sport, dport, length, 0) + data
    check = word_sum(head) if partial else 0xFFFF ^ word_sum(head + packet) or 0xFFFF
    return packet[:6] + struct.pack(">H", check) + packet[8:]


def tcp(source, target, sport, dport, sequence, flags, data, *, partial=False, options=b""):
    length = 20 + len(options) + len(data)
    head = pseudo(*addresses(source, target), 6, length)
    offset = (20 + len(options)) // 4 << 4
    packet = struct.pack(">HHIIBBHHH", sport, dport, sequence, 7, offset, flags, 512, 0, 0) + options + data
    check = word_sum(head) if partial else 0xFFFF ^ word_sum(head + packet)
    return packet[:16] + struct.pack(">H", check) + packet[18:]


def arp_request(mac, ip, wanted):
    body = struct.pack(
        ">HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, mac, socket.inet_aton(ip), bytes(6), socket.inet_aton(wanted)
    )
    return ethernet(BROADCAST, mac, 0x806, body)


def is_arp_reply(frame):
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x02"
