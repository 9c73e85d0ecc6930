"""What travels in an hvsock channel's rings: a stream in packets, each behind a pipe header.

An empty packet says that its sender sends no more. What a guest's packets say is checked here.
Owner: the I/O loop.
"""

from __future__ import annotations

from hvkvm.abi import hvsock as abi
from hvkvm.abi.ring import DESCRIPTOR_BYTES, TRAILER_BYTES, VM_PKT_DATA_INBAND
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.ring_reader import RingReader

HEADER_BYTES = abi.pipe_header.size
FULL_PACKET = DESCRIPTOR_BYTES + HEADER_BYTES + abi.MAX_DATA_BYTES + TRAILER_BYTES
PACKETS = 16
"""Most packets filled by one read of the socket, or emptied by one write: far fewer pieces than IOV_MAX."""


class Taken(NamedTuple):
    """The data of some packets, where it lies in the ring, and its size in bytes."""

    views: list[memoryview]
    size: int
    ended: bool = False
    """The empty packet was among them, or before."""
    broken: str = ""
    """The rule that the guest broke; nothing else counts then."""


def data_header(size: int) -> bytes:
    """The pipe header of a packet with `size` bytes of data."""
    return abi.pipe_header.pack(abi.VMPIPE_TYPE_DATA, size)


def take(reader: RingReader, ended: bool) -> Taken:
    """The data of up to PACKETS packets that are there. `ended`: the empty packet was seen before."""
    views: list[memoryview] = []
    size = 0
    for _ in range(PACKETS):
        packet = reader.get_raw(HEADER_BYTES)
        if packet is None:
            break
        front, found = packet.front, packet.views
        if packet.type != VM_PKT_DATA_INBAND or len(front) != HEADER_BYTES:
            return _broken(f"a packet of type {packet.type} with {len(front)} bytes of pipe header")
        # The copy of the header is what counts; what lies in the ring may say something else by now.
        kind, length = abi.pipe_header.unpack(front)
        rest = len(found[0]) if len(found) == 1 else sum(map(len, found))
        if kind != abi.VMPIPE_TYPE_DATA or length > abi.MAX_DATA_BYTES or length > rest:
            return _broken(f"pipe packet type {kind} says {length} bytes of {rest}")
        if ended:
            return _broken("a packet behind the empty one that ends the stream")
        if not length:
            ended = True
            continue
        size += length
        for view in found:
            if length <= len(view):
                views.append(view[:length])
                break
            views.append(view)
            length -= len(view)
    return Taken(views, size, ended)


def _broken(why: str) -> Taken:
    return Taken([], 0, broken=why)
