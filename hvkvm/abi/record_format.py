"""What a recording of a bus has in each packet of its pcapng file: a head of 32 bytes, and what crossed.

The interface is called LINK_NAME and has LINKTYPE_USER0, which says nothing by
itself. `parse` takes a hostile file's bytes: None for what is not valid.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from hvkvm.abi.vmbus import GUID_BYTES
from hvkvm.tuples import NamedTuple

LINK_NAME = "hvkvm-vmbus"
LINK_DESCRIPTION = "Hyper-V VMBus as hvkvm records it, format 1"
FORMAT = 1

head = Struct("<BBBBHHII16s")
"""format, kind, to_host, flags, vp, sint, relid, value, the channel's interface type."""
HEAD_BYTES = 32

CUT = 1
"""flags: bytes at the end are missing."""


class Kind(IntEnum):
    """What one packet of a recording tells."""

    MACHINE = 0
    """JSON: what the machine is."""
    MESSAGE = 1
    """A VMBus message; `value` is the status of an HvPostMessage that was refused."""
    PACKET = 2
    """A packet of a ring: descriptor, header, payload."""
    SIGNAL = 3
    """A doorbell, or an event flag of the guest."""
    CHANNEL = 4
    """`value` of ChannelEvent; its name in UTF-8."""
    HYPERCALL = 5
    """`value` is the result's low half; control and input, 8 bytes each."""
    LOST = 6
    """`value` entries were lost here: nobody took them in time."""
    POINTED = 7
    """A device's own message in guest memory that a packet pointed to, without the data that it carries."""


class ChannelEvent(IntEnum):
    """What happened to a channel."""

    OPENED = 0
    CLOSED = 1
    FAILED = 2


class Entry(NamedTuple):
    """One packet of a recording."""

    kind: Kind
    to_host: bool
    data: bytes
    relid: int = 0
    interface: bytes = bytes(GUID_BYTES)
    vp: int = 0
    sint: int = 0
    value: int = 0
    cut: bool = False

    def pack(self) -> bytes:
        """As it stands in the file."""
        return (
            head.pack(
                FORMAT,
                self.kind,
                self.to_host,
                CUT if self.cut else 0,
                self.vp,
                self.sint,
                self.relid,
                self.value & 0xFFFFFFFF,
                self.interface,
            )
            + self.data
        )


def parse(data: bytes) -> Entry | None:
    """An entry; None for one that is too short, or of another format or kind."""
    if len(data) < HEAD_BYTES:
        return None
    number, kind, to_host, flags, vp, sint, relid, value, interface = head.unpack_from(data)
    if number != FORMAT or kind > Kind.POINTED:
        return None
    return Entry(
        Kind(kind), bool(to_host), data[HEAD_BYTES:], relid, interface, vp, sint, value, bool(flags & CUT)
    )
