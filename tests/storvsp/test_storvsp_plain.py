"""Plain requests that are taken together get what each would get by itself, whatever stands between them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from storvsp_bench import DISK_BYTES, Bench

from hvkvm.abi import scsi, vmbus
from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import VM_PKT_DATA_USING_GPA_DIRECT, GpaRange, gpa_direct_header
from hvkvm.abi.storvsp import Srb
from hvkvm.devices.synth import storvsp_channel
from hvkvm.devices.synth.storvsp_plain import take_plain
from hvkvm.testing.storvsc_driver import PAGE, StorvscDriver

PAGES = range(900, 932)
LONG_PAGES = range(600, 740, 2)
SECTORS = DISK_BYTES // 512


class Sent(NamedTuple):
    """One packet."""

    header: bytes
    payload: bytes
    flags: int


def packet(random: Random, page: int, *, odd: bool) -> Sent:
    """A plain request for one page; `odd`: with something about it that is not."""
    write = random.random() < 0.4
    blocks = random.choice((1, 3, 8))
    offset = random.randrange(0, PAGE - 512 * blocks + 1, 8)
    length = 512 * blocks
    cdb = bytearray(16)
    cdb[0] = scsi.WRITE_10 if write else scsi.READ_10
    cdb[2:6] = random.randrange(SECTORS - 8).to_bytes(4, "big")
    cdb[8] = blocks
    srb = Srb(0, 0, random.randrange(2), bytes(cdb[:10]), int(not write), length, 0)
    ranges = [GpaRange(length, offset, (page,))]
    slack, flags = 31 * 8, 1  # Linux's packets have room for 32 pages
    what = random.randrange(16) if odd else -1
    if what == 0:
        srb = srb._replace(path=1)
    elif what == 1:
        srb = srb._replace(lun=random.choice((2, 255)))
    elif what == 2:
        srb = srb._replace(target=1)
    elif what == 3:
        srb = srb._replace(data_in=random.choice((0, 1, 2, 9)))
    elif what == 4:
        srb = srb._replace(length=random.choice((0, 24, length + 512, length - 512, 1 << 31)))
    elif what == 5:
        cdb[1] = random.choice((8, 0x20, 0xE0, 0x10, 0xFF))  # FUA, protection, DPO
        srb = srb._replace(cdb=bytes(cdb[:10]))
    elif what == 6:
        cdb[2:6] = random.choice((SECTORS - 1, SECTORS, 1 << 31, (1 << 32) - 1)).to_bytes(4, "big")
        srb = srb._replace(cdb=bytes(cdb[:10]))
    elif what == 7:
        cdb[9] = random.choice((4, 1, 0xFF))  # NACA
        srb = srb._replace(cdb=bytes(cdb[:10]))
    elif what == 8:
        srb = srb._replace(cdb=bytes(cdb[: random.choice((6, 12, 16))]))
    elif what == 9:
        ranges = [GpaRange(length, PAGE - 256, (page, page))]
    elif what == 10:
        ranges = [GpaRange(length, offset, (random.choice((1 << 40, (1 << 52) - 1, 1024)),))]
    elif what == 11:
        ranges = [*ranges, *ranges]
    elif what == 12:
        flags = 0
    elif what == 13:
        slack = random.choice((0, 8, 64))
    elif what == 14:
        cdb[0] = random.choice((scsi.VERIFY, scsi.INQUIRY, scsi.SYNCHRONIZE_CACHE, scsi.READ_6, 0xFF))
        srb = srb._replace(cdb=bytes(cdb[:10]))
    elif what == 15:
        room = random.choice((1, length - 1, PAGE - offset, PAGE - offset + 1))
        ranges = [GpaRange(room, offset, (page, page))]
    payload = bytearray(wire.request(srb))
    if odd and random.random() < 0.05:
        payload[0] = random.choice((0, 4, 99))
    return Sent(gpa_direct_header(ranges) + bytes(slack), bytes(payload), flags)


def long_packet(random: Random) -> Sent:
    """A request for many pages, with more of them in its header than short ones have."""
    write = random.random() < 0.4
    length = len(LONG_PAGES) * PAGE
    lba = random.randrange(SECTORS - length // 512)
    cdb = scsi.cdb10.pack(scsi.WRITE_10 if write else scsi.READ_10, 0, lba, 0, length // 512, 0)
    header = gpa_direct_header([GpaRange(length, 0, tuple(LONG_PAGES))])
    assert len(header) > storvsp_channel.SHORT_HEADER
    return Sent(header, wire.request(Srb(0, 0, 0, cdb, int(not write), length, 0)), 1)


class Guest:
    """A guest on two disks, of which the page cache has everything."""

    def __init__(self, folder: Path, content: bytes, *, read_only: bool = False) -> None:
        folder.mkdir()
        for number in range(2):
            (folder / f"disk{number}").write_bytes(content)
        self.bench = Bench(folder, disks=2, vp_count=1, now=True, read_only=read_only)
        self.bench.loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.driver = StorvscDriver(self.bench.loop, self.bench.device.offer.instance, ring_pages=8)
        self.driver.shake_hands()
        for lun in range(2):
            self.driver.execute(bytes(6), lun=lun)  # power on
        self.next = 1 << 20

    def do(self, batch: list[Sent]) -> None:
        for one in batch:
            self.next += 1
            io = self.driver.primary.opened
            kind = VM_PKT_DATA_USING_GPA_DIRECT
            sent = io.send(one.payload, kind=kind, trans_id=self.next, flags=one.flags, header=one.header)
            assert sent
        self.bench.loop.run()
        self.driver.collect()

    def seen(self) -> tuple[dict[int, bytes], list[bytes], list[bytes], list[object]]:
        """All that was answered, and what memory and disks have; how many requests were counted."""
        disks = [path.read_bytes() for path in self.bench.paths]
        memory = [self.bench.loop.memory.read(page * PAGE, PAGE) for page in (*PAGES, *LONG_PAGES)]
        units = [self.bench.device._bus.get(0, lun).disk for lun in range(2)]  # type: ignore[union-attr]
        counts = [
            (op.value, one.requests, one.bytes, one.failed)
            for disk in units
            for op, one in disk.counters.items()
        ]
        return self.driver.answers, memory, disks, [*counts, self.bench.device._primary.requests]


@pytest.mark.parametrize("odd", [0.0, 0.15, 0.6])
def test_what_is_taken_together_is_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: float
) -> None:
    random = Random(f"plain {odd}")
    content = Random(1).randbytes(DISK_BYTES)
    together, alone = (Guest(tmp_path / name, content) for name in ("together", "alone"))
    count = 0

    def counted(*arguments: object) -> int:
        nonlocal count
        taken = take_plain(*arguments)  # type: ignore[arg-type]
        count += taken
        return taken

    try:
        for _ in range(60):
            pages = random.sample(PAGES, len(PAGES))
            few = pages[: random.randrange(1, 20)]
            batch = [packet(random, page, odd=random.random() < odd) for page in few]
            if random.random() < odd:
                batch.insert(random.randrange(len(batch)), long_packet(random))
            for guest, taker in ((together, counted), (alone, lambda *_arguments: 0)):
                monkeypatch.setattr(storvsp_channel, "take_plain", taker)
                guest.do(batch)
            assert together.seen() == alone.seen()
        assert count > 20
    finally:
        for guest in (together, alone):
            guest.bench.close()


def plain_at(lba: int, blocks: int, *, write: bool, control: int = 0) -> Sent:
    """A request for one page, whose data are a page, whatever number of blocks it names."""
    cdb = scsi.cdb10.pack(scsi.WRITE_10 if write else scsi.READ_10, 0, lba, 0, blocks, control)
    header = gpa_direct_header([GpaRange(PAGE, 0, (PAGES[0],))])
    return Sent(header + bytes(248), wire.request(Srb(0, 0, 0, cdb, int(not write), PAGE, 0)), 1)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_one_that_is_odd_only_behind_its_address_is_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: bool, read_only: bool
) -> None:
    """Its blocks may be fewer than its data: no byte beyond the disk may be written for it."""
    content = Random(1).randbytes(DISK_BYTES)
    together, alone = (Guest(tmp_path / name, content, read_only=read_only) for name in ("together", "alone"))
    usual = [plain_at(8, 8, write=write), plain_at(SECTORS - 8, 8, write=write)]
    odd = [
        plain_at(lba, blocks, write=write, control=control)
        for lba in (0, SECTORS - 8, SECTORS - 1, SECTORS)
        for blocks, control in ((0, 0), (1, 0), (7, 0), (9, 0), (255, 0), (8, scsi.NACA))
    ]
    try:
        for batch in [usual, *([one] for one in odd[-6:]), *([usual[0], one, usual[1]] for one in odd)]:
            for guest, taker in ((together, take_plain), (alone, lambda *_arguments: 0)):
                monkeypatch.setattr(storvsp_channel, "take_plain", taker)
                guest.do(batch)
            assert together.seen() == alone.seen()
        assert all(path.stat().st_size == DISK_BYTES for path in together.bench.paths)
    finally:
        for guest in (together, alone):
            guest.bench.close()
