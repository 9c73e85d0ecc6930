"""A recording as tshark shows it, and as our own tables read it: both as names of fields and their bytes."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

from hvkvm.abi import device_layouts
from hvkvm.abi.layout import Decoded, Layout, decode
from hvkvm.abi.record_format import Entry, Kind
from hvkvm.record.dissector import _DESCRIPTOR, dissector, message_layouts

Fields = list[tuple[str | None, str | None]]


def _tshark(path: Path, folder: Path, *more: str) -> str:
    script = folder / "hvkvm.lua"
    script.write_text(dissector())
    command = ["tshark", "-X", f"lua_script:{script}", "-r", str(path), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Lua" not in done.stderr, done.stderr
    return done.stdout


def columns(path: Path, folder: Path) -> str:
    """A line for each packet, as tshark prints it."""
    return _tshark(path, folder)


def dissected(path: Path, folder: Path, *, cut: bool = False) -> list[Fields]:
    """The fields of each packet that come from our layouts.

    AssertionError where one ends too early, unless it may be `cut`, and where one is malformed.
    """
    text = _tshark(path, folder, "-T", "pdml")
    assert cut or "hvkvm.short" not in text
    assert "_ws.lua.error" not in text
    return [
        [
            (field.get("name"), field.get("value"))
            for field in packet.iter("field")
            if (field.get("name") or "").count(".") == 3 and not (field.get("name") or "").startswith("_")
        ]
        for packet in ET.fromstring(text).iter("packet")
    ]


def fields_of(entry: Entry) -> list[tuple[str, bytes]]:
    """The filter names and bytes that Python's side of the tables finds."""
    if entry.kind is Kind.MESSAGE:
        body = entry.data[8:]
        return _named("message", body, decode(body, message_layouts()[entry.data[0]]))
    protocol = device_layouts.protocol_of(entry.interface)
    if entry.kind is Kind.POINTED:
        return _of_device(entry.data, protocol.pointed)
    if entry.kind is not Kind.PACKET:
        return []
    found = _named("packet", entry.data, decode(entry.data, _DESCRIPTOR))
    payload = entry.data[int.from_bytes(entry.data[2:4], "little") * 8 :]
    return found + (_of_device(payload, protocol.payload) if payload else [])


def _of_device(data: bytes, layout: Layout | None) -> list[tuple[str, bytes]]:
    if layout is None:
        return []
    # Rows that several devices share are the first one's.
    everyone = (*device_layouts.PROTOCOLS.values(), device_layouts.HVSOCK)
    owner = next(one for one in everyone if layout is one.payload or layout is one.pointed)
    return _named(owner.name, data, decode(data, layout))


def _named(area: str, data: bytes, decoded: Decoded) -> list[tuple[str, bytes]]:
    return [
        (
            f"hvkvm.{area}.{value.layout}.{value.field.name}".lower(),
            data[value.offset : value.offset + value.field.size],
        )
        for value in decoded.values
    ]
