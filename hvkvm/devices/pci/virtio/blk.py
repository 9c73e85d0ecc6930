"""The virtio block device: from a chain of buffers to requests of the block layer, and back to a status byte.

A request is a header that the device reads, data, and a status byte that it writes last; how a driver cuts
that into buffers is its own affair. The header is copied once. Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hvkvm.abi import pci, virtio
from hvkvm.block.buffers import Buffers, Cutter, size_of
from hvkvm.block.in_turn import Range, in_turn
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.devices.pci.virtio.ring import Chain

QUEUE_SIZE = 256
MAX_RANGES = 64
"""Of one discard or write of zeros."""
_MAX_RANGE_SECTORS = 1 << 22
_HEADER = virtio.virtio_blk_outhdr.size
_RANGE = virtio.virtio_blk_discard_write_zeroes
_SECTOR = virtio.VIRTIO_BLK_SECTOR
_OPS = {virtio.VIRTIO_BLK_T_DISCARD: Op.DISCARD, virtio.VIRTIO_BLK_T_WRITE_ZEROES: Op.WRITE_ZEROES}

Done = Callable[[int], object]
"""done(written): the bytes that are new in the chain's buffers."""


class Disk(Protocol):
    """What the device needs of `block.disk.Disk`."""

    @property
    def size(self) -> int: ...
    def submit(self, request: Request) -> None: ...
    def take(self, request: Request) -> None: ...
    def poll(self) -> None: ...
    def drain(self, done: Callable[[], object]) -> None: ...
    def inspect(self) -> dict[str, object]: ...


class VirtioBlk:
    """`disk` for a driver; a `transport.Device`. `serial` has up to 20 bytes."""

    kind = virtio.VIRTIO_ID_BLOCK
    class_code = pci.PCI_CLASS_STORAGE_SCSI

    def __init__(
        self,
        disk: Disk,
        *,
        serial: str,
        queues: int = 1,
        sector_size: int = _SECTOR,
        read_only: bool = False,
    ) -> None:
        self.disk = disk
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE,) * queues
        bits = [virtio.VIRTIO_BLK_F_SEG_MAX, virtio.VIRTIO_BLK_F_BLK_SIZE, virtio.VIRTIO_BLK_F_FLUSH]
        bits += [virtio.VIRTIO_BLK_F_DISCARD, virtio.VIRTIO_BLK_F_WRITE_ZEROES] if not read_only else []
        bits += [virtio.VIRTIO_BLK_F_MQ] if queues > 1 else []
        bits += [virtio.VIRTIO_BLK_F_RO] if read_only else []
        self.features = sum(1 << bit for bit in bits)
        self.config: bytes = virtio.virtio_blk_config.pack(
            disk.size // _SECTOR,
            QUEUE_SIZE - 2,  # header and status have a descriptor each
            sector_size,
            queues,
            *(_MAX_RANGE_SECTORS, MAX_RANGES),
            *(_MAX_RANGE_SECTORS, MAX_RANGES),
            1,
        )
        self._serial = serial.encode()[: virtio.VIRTIO_BLK_ID_BYTES].ljust(virtio.VIRTIO_BLK_ID_BYTES, b"\0")

    def perform(self, chain: Chain, done: Done) -> None:
        """See `transport.Device`. A chain without room for a status is given back as it is."""
        readable, writable = chain.readable, chain.writable
        if readable and writable and len(readable[0]) == _HEADER and len(writable[-1]) == 1:
            # As every driver cuts it.
            kind, sector = virtio.virtio_blk_outhdr.unpack_from(readable[0])
            data = chain.data
            if data is not None and kind == (
                virtio.VIRTIO_BLK_T_IN if chain.data_writable else virtio.VIRTIO_BLK_T_OUT
            ):
                answer = _Answer(data if chain.data_writable else (), writable[-1], done)
                self._begin(kind, sector * _SECTOR, data, answer)
                return
            chain.spread()
            answer = _Answer(writable[:-1], writable[-1], done)
            self._begin(kind, sector * _SECTOR, readable[1:], answer)
        else:
            chain.spread()
            self._perform_cut(chain, done)

    def _perform_cut(self, chain: Chain, done: Done) -> None:
        room = size_of(chain.writable)
        if not room:
            done(0)
            return
        cutter = Cutter(chain.writable)
        answer = _Answer(cutter.take(room - 1), cutter.take(1)[0], done)
        readable = Cutter(chain.readable)
        header = b"".join(readable.take(_HEADER))
        data = readable.take(size_of(chain.readable) - len(header))
        if len(header) < _HEADER:
            answer.give(virtio.VIRTIO_BLK_S_IOERR)
            return
        kind, sector = virtio.virtio_blk_outhdr.unpack(header)
        self._begin(kind, sector * _SECTOR, data, answer)

    def _begin(self, kind: int, offset: int, data: Buffers, answer: _Answer) -> None:
        if kind == virtio.VIRTIO_BLK_T_IN:
            self.disk.take(Request(Op.READ, offset, answer.data, answer.read))
        elif kind == virtio.VIRTIO_BLK_T_OUT:
            self.disk.take(Request(Op.WRITE, offset, data, answer.finish))
        elif kind == virtio.VIRTIO_BLK_T_FLUSH:
            self.disk.submit(Request(Op.FLUSH, 0, (), answer.finish))
        elif kind == virtio.VIRTIO_BLK_T_GET_ID:
            answer.give(virtio.VIRTIO_BLK_S_OK, self._serial)
        elif kind in _OPS:
            self._ranges(kind, data, answer)
        else:
            answer.give(virtio.VIRTIO_BLK_S_UNSUPP)

    def _ranges(self, kind: int, data: Buffers, answer: _Answer) -> None:
        size = size_of(data)
        if not size or size % _RANGE.size or size > MAX_RANGES * _RANGE.size:
            answer.give(virtio.VIRTIO_BLK_S_IOERR)
            return
        ranges = list(_RANGE.iter_unpack(b"".join(data)))
        allowed = virtio.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if kind == virtio.VIRTIO_BLK_T_WRITE_ZEROES else 0
        if any(flags & ~allowed for _sector, _count, flags in ranges):
            answer.give(virtio.VIRTIO_BLK_S_UNSUPP)
        elif any(count > _MAX_RANGE_SECTORS for _sector, count, _flags in ranges):
            answer.give(virtio.VIRTIO_BLK_S_IOERR)
        else:
            flag = virtio.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
            parts = (Range(at * _SECTOR, count * _SECTOR, bool(flags & flag)) for at, count, flags in ranges)
            in_turn(self.disk, _OPS[kind], parts, lambda result, _offset: answer.finish(result))

    def flush_answers(self) -> None:
        """See `transport.Device`."""
        self.disk.poll()

    def drain(self, done: Callable[[], object]) -> None:
        """See `transport.Device`."""
        self.disk.drain(done)

    def inspect(self) -> dict[str, object]:
        """The disk."""
        return {"disk": self.disk.inspect()}


class _Answer:
    """Where a request's data and status go, and who hears of it. Given once."""

    __slots__ = ("_done", "_status", "data")

    def __init__(self, data: Buffers, status: memoryview, done: Done) -> None:
        self.data = data
        self._status = status
        self._done = done

    def give(self, status: int, content: bytes = b"") -> None:
        """Write as much of `content` as there is room for, then the status."""
        at = 0
        for view in self.data if content else ():
            part = content[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        self._status[0] = status
        self._done(at + 1)

    def finish(self, result: Result) -> None:
        """The block layer's result, of what brings the driver no data."""
        good = result.status is Status.OK
        self.give(virtio.VIRTIO_BLK_S_OK if good else virtio.VIRTIO_BLK_S_IOERR)

    def read(self, result: Result) -> None:
        """The result of a read, whose data are there."""
        if result.status is Status.OK:
            self._status[0] = virtio.VIRTIO_BLK_S_OK
            self._done(result.transferred + 1)
        else:
            self.give(virtio.VIRTIO_BLK_S_IOERR)
