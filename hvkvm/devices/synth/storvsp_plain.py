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
from hvkvm.errors import GuestMemoryError
from hvkvm.vmbus.ring_reader import RingReader

_PAYLOAD_EIGHTS = wire.PACKET_BYTES // 8
_FRONT = Struct("<HHHHQ4xIIIQ")
"""The descriptor, and the GPA-direct header of one range, up to its first page."""
_LEAST_EIGHTS = _FRONT.size // 8
_REFUSED = scsi.PROTECT_MASK | scsi.FUA
_LONGEST_CDB = 16


@lru_cache(maxsize=16)  # a guest chooses
def _layout(eights: int) -> Struct:
    """A packet whose payload begins so many eights of bytes behind its own beginning, with its trailer."""
    pages = eights * 8 - _FRONT.size
    return Struct(f"{_FRONT.format}{pages}xI8x4xBBBBBBBxIBB8s6x20x8x")


def take_plain(
    reader: RingReader,
    most: int,
    plain: Callable[[int, int], Plain | None],
    page: Callable[[int], memoryview],
    done: deque[tuple[int, bytes]],
) -> int:
    """Take up to `most` requests that stand first in the ring, their completions into `done`; how many.

    `plain(target, lun)` is what a disk does at once, `page(pfn)` a view of a guest's page.
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
    n = min(len(waiting) // step, most)
    taken = sector = sectors = 0
    whole = memoryview(waiting)[: n * step]
    where, disk = -1, None
    way: Way | None
    for (
        kind, eights, total, flags, trans_id, ranges, room, offset, pfn, operation,
        port, path, target, lun, cdb_length, _sense, data_in, length, code, cdb_flags, rest,
    ) in layout.iter_unpack(whole):  # fmt: skip
        if (
            kind != VM_PKT_DATA_USING_GPA_DIRECT
            or eights != first_eights
            or total != first_total
            or operation != wire.EXECUTE_SRB
            or ranges != 1
            or not flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED
            or path
            or not scsi.cdb10.size <= cdb_length <= _LONGEST_CDB
            or not 0 < length <= room
            or offset + room > HV_HYP_PAGE_SIZE
            or cdb_flags & _REFUSED
        ):
            break
        if target << 8 | lun != where:
            where = target << 8 | lun
            disk = plain(target, lun)
            if disk is None:
                break
            sector, sectors = disk.sector, disk.sectors
        assert disk is not None
        numbers = int.from_bytes(rest, "big")  # LBA 4 bytes, group number, blocks 2 bytes, control
        lba, blocks = numbers >> 32, numbers >> 8 & 0xFFFF
        if code == scsi.READ_10 and data_in == wire.READ_TYPE:
            way = disk.reads
        elif code == scsi.WRITE_10 and data_in == wire.WRITE_TYPE:
            way = disk.writes
        else:
            break
        if way is None or blocks * sector != length or lba + blocks > sectors or numbers & scsi.NACA:
            break
        try:
            view = page(pfn)
        except GuestMemoryError:
            break
        if length != HV_HYP_PAGE_SIZE:
            view = view[offset : offset + length]
        if not way.move(lba * sector, (view,), length):
            break
        way.tally(1, length)
        done.append((trans_id, wire.plain_completion(port, target, lun, cdb_length, data_in, length)))
        taken += 1
    reader.took(taken, taken * step)
    return taken
