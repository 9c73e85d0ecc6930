"""The Wireshark dissector of recordings, in Lua: tables made of our layouts, and code that reads by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvkvm.abi import hvsock
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.device_layouts import HVSOCK, PROTOCOLS, Protocol
from hvkvm.abi.layout import MAX_REPEATS, Layout, Names, every, layout, of_struct
from hvkvm.record.words import PACKET_TYPES

_CODE = Path(__file__).with_name("dissector.lua")
_KINDS = {"B": "uint8", "H": "uint16", "I": "uint32", "Q": "uint64", "b": "int8"}

_DESCRIPTOR = layout(
    "vmpacket_descriptor",
    "type:H offset8:H len8:H flags:H trans_id:Q",
    names={"type": PACKET_TYPES},
)


def message_layouts() -> dict[int, Layout]:
    """The wire table's rows as layouts: what is behind the header, by message type.

    What newer versions append is there in full, or not at all.
    """
    found = {}
    for kind in wire.KINDS.values():
        then: Layout | None = None
        for extension in reversed(kind.extensions):
            then = of_struct(kind.name, extension.names, extension.layout, then, optional=True)
        found[kind.type] = of_struct(kind.name, kind.names, kind.layout, then)
    return found


def dissector() -> str:
    """The whole script."""
    messages = message_layouts()
    roots: list[tuple[str, Layout]] = [("packet", _DESCRIPTOR)]
    roots += [("message", row) for row in messages.values()]
    for protocol in (*PROTOCOLS.values(), HVSOCK):
        if protocol.payload is not None:
            roots.append((protocol.name, protocol.payload))
        if protocol.pointed is not None:
            roots.append((protocol.name, protocol.pointed))
    numbers: dict[int, int] = {}
    rows: list[tuple[str, Layout]] = []
    for area, root in roots:
        for row in every(root):
            if id(row) not in numbers:
                rows.append((area, row))
                numbers[id(row)] = len(rows)
    lines = [
        "-- Made by: hvkvm explain --wireshark",
        f"local MAX_REPEATS = {MAX_REPEATS}",
        "local LAYOUTS = {",
        *(f"  {_layout(area, row, numbers)}," for area, row in rows),
        "}",
        f"local DESCRIPTOR = {numbers[id(_DESCRIPTOR)]}",
        f"local PACKET_TYPES = {_names(PACKET_TYPES)}",
        "local MESSAGES = {",
        *(f"  [{number}] = {numbers[id(row)]}," for number, row in messages.items()),
        "}",
        "local PROTOCOLS = {",
        *(f'  ["{guid.hex()}"] = {_protocol(one, numbers)},' for guid, one in PROTOCOLS.items()),
        "}",
        f"local HVSOCK = {_protocol(HVSOCK, numbers)}",
        f'local HVSOCK_TAIL = "{hvsock.SERVICE_TEMPLATE[4:].hex()}"',
        "",
    ]
    return "\n".join(lines) + _CODE.read_text().rstrip("\n")


def _layout(area: str, row: Layout, numbers: dict[int, int]) -> str:
    filter_name = f"hvkvm.{area}.{row.name}".lower()
    parts = [f'name = "{row.name}"', f'filter = "{filter_name}"', f"size = {row.size}"]
    parts.append(f"fields = {{{', '.join(_fields(row))}}}")
    if row.repeats:
        parts.append("repeats = true")
    if row.optional:
        parts.append("optional = true")
    if row.switch:
        cases = ", ".join(f"[{value}] = {numbers[id(case)]}" for value, case in row.cases.items())
        parts += [f'switch = "{row.switch}"', f"cases = {{{cases}}}"]
    if row.then is not None:
        parts.append(f"next = {numbers[id(row.then)]}")
    return f"{{{', '.join(parts)}}}"


def _fields(row: Layout) -> Iterator[str]:
    for field in row.fields:
        kind = "bytes" if field.code[-1] == "s" else _KINDS[field.code[-1]]
        text = f'{{name = "{field.name}", kind = "{kind}", offset = {field.offset}, size = {field.size}'
        if field.code[-1] == "b":
            text += ", signed = true"
        if field.names:
            text += f", names = {_names(field.names)}"
        yield text + "}"


def _names(names: Names) -> str:
    return "{" + ", ".join(f'[{value}] = "{name}"' for value, name in names.items()) + "}"


def _protocol(one: Protocol, numbers: dict[int, int]) -> str:
    payload = "" if one.payload is None else f", payload = {numbers[id(one.payload)]}"
    pointed = "" if one.pointed is None else f", pointed = {numbers[id(one.pointed)]}"
    return f'{{name = "{one.name}"{payload}{pointed}}}'
