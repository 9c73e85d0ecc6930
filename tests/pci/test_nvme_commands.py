"""What an NVMe command asks of the block layer, where its data lie, and what is refused before that."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from nvme_guest import DATA, MIB, SECTORS, NvmeGuest, ram

from hvkvm.abi import nvme
from hvkvm.block.request import Op, Request, Status
from hvkvm.devices.pci.nvme.identify import MAX_TRANSFER
from hvkvm.devices.pci.nvme.prp import PrpError, buffers
from hvkvm.memory.guest import GuestMemory

PAGE = 4096
READ, WRITE, FLUSH = nvme.NVME_CMD_READ, nvme.NVME_CMD_WRITE, nvme.NVME_CMD_FLUSH
ZEROES, MANAGE = nvme.NVME_CMD_WRITE_ZEROES, nvme.NVME_CMD_DSM
LIST = 0x3E000


@pytest.fixture
def guest(routes: Any) -> Iterator[NvmeGuest]:
    made = NvmeGuest(routes)
    made.enable()
    made.make_queues()
    made.disk.seen.clear()
    yield made
    made.close()


def asked(guest: NvmeGuest) -> list[Request]:
    """What the disk was asked since this was called last."""
    seen, guest.disk.seen = guest.disk.seen, []
    return seen


def test_a_flush_flushes(guest: NvmeGuest) -> None:
    for nsid in (1, nvme.NVME_NSID_ALL):
        assert guest.do(FLUSH, queue=1, nsid=nsid)[0] == 0
        assert [one.op for one in asked(guest)] == [Op.FLUSH]
    guest.disk.status = Status.ERROR
    assert guest.do(FLUSH, queue=1, nsid=1)[0] == nvme.NVME_SC_WRITE_FAULT


def test_only_a_write_that_says_so_goes_through_the_cache(guest: NvmeGuest) -> None:
    for opcode, flag, fua in ((WRITE, 0, False), (WRITE, 1, True), (READ, 1, False)):
        assert guest.io(opcode, cdw=(0, 0, flag * nvme.NVME_RW_FUA)) == 0
        assert [one.fua for one in asked(guest)] == [fua]


def test_zeros_may_be_holes_only_where_the_guest_says_so(guest: NvmeGuest) -> None:
    for flag in (0, 1):
        assert guest.io(ZEROES, cdw=(5, 0, 6 | flag * nvme.NVME_WZ_DEAC)) == 0
        (one,) = asked(guest)
        assert (one.op, one.offset, one.length, one.may_unmap) == (
            Op.WRITE_ZEROES,
            5 * 512,
            7 * 512,
            bool(flag),
        )


def test_ranges_are_all_on_the_disk_or_none_is_discarded(guest: NvmeGuest) -> None:
    def manage(*ranges: tuple[int, int], flags: int = nvme.NVME_DSMGMT_AD, prp1: int = DATA) -> int:
        raw = b"".join(nvme.DSM_RANGE.pack(0, count, first) for first, count in ranges)
        guest.memory.write(DATA, raw)
        return guest.do(MANAGE, queue=1, nsid=1, prp1=prp1, cdw=(len(ranges) - 1, flags))[0]

    assert manage((0, 1), (7, 0), (SECTORS - 2, 2)) == 0
    assert [(one.op, one.offset // 512, one.length // 512) for one in asked(guest)] == [
        (Op.DISCARD, 0, 1),
        (Op.DISCARD, SECTORS - 2, 2),
    ]
    assert manage((0, 1), (SECTORS - 2, 3)) == nvme.NVME_SC_LBA_RANGE
    assert manage((0, 1), flags=0) == 0
    assert manage((0, 1), prp1=1 << 40) == nvme.NVME_SC_DATA_XFER_ERROR
    assert not asked(guest)


def test_what_is_refused_reaches_no_disk(guest: NvmeGuest) -> None:
    for flags in (0x01, 0x02, 0x40, 0x80):  # fused; SGLs
        assert guest.io(READ, flags=flags) == nvme.NVME_SC_INVALID_FIELD
    for opcode in (READ, WRITE, ZEROES, MANAGE, FLUSH):
        for nsid in (0, 2) if opcode == FLUSH else (0, 2, nvme.NVME_NSID_ALL):
            assert guest.do(opcode, queue=1, nsid=nsid)[0] == nvme.NVME_SC_INVALID_NS
    for opcode in (READ, WRITE, ZEROES):
        assert guest.io(opcode, SECTORS - 1) == 0
        guest.disk.seen.clear()
        assert guest.io(opcode, SECTORS - 1, 2, prp1=DATA) == nvme.NVME_SC_LBA_RANGE
    guest.disk.seen.clear()
    assert guest.io(READ, 0, MAX_TRANSFER // 512 + 1) == nvme.NVME_SC_INVALID_FIELD
    assert not asked(guest)


def test_the_longest_transfer_that_it_says_it_takes(guest: NvmeGuest) -> None:
    pages = MAX_TRANSFER // PAGE
    guest.memory.write(LIST, struct.pack(f"<{pages - 1}Q", *range(MIB + PAGE, 2 * MIB, PAGE)))
    guest.memory.write(MIB, bytes(range(256)) * (MIB // 256))
    assert guest.io(WRITE, 0, MAX_TRANSFER // 512, prp1=MIB, prp2=LIST) == 0
    assert guest.disk.data[:MAX_TRANSFER] == bytes(range(256)) * (MIB // 256)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """RAM whose second half has every page's number in it."""
    with ram() as made:
        for page in range(MIB, 2 * MIB, PAGE):
            made.write(page, struct.pack("<Q", page) * (PAGE // 8))
        yield made


@pytest.mark.parametrize("at", [LIST, LIST + 8, LIST + PAGE - 16, LIST + PAGE - 8])
@pytest.mark.parametrize("length", [2 * PAGE + 8, 5 * PAGE, 9 * PAGE - 512, 20 * PAGE])
@pytest.mark.parametrize("within", [0, 512, PAGE - 8])
def test_data_lie_where_a_list_says_that_they_do(
    memory: GuestMemory, at: int, length: int, within: int
) -> None:
    """In that order. An entry at the end of a page leads on, but where it is the last."""
    random = Random(f"{at} {length} {within}")
    pages = random.sample(range(MIB, 2 * MIB, PAGE), -(-(within + length) // PAGE))
    if random.random() < 0.5:
        pages.sort()  # so that some lie side by side
    left, place, following = pages[1:], at, LIST + 5 * PAGE
    while left:
        room = (PAGE - place % PAGE) // 8
        here = left if len(left) <= room else left[: room - 1]
        left = left[len(here) :]
        memory.write(place, struct.pack(f"<{len(here)}Q", *here))
        if left:
            memory.write(place + 8 * len(here), struct.pack("<Q", following))
            place = following
    if len(pages) == 2:
        at = pages[1]
    views = buffers(memory, pages[0] + within, at, length)
    whole = b"".join(struct.pack("<Q", page) * (PAGE // 8) for page in pages)
    assert b"".join(map(bytes, views)) == whole[within : within + length]


@pytest.mark.parametrize(
    ("prp1", "prp2", "pages"),
    [
        (MIB + 2, 0, 1),
        (MIB, MIB + 8, 2),
        (MIB, LIST + 4, 3),
        (MIB, LIST + 512, 3),
        (MIB, LIST + PAGE - 8, 3),
    ],
)
def test_prps_that_are_not_aligned_are_refused(memory: GuestMemory, prp1: int, prp2: int, pages: int) -> None:
    memory.write(LIST + 512, struct.pack("<2Q", MIB, MIB + 512))
    memory.write(LIST + PAGE - 8, struct.pack("<Q", LIST + 8))
    with pytest.raises(PrpError) as refused:
        buffers(memory, prp1, prp2, pages * PAGE)
    assert refused.value.status == nvme.NVME_SC_PRP_INVALID_OFFSET | nvme.NVME_STATUS_DNR
