"""Plain requests of one page each, taken out of a channel's ring together and done at once.

Why: a guest that keeps many small reads and writes in flight asks for the same over and over: a READ (10)
or WRITE (10) of one page, in packets that are all laid out alike. One look at the ring has them all, and each
takes less than half the time that a command of any kind does. The first that is in any way unusual, or that
has to wait for the host, ends it: that one and what is behind it are taken one by one (`storvsp_channel`),
which also says what is wrong with it. Nothing was done for it by then, and it is copied anew.

Owner: the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import repeat
from struct import Struct

from hvkvm.abi import scsi
from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import (
    VM_PKT_DATA_USING_GPA_DIRECT,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    descriptor,
)
from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.block.now import Way
from hvkvm.devices.scsi.plain import Plain
from hvkvm.devices.synth.storvsp_pages import DataPages
from hvkvm.errors import GuestMemoryError
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.ring_reader import RingReader

_PAYLOAD_EIGHTS = wire.PACKET_BYTES // 8
_FRONT = Struct("<8sQ16sQ")
"""The descriptor, in it the transaction id; the GPA-direct header of one range, up to its first page."""
_LEAST_EIGHTS = _FRONT.size // 8
_head = Struct("<HHHH")
_range = Struct("<4xIII")
_srb = Struct("<I8x4xBBBBBBBxIBB")
"""The payload up to the LBA."""
_back = Struct(">BHB")
"""Behind the LBA: group number, blocks, control."""
_REFUSED = scsi.PROTECT_MASK | scsi.FUA
_LONGEST_CDB = 16


class _Kind(NamedTuple):
    """What packets ask for that differ in their transaction id, page and LBA alone."""

    target: int
    lun: int
    write: bool
    blocks: int
    offset: int
    """Into the page."""
    length: int
    completion: bytes


class _Run(NamedTuple):
    """Packets of one kind, one behind the other."""

    way: Way
    kind: _Kind
    trans_ids: list[int]
    offsets: list[int]
    buffers: list[tuple[memoryview]]


@lru_cache(maxsize=16)  # a guest chooses
def _layout(eights: int) -> Struct:
    """A packet whose payload begins so many eights of bytes behind its own beginning, with its trailer."""
    pages = eights * 8 - _FRONT.size
    return Struct(f"{_FRONT.format}{pages}x{_srb.size}s4s{_back.size}s6x20x8x")


def take_plain(
    reader: RingReader,
    most: int,
    plain: Callable[[int, int], Plain | None],
    pages: DataPages,
    done: deque[tuple[int, bytes]],
) -> int:
    """Take up to `most` requests that stand first in the ring, their completions into `done`; how many.

    `plain(target, lun)` is what a disk does at once.
    """
    waiting = reader.waiting(most * 512)
    if len(waiting) < _FRONT.size:
        return 0
    first_kind, first_eights, first_total, _flags, _trans_id = descriptor.unpack_from(waiting)
    if (
        first_kind != VM_PKT_DATA_USING_GPA_DIRECT
        or first_eights < _LEAST_EIGHTS
        or first_total != first_eights + _PAYLOAD_EIGHTS
    ):
        return 0
    layout = _layout(first_eights)
    step = layout.size
    whole = memoryview(waiting)[: min(len(waiting) // step, most) * step]
    taken = 0
    for way, kind, trans_ids, offsets, buffers in _runs(layout, first_eights, whole, plain, pages):
        n = way.move_each(offsets, buffers, kind.length)
        way.tally(n, n * kind.length)
        done.extend(zip(trans_ids[:n], repeat(kind.completion)))
        taken += n
        if n < len(trans_ids):
            break
    reader.took(taken, taken * step)
    return taken


def _runs(
    layout: Struct,
    eights: int,
    packets: memoryview,
    plain: Callable[[int, int], Plain | None],
    pages: DataPages,
) -> list[_Run]:
    """Those of `packets` that are plain, up to the first that is not."""
    runs: list[_Run] = []
    kept = pages.kept
    last_head = last_range = last_srb = last_back = b""
    last = sector = offset = length = 0
    for head, trans_id, range_, pfn, srb, lba_bytes, back in layout.iter_unpack(packets):
        if head != last_head or range_ != last_range or srb != last_srb or back != last_back:
            last_head, last_range, last_srb, last_back = head, range_, srb, back
            kind = _kind_of(head, range_, srb, back, eights)
            disk = None if kind is None else plain(kind.target, kind.lun)
            if kind is None or disk is None:
                break
            sector, offset, length = disk.sector, kind.offset, kind.length
            way = disk.writes if kind.write else disk.reads
            if way is None or not way.tries or kind.blocks * sector != length:
                break
            last = disk.sectors - kind.blocks
            trans_ids: list[int] = []
            offsets: list[int] = []
            buffers: list[tuple[memoryview]] = []
            runs.append(_Run(way, kind, trans_ids, offsets, buffers))
        lba = int.from_bytes(lba_bytes, "big")
        if lba > last:
            break
        view = kept.get(pfn)
        try:
            if view is None:
                view = pages.page(pfn)
            if length != HV_HYP_PAGE_SIZE:
                view = view[offset : offset + length]
        except (GuestMemoryError, ValueError):  # no RAM, or what was mapped there once is not any more
            break
        trans_ids.append(trans_id)
        offsets.append(lba * sector)
        buffers.append((view,))
    return runs


@lru_cache(maxsize=64)  # a guest chooses
def _kind_of(head: bytes, range_: bytes, srb: bytes, back: bytes, eights: int) -> _Kind | None:
    """What such packets ask for; None if they are in any way unusual."""
    kind, payload_eights, total, flags = _head.unpack(head)
    ranges, room, offset = _range.unpack(range_)
    operation, port, path, target, lun, cdb_length, _sense, data_in, length, code, bits = _srb.unpack(srb)
    _group, blocks, control = _back.unpack(back)
    write = code == scsi.WRITE_10
    if (
        kind != VM_PKT_DATA_USING_GPA_DIRECT
        or payload_eights != eights
        or total != eights + _PAYLOAD_EIGHTS
        or operation != wire.EXECUTE_SRB
        or ranges != 1
        or not flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED
        or path
        or not scsi.cdb10.size <= cdb_length <= _LONGEST_CDB
        or not 0 < length <= room
        or offset + room > HV_HYP_PAGE_SIZE
        or bits & _REFUSED
        or control & scsi.NACA
        or not (write or code == scsi.READ_10)
        or data_in != (wire.WRITE_TYPE if write else wire.READ_TYPE)
    ):
        return None
    completion = wire.plain_completion(port, target, lun, cdb_length, data_in, length)
    return _Kind(target, lun, write, blocks, offset, length, completion)
