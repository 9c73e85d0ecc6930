"""A recording, or bytes in hexadecimal, in words. Takes hostile files: ValueError for no recording."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from hvkvm.abi import pcapng, record_format
from hvkvm.abi.device_layouts import HVSOCK, PROTOCOLS, Protocol, protocol_of
from hvkvm.abi.layout import decode
from hvkvm.abi.record_format import ChannelEvent, Entry, Kind
from hvkvm.abi.tlfs import HV_HYPERCALL_CODE_MASK, HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT, HvStatus
from hvkvm.record import words
from hvkvm.tuples import NamedTuple

_CALLS = {HVCALL_POST_MESSAGE: "HvPostMessage", HVCALL_SIGNAL_EVENT: "HvSignalEvent"}


class Recorded(NamedTuple):
    """An entry of a recording, `nanoseconds` after 1970."""

    nanoseconds: int
    entry: Entry


def read(file: BinaryIO) -> Iterator[Recorded]:
    """The entries of a recording, in the file's order. ValueError."""
    found = False
    for packet in pcapng.read(file):
        if packet.interface.name != record_format.LINK_NAME:
            continue
        entry = record_format.parse(packet.data)
        if entry is None:
            raise ValueError("an entry of another format than this hvkvm writes")
        found = True
        yield Recorded(packet.nanoseconds, entry)
    if not found:
        raise ValueError("no recording of a VMBus is in it")


def lines(file: BinaryIO) -> Iterator[str]:
    """A line for each entry, with the seconds since the first. ValueError."""
    names: dict[int, str] = {}
    begin: int | None = None
    for at, entry in read(file):
        begin = at if begin is None else begin
        if entry.kind is Kind.CHANNEL:
            names[entry.relid] = _printable(entry.data)
        yield f"{(at - begin) / 1e9:10.6f} {described(entry, names.get(entry.relid, ''))}"


def described(entry: Entry, channel: str = "") -> str:
    """One entry in words; `channel` is its channel's name, if that is known."""
    arrow = words.arrow(entry.to_host)
    where = channel or f"{protocol_of(entry.interface).name} {entry.relid}"
    match entry.kind:
        case Kind.MESSAGE:
            refused = f", refused: {_status(entry.value)}" if entry.value else ""
            return f"{arrow} {words.message(entry.data)}{refused}"
        case Kind.PACKET:
            return f"{arrow} {where}: {next(words.ring(entry.interface, entry.data), 'nothing')}"
        case Kind.POINTED:
            decoded = decode(entry.data, protocol_of(entry.interface).pointed)
            said = " ".join(words.fields(decoded)) or f"{len(entry.data)} bytes in memory"
            return f"{arrow} {where}: {said}"
        case Kind.SIGNAL:
            return f"{arrow} {where}: signal"
        case Kind.CHANNEL:
            what = ChannelEvent(entry.value).name.lower() if entry.value <= ChannelEvent.FAILED else "?"
            return f"       channel {what}: {_printable(entry.data)}, relid {entry.relid}"
        case Kind.HYPERCALL:
            control = int.from_bytes(entry.data[:8], "little")
            code = control & HV_HYPERCALL_CODE_MASK
            given = int.from_bytes(entry.data[8:16], "little")
            return (
                f"{arrow} {_CALLS.get(code, f'hypercall {code:#x}')} input={given:#x}: {_status(entry.value)}"
            )
        case Kind.LOST:
            return f"       {entry.value} entries are lost here"
        case _:
            return f"       machine: {_printable(entry.data)}"


def from_hex(text: str, protocol: str | None) -> str:
    """Bytes in hexadecimal as a message, or as the payload of a device's packet. ValueError."""
    try:
        data = bytes.fromhex(text.replace(":", " ").replace(",", " "))
    except ValueError:
        raise ValueError("neither a file that is there nor hexadecimal") from None
    if protocol is None:
        return words.message(data)
    decoded = decode(data, protocol_named(protocol).payload)
    return " ".join(words.fields(decoded)) or "nothing"


def protocol_named(name: str) -> Protocol:
    """A device's protocol by its name. ValueError."""
    for protocol in (*PROTOCOLS.values(), HVSOCK):
        if protocol.name == name:
            return protocol
    raise ValueError(f"no protocol {name}; there are {', '.join(protocol_names())}")


def protocol_names() -> list[str]:
    """Of all devices, each once."""
    return list(dict.fromkeys(protocol.name for protocol in (*PROTOCOLS.values(), HVSOCK)))


def _status(value: int) -> str:
    try:
        return f"HV_STATUS_{HvStatus(value).name}"
    except ValueError:
        return f"status {value:#x}"


def _printable(raw: bytes) -> str:
    text = raw[:2000].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)
