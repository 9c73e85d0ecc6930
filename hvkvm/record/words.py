"""VMBus traffic in words: one line a message or packet, with the names of the wire tables.

Takes hostile bytes: raises nothing, and a line is of bounded length. Any thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from hvkvm.abi import ring as abi
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.device_layouts import protocol_of
from hvkvm.abi.layout import Decoded, Value, decode
from hvkvm.abi.vmbus import GUID_BYTES, guid_text
from hvkvm.tuples import NamedTuple

MAX_HEX = 32
"""Bytes shown of what has no meaning here."""

PACKET_TYPES = {
    abi.VM_PKT_DATA_INBAND: "VM_PKT_DATA_INBAND",
    abi.VM_PKT_DATA_USING_XFER_PAGES: "VM_PKT_DATA_USING_XFER_PAGES",
    abi.VM_PKT_DATA_USING_GPADL: "VM_PKT_DATA_USING_GPADL",
    abi.VM_PKT_DATA_USING_GPA_DIRECT: "VM_PKT_DATA_USING_GPA_DIRECT",
    abi.VM_PKT_CANCEL_REQUEST: "VM_PKT_CANCEL_REQUEST",
    abi.VM_PKT_COMP: "VM_PKT_COMP",
}


class Framed(NamedTuple):
    """A packet found in a ring's bytes: its own bytes without the trailer, as many as were kept."""

    type: int
    flags: int
    trans_id: int
    header: bytes
    payload: bytes
    size: int
    """Bytes that its descriptor claims."""
    raw: bytes = b""
    """All of it, from the descriptor on."""

    @property
    def cut(self) -> bool:
        """Whether bytes of it are missing."""
        return abi.DESCRIPTOR_BYTES + len(self.header) + len(self.payload) < self.size


def arrow(to_host: bool) -> str:
    """The direction, for the beginning of a line."""
    return "guest>" if to_host else " host>"


def packets(data: bytes) -> Iterator[Framed | str]:
    """The packets in a ring's bytes; a string, the last, says why no more can be told."""
    at = 0
    while at < len(data):
        if at + abi.DESCRIPTOR_BYTES > len(data):
            yield f"{len(data) - at} bytes are no whole descriptor"
            return
        kind, offset8, len8, flags, trans_id = abi.descriptor.unpack_from(data, at)
        total, offset = len8 * 8, offset8 * 8
        if not abi.DESCRIPTOR_BYTES <= offset <= total:
            yield f"a descriptor of {total} bytes with data at {offset}"
            return
        body = data[at : at + total]
        yield Framed(kind, flags, trans_id, body[abi.DESCRIPTOR_BYTES : offset], body[offset:], total, body)
        at += total + abi.TRAILER_BYTES


def message(payload: bytes) -> str:
    """A VMBus control message, by the wire table."""
    found = wire.parse(payload)
    if found is None:
        number = wire.message_type(payload)
        kind = None if number is None else wire.KINDS.get(number)
        if kind is not None and len(payload) < kind.size:
            return f"{kind.name} has {kind.size} bytes, and here are {_hex(payload)}"
        return f"no message of the table: {'' if number is None else f'type {number}, '}{_hex(payload)}"
    return wire.describe(found)


def ring(interface: bytes, data: bytes, *, whole: bool = True) -> Iterator[str]:
    """A line for each packet in a ring's bytes. `whole` False: the end of `data` was not kept."""
    for found in packets(data):
        if isinstance(found, str):
            yield found if whole else "and more"
        else:
            yield packet(interface, found)


def packet(interface: bytes, found: Framed) -> str:
    """A packet of a channel of this interface type."""
    words = [PACKET_TYPES.get(found.type, f"type {found.type}")]
    if found.trans_id:
        words.append(f"trans_id={found.trans_id:#x}")
    if found.flags:
        words.append(f"flags={found.flags:#x}")
    if found.header:
        words.append(_header(found))
    # A completion may be empty, and says all by its transaction then.
    decoded = decode(found.payload, protocol_of(interface).payload if found.payload else None)
    words += fields(decoded)
    rest = found.payload[decoded.rest :]
    if any(rest):
        words.append(_hex(rest))
    if found.cut:
        words.append(f"cut, of {found.size} bytes")
    return " ".join(words)


def fields(decoded: Decoded) -> list[str]:
    """Each field that is not zero, or whose zero has a name, as name=value; the first always."""
    found = [
        f"{value.field.name}={shown(value)}"
        for index, value in enumerate(decoded.values)
        if index == 0 or _says_something(value)
    ]
    if decoded.short:
        found.append(f"({decoded.short} is cut short)")
    return found


def _says_something(value: Value) -> bool:
    if isinstance(value.value, bytes):
        return any(value.value)
    return value.value != 0 or 0 in value.field.names


def shown(value: Value) -> str:
    """A field's value, by its name where it has one."""
    raw = value.value
    if isinstance(raw, bytes):
        return guid_text(raw) if value.field.name.endswith("guid") and len(raw) == GUID_BYTES else _hex(raw)
    number = str(raw) if -10 < raw < 10 else f"{raw:#x}"
    return value.field.names.get(raw, number)


def _header(found: Framed) -> str:
    packet = abi.Packet(found.type, found.flags, found.trans_id, found.header, b"")
    if found.type == abi.VM_PKT_DATA_USING_GPA_DIRECT:
        ranges = abi.parse_gpa_direct(packet, 1 << 32)
        if ranges is not None:
            return f"[{sum(one.length for one in ranges)} bytes in {len(ranges)} ranges]"
    if found.type == abi.VM_PKT_DATA_USING_XFER_PAGES:
        set_id = int.from_bytes(found.header[:2], "little")
        spans = abi.parse_transfer_pages(packet, set_id, 1 << 32)
        if spans is not None:
            return f"[{sum(one.length for one in spans)} bytes in {len(spans)} ranges of set {set_id:#x}]"
    return f"[{len(found.header)} bytes of header]"


def _hex(raw: bytes) -> str:
    text = raw[:MAX_HEX].rstrip(b"\0").hex(" ", -4) or "0"
    return f"{len(raw)} bytes: {text}{'...' if len(raw) > MAX_HEX else ''}"
