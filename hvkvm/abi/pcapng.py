"""pcapng: the blocks of a capture file, made and read. Layout only, no I/O: bytes in, bytes out.

For captures of frames and recordings of a bus alike; Wireshark, tcpdump and their
like read both. After draft-ietf-opsawg-pcapng. `blocks` takes a hostile file's
bytes: ValueError for what is not valid, with the place.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO

from hvkvm.tuples import NamedTuple

SECTION_HEADER = 0x0A0D0D0A
INTERFACE_DESCRIPTION = 1
ENHANCED_PACKET = 6

LINKTYPE_ETHERNET = 1
LINKTYPE_USER0 = 147

_BYTE_ORDER = 0x1A2B3C4D
_OPT_END = 0
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL = 2, 3, 9
_SHB_USERAPPL = 4
_EPB_FLAGS = 2
INBOUND, OUTBOUND = 1, 2
"""Directions of a packet, as epb_flags has them, seen from the interface's owner."""

MAX_BLOCK_BYTES = 16 << 20
"""Of a block that is read; what claims more is no file of ours."""

_block = Struct("<II")
_section = Struct("<IHHq")
_interface = Struct("<HHI")
_packet = Struct("<IIIII")
_option = Struct("<HH")
_flags = Struct("<HHIHH")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _options(*options: tuple[int, bytes]) -> bytes:
    found = b"".join(_option.pack(code, len(value)) + _padded(value) for code, value in options)
    return found + _option.pack(_OPT_END, 0) if found else b""


def _made(kind: int, body: bytes) -> bytes:
    total = 12 + len(body)
    return _block.pack(kind, total) + body + total.to_bytes(4, "little")


def section_header(application: str) -> bytes:
    """The first block of a file."""
    body = _section.pack(_BYTE_ORDER, 1, 0, -1)
    return _made(SECTION_HEADER, body + _options((_SHB_USERAPPL, application.encode())))


def interface_description(link_type: int, name: str, *, description: str = "", snap_length: int = 0) -> bytes:
    """An interface; they are numbered from 0 in the order in which they come. Times are nanoseconds."""
    options = [(_IF_NAME, name.encode()), (_IF_TSRESOL, b"\x09")]
    if description:
        options.insert(1, (_IF_DESCRIPTION, description.encode()))
    return _made(INTERFACE_DESCRIPTION, _interface.pack(link_type, 0, snap_length) + _options(*options))


def around_packet(
    interface: int, nanoseconds: int, kept: int, *, length: int | None = None, direction: int = 0
) -> tuple[bytes, bytes]:
    """What stands before and behind a packet's `kept` bytes: for who writes them from where they are.

    The packet was captured so many `nanoseconds` after 1970; `length` is what it had if it was cut.
    """
    behind = bytes(-kept % 4)
    if direction:
        behind += _flags.pack(_EPB_FLAGS, 4, direction, _OPT_END, 0)
    total = 12 + _packet.size + kept + len(behind)
    before = _packet.pack(
        interface,
        nanoseconds >> 32 & 0xFFFFFFFF,
        nanoseconds & 0xFFFFFFFF,
        kept,
        kept if length is None else length,
    )
    return _block.pack(ENHANCED_PACKET, total) + before, behind + total.to_bytes(4, "little")


def enhanced_packet(
    interface: int, nanoseconds: int, data: bytes, *, length: int | None = None, direction: int = 0
) -> bytes:
    """A packet's whole block: see `around_packet`."""
    before, behind = around_packet(interface, nanoseconds, len(data), length=length, direction=direction)
    return before + data + behind


class Interface(NamedTuple):
    """An interface of a file."""

    link_type: int
    name: str


class CapturedPacket(NamedTuple):
    """A packet of a file; `nanoseconds` after 1970."""

    interface: Interface
    nanoseconds: int
    data: bytes
    length: int


def read(file: BinaryIO) -> Iterator[CapturedPacket]:
    """The packets of a little-endian file whose times are nanoseconds, as written here. ValueError.

    A file that ends within a block, because its writer did, ends with the block before.
    """
    interfaces: list[Interface] = []
    first = True
    for kind, body in _blocks(file):
        if first and kind != SECTION_HEADER:
            raise ValueError("it does not begin as a pcapng file does")
        first = False
        if kind == SECTION_HEADER:
            if len(body) < 4 or int.from_bytes(body[:4], "little") != _BYTE_ORDER:
                raise ValueError("a pcapng file of another byte order")
            interfaces = []
        elif kind == INTERFACE_DESCRIPTION and len(body) >= _interface.size:
            link_type, _reserved, _snap = _interface.unpack_from(body)
            interfaces.append(Interface(link_type, _name(body[_interface.size :])))
        elif kind == ENHANCED_PACKET and len(body) >= _packet.size:
            number, high, low, kept, length = _packet.unpack_from(body)
            data = body[_packet.size : _packet.size + kept]
            if number >= len(interfaces) or len(data) < kept:
                raise ValueError("a packet of an interface that is not described, or cut short")
            yield CapturedPacket(interfaces[number], high << 32 | low, data, length)
    if first:
        raise ValueError("it is empty")


def _blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    while len(head := file.read(8)) == 8:
        kind, total = _block.unpack(head)
        if total < 12 or total % 4 or total > MAX_BLOCK_BYTES:
            raise ValueError(f"a block of {total} bytes; it is no pcapng file, or damaged")
        rest = file.read(total - 8)
        if len(rest) < total - 8:
            return
        yield kind, rest[:-4]


def _name(options: bytes) -> str:
    at = 0
    while at + _option.size <= len(options):
        code, size = _option.unpack_from(options, at)
        value = options[at + 4 : at + 4 + size]
        if code == _IF_NAME:
            return value.decode(errors="replace")
        if code == _OPT_END:
            break
        at += 4 + size + -size % 4
    return ""
