"""A SCSI disk (SBC-3) on a `Disk` of block/: 512 or 4096-byte sectors, thinly provisioned.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.block.disk import Disk
from hvkvm.block.request import Op, Request, Result
from hvkvm.devices.scsi.command import Command, Rejected
from hvkvm.devices.scsi.inquiry import Identity
from hvkvm.devices.scsi.medium import MAX_TRANSFER, answer, checked, read_or_write
from hvkvm.devices.scsi.mode import DISK_PAGES, ModePages
from hvkvm.devices.scsi.plain import Plain
from hvkvm.devices.scsi.provisioning import (
    MAX_DESCRIPTORS,
    MAX_SAME_BYTES,
    MAX_UNMAP_BYTES,
    unmap,
    write_same,
)
from hvkvm.devices.scsi.unit import Handler, Unit
from hvkvm.devices.scsi.verify import Comparisons, verify
from hvkvm.tuples import NamedTuple

BLOCK_LIMITS = 0xB0
CHARACTERISTICS = 0xB1
PROVISIONING = 0xB2

_STANDARDS = (0x00A0, 0x0460, 0x04C0)
"""SAM-5, SPC-4, SBC-3, no version claimed."""
_WRITE_PROTECT = 0x80
_DPOFUA = 0x10
_LBPME = 0x8000

_READS = (scsi.READ_6, scsi.READ_10, scsi.READ_12, scsi.READ_16)
_WRITES = (scsi.WRITE_6, scsi.WRITE_10, scsi.WRITE_12, scsi.WRITE_16)
_WRITES_STABLE = (scsi.WRITE_VERIFY, scsi.WRITE_VERIFY_12, scsi.WRITE_VERIFY_16)
_VERIFIES = (scsi.VERIFY, scsi.VERIFY_12, scsi.VERIFY_16)


class ScsiDiskState(NamedTuple):
    """What a guest sees of a disk beyond its data."""

    attentions: tuple[Sense, ...]
    started: bool


class ScsiDisk(Unit):
    """`disk` as a logical unit; takes its `on_resize`."""

    State = ScsiDiskState

    def __init__(self, disk: Disk, serial: str, product: str = "VIRTUAL-DISK") -> None:
        modes = ModePages(dict(DISK_PAGES), self._specific, self._geometry)
        super().__init__(scsi.TYPE_DISK, Identity(product, serial, "1", _STANDARDS), modes, removable=False)
        self.disk = disk
        self._sector = disk.image.sector_size
        self._started = True
        disk.on_resize = self._resized
        comparisons = Comparisons()
        on_medium: dict[int, Handler] = {
            scsi.READ_CAPACITY: self._read_capacity,
            scsi.SERVICE_ACTION_IN_16: self._service_action,
            scsi.SYNCHRONIZE_CACHE: self._synchronize,
            scsi.SYNCHRONIZE_CACHE_16: self._synchronize,
            scsi.UNMAP: lambda command: unmap(self._writable(command), disk, self._sector),
            scsi.WRITE_SAME: lambda command: write_same(self._writable(command), disk, self._sector),
            scsi.WRITE_SAME_16: lambda command: write_same(self._writable(command), disk, self._sector),
            scsi.SEEK_10: self._seek,
            **dict.fromkeys(_READS, self._read),
            **dict.fromkeys(_WRITES, self._write),
            **dict.fromkeys(_WRITES_STABLE, self._write_stable),
            **dict.fromkeys(_VERIFIES, lambda command: verify(command, disk, self._sector, comparisons)),
        }
        for operation, handler in on_medium.items():
            self.handlers[operation] = self._when_started(handler)
        self.handlers[scsi.START_STOP] = self._start_stop

    def begin(self, cdb: bytes, request: Request) -> bool:
        operation = cdb[0]
        if operation in (scsi.READ_10, scsi.WRITE_10) and len(cdb) >= scsi.cdb10.size:
            _op, flags, lba, _group, blocks, control = scsi.cdb10.unpack_from(cdb)
        elif operation in (scsi.READ_16, scsi.WRITE_16) and len(cdb) >= scsi.cdb16.size:
            _op, flags, lba, blocks, _group, control = scsi.cdb16.unpack_from(cdb)
        else:
            return False
        disk, sector = self.disk, self._sector
        if (
            blocks * sector != request.length
            or flags & scsi.PROTECT_MASK
            or control & scsi.NACA
            or not 0 < request.length <= MAX_TRANSFER
            or lba + blocks > disk.size // sector
            or self.disturbed
            or not self._started
        ):
            return False
        if operation in (scsi.WRITE_10, scsi.WRITE_16):
            if disk.image.read_only:
                return False
            request.op = Op.WRITE
            request.fua = bool(flags & scsi.FUA)
        request.offset = lba * sector
        disk.begin(request)
        return True

    def plain(self) -> Plain | None:
        disk = self.disk
        if self.disturbed or not self._started or disk.stopped:
            return None
        writes = None if disk.image.read_only else disk.writes_now
        return Plain(self._sector, disk.size // self._sector, disk.reads_now, writes)

    def drain(self, done: Callable[[], object]) -> None:
        self.disk.drain(done)

    def poll(self) -> None:
        self.disk.poll()

    def power_on(self) -> None:
        super().power_on()
        self._started = True

    def save(self) -> ScsiDiskState:
        """Its state; only while nothing is in flight."""
        return ScsiDiskState(self.saved_attentions(), self._started)

    def load(self, state: ScsiDiskState) -> None:
        """Take a saved state; only while nothing is in flight. StateError."""
        self.load_attentions(state.attentions)
        self._started = state.started

    def inspect(self) -> dict[str, object]:
        return {"kind": "disk", **super().inspect(), **self.disk.inspect()}

    def check_ready(self) -> None:
        if not self._started:
            raise Rejected(scsi.NOT_READY_STOPPED)

    def vpd_pages(self) -> tuple[int, ...]:
        return (BLOCK_LIMITS, CHARACTERISTICS, PROVISIONING)

    def vpd(self, page: int) -> bytes | None:
        if page == BLOCK_LIMITS:
            return self._block_limits()
        if page == CHARACTERISTICS:
            return (1).to_bytes(2, "big") + bytes(58)  # does not rotate
        if page == PROVISIONING:
            # Unmapped blocks may read as anything (LBPRZ 0): a discard is a hint to the host.
            return bytes((0, 0xE0, 2, 0))  # UNMAP, WRITE SAME(16) and (10) with UNMAP; thin
        return None

    def _block_limits(self) -> bytes:
        sector = self._sector
        body = bytearray(60)
        body[0] = 1  # WSNZ
        body[2:4] = (4096 // sector).to_bytes(2, "big")
        body[4:8] = (MAX_TRANSFER // sector).to_bytes(4, "big")
        body[8:12] = ((1 << 20) // sector).to_bytes(4, "big")
        body[16:20] = (MAX_UNMAP_BYTES // sector).to_bytes(4, "big")
        body[20:24] = MAX_DESCRIPTORS.to_bytes(4, "big")
        body[24:28] = (max(4096, self.disk.image.physical_sector_size) // sector).to_bytes(4, "big")
        body[28:32] = (1 << 31).to_bytes(4, "big")  # UGAVALID, alignment 0
        body[32:40] = (MAX_SAME_BYTES // sector).to_bytes(8, "big")
        return bytes(body)

    def _specific(self) -> int:
        return _DPOFUA | (_WRITE_PROTECT if self.disk.image.read_only else 0)

    def _geometry(self) -> tuple[int, int]:
        return self.disk.size // self._sector, self._sector

    def _resized(self) -> None:
        self.attention(scsi.CAPACITY_CHANGED)

    def _when_started(self, handler: Handler) -> Handler:
        def guarded(command: Command) -> None:
            if not self._started:
                raise Rejected(scsi.NOT_READY_STOPPED)
            handler(command)

        return guarded

    def _writable(self, command: Command) -> Command:
        if self.disk.image.read_only:
            raise Rejected(scsi.WRITE_PROTECTED)
        return command

    # The commands.

    def _read(self, command: Command) -> None:
        read_or_write(command, Op.READ, self.disk, self._sector)

    def _write(self, command: Command) -> None:
        read_or_write(self._writable(command), Op.WRITE, self.disk, self._sector)

    def _write_stable(self, command: Command) -> None:
        """WRITE AND VERIFY: once it is on the device, the host would know of an error."""
        read_or_write(self._writable(command), Op.WRITE, self.disk, self._sector, fua=True)

    def _read_capacity(self, command: Command) -> None:
        _op, _flags, lba, _group, _length, _control = scsi.cdb10.unpack_from(command.cdb)
        if lba and not command.cdb[8] & 1:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        last = min(self.disk.size // self._sector - 1, 0xFFFFFFFF)
        command.give(scsi.capacity10.pack(last, self._sector), 8)

    def _service_action(self, command: Command) -> None:
        if command.cdb[1] & 0x1F != scsi.SAI_READ_CAPACITY_16:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        allocation = int.from_bytes(command.cdb[10:14], "big")
        exponent = (self.disk.image.physical_sector_size // self._sector).bit_length() - 1
        last = self.disk.size // self._sector - 1
        command.give(scsi.capacity16.pack(last, self._sector, 0, max(0, exponent), _LBPME), allocation)

    def _synchronize(self, command: Command) -> None:
        """The whole cache, and the answer when that is done, with IMMED, too: both are allowed."""
        transfer = scsi.transfer_of(command.cdb)
        checked(transfer, self.disk, self._sector)

        def done(result: Result) -> None:
            answer(command, Op.FLUSH, result, transfer.lba)

        self.disk.submit(Request(Op.FLUSH, 0, (), done))

    def _seek(self, command: Command) -> None:
        transfer = scsi.transfer_of(command.cdb)
        if transfer.lba >= self.disk.size // self._sector:
            raise Rejected(scsi.LBA_OUT_OF_RANGE, lba=transfer.lba)
        command.good()

    def _start_stop(self, command: Command) -> None:
        if command.cdb[4] >> 4:  # a power condition
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        start = bool(command.cdb[4] & 1)
        if start or not self._started:
            self._started = start
            command.good()
            return

        def flushed(result: Result) -> None:
            self._started = False
            answer(command, Op.FLUSH, result, 0)

        self.disk.submit(Request(Op.FLUSH, 0, (), flushed))
