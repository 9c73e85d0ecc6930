"""The NVMe controller against a driver in the test: commands, queues, resets, and drivers that mean harm."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvme_guest import ADMIN_CQ, DATA, ENTRIES, EVENTS, IO_CQ, IO_SQ, MIB, SECTORS, SHADOW, NvmeGuest, ram

from hvkvm.abi import nvme, pci
from hvkvm.block.request import Op, Status
from hvkvm.devices.pci.nvme.controller import MAX_COMMANDS, ControllerState
from hvkvm.devices.pci.nvme.prp import PrpError, buffers
from hvkvm.state import codec

READ, WRITE, FLUSH = nvme.NVME_CMD_READ, nvme.NVME_CMD_WRITE, nvme.NVME_CMD_FLUSH


@pytest.fixture
def guest(routes: Any) -> Iterator[NvmeGuest]:
    made = NvmeGuest(routes)
    made.enable()
    yield made
    made.close()


def test_it_says_what_it_is(guest: NvmeGuest) -> None:
    assert guest.reg(nvme.NVME_REG_VS) == nvme.NVME_VS_1_4
    assert guest.reg(nvme.NVME_REG_CAP, size=8) & 0xFFFF == 1023
    assert guest.do(nvme.NVME_ADMIN_IDENTIFY, cdw=(nvme.NVME_ID_CNS_CTRL,)) == (0, 0)
    data = guest.memory.read(DATA, 4096)
    assert (data[4:24].rstrip(), data[77], data[516]) == (b"hvkvm-0", 8, 1)
    assert guest.do(nvme.NVME_ADMIN_IDENTIFY, nsid=1, cdw=(nvme.NVME_ID_CNS_NS,)) == (0, 0)
    data = guest.memory.read(DATA, 4096)
    assert (struct.unpack_from("<Q", data)[0], data[130]) == (SECTORS, 9)
    assert guest.do(nvme.NVME_ADMIN_IDENTIFY, cdw=(nvme.NVME_ID_CNS_NS_ACTIVE_LIST,)) == (0, 0)
    assert guest.memory.read(DATA, 8) == b"\1\0\0\0\0\0\0\0"
    assert guest.do(nvme.NVME_ADMIN_IDENTIFY, nsid=2, cdw=(0,))[0] == nvme.NVME_SC_INVALID_NS
    for log, length in ((1, 64), (2, 512), (3, 512)):
        assert guest.do(nvme.NVME_ADMIN_GET_LOG_PAGE, cdw=(log | (length // 4 - 1) << 16,)) == (0, 0)


def test_data_goes_to_the_disk_and_back(guest: NvmeGuest) -> None:
    guest.make_queues()
    guest.memory.write(DATA, bytes(range(256)) * 16)
    assert guest.io(WRITE, 3, 8) == 0
    assert guest.disk.data[3 * 512 : 11 * 512] == bytes(range(256)) * 16
    assert guest.io(READ, 4, 2, prp1=DATA + 0x1E00, prp2=DATA + 0x4000) == 0
    assert guest.memory.read(DATA + 0x1E00, 512) == bytes(range(256)) * 2
    assert guest.memory.read(DATA + 0x4000, 512) == bytes(range(256)) * 2
    assert guest.do(FLUSH, queue=1, nsid=1)[0] == 0
    assert guest.io(nvme.NVME_CMD_WRITE_ZEROES, 3, 4) == 0
    assert not any(guest.disk.data[3 * 512 : 7 * 512])
    guest.memory.write(DATA, nvme.DSM_RANGE.pack(0, 2, 7) + nvme.DSM_RANGE.pack(0, 1, 10))
    assert guest.do(nvme.NVME_CMD_DSM, queue=1, nsid=1, cdw=(1, nvme.NVME_DSMGMT_AD))[0] == 0
    assert [one.op for one in guest.disk.seen[-2:]] == [Op.DISCARD] * 2
    assert guest.io(WRITE, 0, 1, cdw=(0, 0, nvme.NVME_RW_FUA)) == 0
    assert guest.disk.seen[-1].fua


def test_what_the_block_layer_says_reaches_the_guest(guest: NvmeGuest) -> None:
    guest.make_queues()
    for status, op, expected in (
        (Status.NO_SPACE, WRITE, nvme.NVME_SC_CAP_EXCEEDED),
        (Status.ERROR, READ, nvme.NVME_SC_READ_ERROR),
        (Status.ERROR, WRITE, nvme.NVME_SC_WRITE_FAULT),
        (Status.READ_ONLY, WRITE, nvme.NVME_SC_NS_WRITE_PROTECTED),
    ):
        guest.disk.status = status
        assert guest.io(op) == expected
    guest.disk.status = Status.OK
    assert guest.io(READ, SECTORS - 1, 2) == nvme.NVME_SC_LBA_RANGE
    assert guest.io(READ, (1 << 63) - 1, 2) == nvme.NVME_SC_LBA_RANGE
    assert guest.do(0x77, queue=1, nsid=1)[0] == nvme.NVME_SC_INVALID_OPCODE
    assert guest.io(READ, 0, prp1=1 << 40) == nvme.NVME_SC_DATA_XFER_ERROR


def test_interrupts_are_msix_or_a_line(guest: NvmeGuest) -> None:
    guest.make_queues(vector=3)
    assert guest.io(READ) == 0
    guest.loop.settle()
    assert guest.intx[-1] is False, "the guest has seen the entry"
    assert True in guest.intx
    for offset, value in ((0x30, 0xFEE00000), (0x34, 0), (0x38, 0x55), (0x3C, 0)):
        guest.reg(0x2000 + offset, value)
    function = guest.device.function
    function.write(function.capability_offsets[0x11] + 2, 2, 0x8000)
    assert guest.io(READ) == 0
    assert guest.routes.sent == [(0xFEE00000, 0x55)]


def test_a_line_falls_when_messages_are_switched_on(guest: NvmeGuest) -> None:
    """It stayed up for as long as they were on, in a restored machine too."""
    guest.make_queues()
    guest.put(1, guest.command(READ, nsid=1))
    guest.ring(1)
    guest.loop.settle()
    assert guest.intx[-1]
    function = guest.device.function
    for capability, register, on in (
        (pci.PCI_CAP_ID_MSIX, pci.PCI_MSIX_FLAGS, pci.PCI_MSIX_FLAGS_ENABLE),
        (pci.PCI_CAP_ID_MSI, pci.PCI_MSI_FLAGS, pci.PCI_MSI_FLAGS_ENABLE),
    ):
        for flags in (on, 0):
            function.write(function.capability_offsets[capability] + register, 2, flags)
            guest.loop.settle()
            assert guest.intx[-1] is not bool(flags)


def test_interrupts_by_plain_msi_heed_the_controllers_masks(guest: NvmeGuest) -> None:
    guest.make_queues(vector=3)
    function = guest.device.function
    at = function.capability_offsets[pci.PCI_CAP_ID_MSI]
    function.write(at + pci.PCI_MSI_ADDRESS_LO, 4, 0xFEE00000)
    function.write(at + pci.PCI_MSI_DATA_64, 2, 0x60)
    function.write(at + pci.PCI_MSI_FLAGS, 2, pci.PCI_MSI_FLAGS_ENABLE | 2 << 4)
    assert guest.io(READ) == 0
    assert guest.routes.sent == [(0xFEE00000, 0x63)]
    guest.reg(nvme.NVME_REG_INTMS, 1 << 3)
    assert [guest.io(READ), guest.io(READ)] == [0, 0]
    assert len(guest.routes.sent) == 1
    guest.reg(nvme.NVME_REG_INTMC, 1 << 3)
    guest.loop.settle()
    assert len(guest.routes.sent) == 2, "once for what came meanwhile"
    assert guest.do(nvme.NVME_ADMIN_IDENTIFY, cdw=(1,))[0] == 0
    assert guest.routes.sent[2:] == [(0xFEE00000, 0x60)]


def test_a_full_completion_queue_waits_for_the_guest(guest: NvmeGuest) -> None:
    guest.make_queues()
    for _ in range(3):
        for _ in range(ENTRIES - 1):
            guest.put(1, guest.command(READ, nsid=1))
        guest.ring(1)
        guest.loop.settle()
    queue = guest.device.queues.submissions[1]
    assert queue.in_flight == 2 * (ENTRIES - 1), "they wait for room"
    seen = 0
    for _ in range(5):
        seen += len(guest.take(1))
        guest.loop.settle()
    assert (seen, queue.in_flight) == (3 * (ENTRIES - 1), 0)


def test_a_reset_waits_for_the_workers_and_answers_nobody(guest: NvmeGuest) -> None:
    guest.make_queues()
    guest.disk.held = True
    guest.put(1, guest.command(READ, nsid=1))
    guest.ring(1)
    guest.loop.settle()
    guest.reg(nvme.NVME_REG_CC, 0x00460000)
    guest.loop.settle()
    assert guest.reg(nvme.NVME_REG_CSTS) & nvme.NVME_CSTS_RDY, "a worker still has the guest's pages"
    guest.disk.release()
    guest.loop.settle()
    assert guest.reg(nvme.NVME_REG_CSTS) == 0
    assert not any(guest.memory.read(IO_CQ, 16 * ENTRIES))
    guest.disk.held = False
    guest.memory.zero(ADMIN_CQ, 16 * ENTRIES)
    guest.heads, guest.phases, guest.tails = {0: 0, 1: 0}, {0: 1, 1: 1}, {0: 0, 1: 0}
    guest.enable()
    guest.make_queues()
    assert guest.io(READ) == 0


def test_a_queue_is_deleted_when_it_is_idle(guest: NvmeGuest) -> None:
    guest.make_queues()
    guest.disk.held = True
    guest.put(1, guest.command(READ, nsid=1))
    guest.ring(1)
    guest.loop.settle()
    assert guest.do(nvme.NVME_ADMIN_DELETE_CQ, cdw=(1,))[0] == nvme.NVME_SC_INVALID_QUEUE
    guest.put(0, guest.command(nvme.NVME_ADMIN_DELETE_SQ, cdw=(1,)))
    guest.ring(0)
    guest.loop.settle()
    assert guest.take(0) == []
    guest.disk.release()
    guest.loop.settle()
    assert [one[1] for one in guest.take(0)] == [0]
    assert guest.do(nvme.NVME_ADMIN_DELETE_CQ, cdw=(1,))[0] == 0
    assert guest.do(nvme.NVME_ADMIN_DELETE_SQ, cdw=(1,))[0] == nvme.NVME_SC_QID_INVALID


def test_a_shutdown_flushes(guest: NvmeGuest) -> None:
    guest.reg(nvme.NVME_REG_CC, 0x00464001)
    guest.loop.settle()
    assert guest.reg(nvme.NVME_REG_CSTS) & 0xC == nvme.NVME_CSTS_SHST_CMPLT
    assert guest.disk.seen[-1].op is Op.FLUSH


def test_it_is_enabled_again_behind_a_shutdown(guest: NvmeGuest) -> None:
    """FreeBSD, SPDK and edk2 clear EN in what they read of CC: what asked for the shutdown stays in it."""

    def control(value: int) -> int:
        guest.reg(nvme.NVME_REG_CC, value)
        guest.loop.settle()
        return guest.reg(nvme.NVME_REG_CSTS)

    enabled, shutdown = 0x00460001, 0x4000
    for round_ in range(1, 3):
        assert control(enabled | shutdown) == nvme.NVME_CSTS_RDY | nvme.NVME_CSTS_SHST_CMPLT
        assert sum(request.op is Op.FLUSH for request in guest.disk.seen) == round_
        assert control(guest.reg(nvme.NVME_REG_CC) & ~nvme.NVME_CC_ENABLE) == 0
        assert not guest.reg(nvme.NVME_REG_CC) & nvme.NVME_CC_SHN_MASK
        assert control(enabled) == nvme.NVME_CSTS_RDY
    control(enabled & ~nvme.NVME_CC_ENABLE)
    assert control(enabled & ~nvme.NVME_CC_ENABLE | shutdown) == 0, "it is not up"
    assert control(enabled) == nvme.NVME_CSTS_RDY
    assert len(guest.disk.seen) == 2


def test_a_shutdown_asked_for_in_a_reset_comes_behind_it(guest: NvmeGuest) -> None:
    guest.make_queues()
    guest.disk.held = True
    guest.put(1, guest.command(READ, nsid=1))
    guest.ring(1)
    guest.loop.settle()
    for value in (0x00460000, 0x00464001):
        guest.reg(nvme.NVME_REG_CC, value)
        guest.loop.settle()
    assert [request.op for request in guest.disk.seen] == [Op.READ], "a worker still has the guest's pages"
    guest.disk.held = False
    guest.disk.release()
    guest.loop.settle()
    assert guest.reg(nvme.NVME_REG_CSTS) == nvme.NVME_CSTS_RDY | nvme.NVME_CSTS_SHST_CMPLT
    assert guest.disk.seen[-1].op is Op.FLUSH


def test_a_shutdown_is_saved_and_one_of_what_is_not_up_forgotten(guest: NvmeGuest, new_routes: Any) -> None:
    """Older versions saved controllers that said so while they were not up, and never came up again."""
    guest.reg(nvme.NVME_REG_CC, 0x00464001)
    guest.device.stop(lambda: None)
    guest.loop.settle()
    state = guest.device.save()
    shut = nvme.NVME_CSTS_RDY | nvme.NVME_CSTS_SHST_CMPLT
    assert state.csts == shut
    for saved, csts in (
        (state, shut),
        (state._replace(cc=0x00460001, csts=shut & ~1, submissions=(), completions=()), nvme.NVME_CSTS_RDY),
    ):
        other = NvmeGuest(new_routes(), guest.memory)
        other.device.stop(lambda: None)
        other.device.load(saved)
        other.device.start()
        other.loop.settle()
        assert other.reg(nvme.NVME_REG_CSTS) == csts
        assert other.disk.seen == []
        other.device.close()


def test_doorbells_in_memory_ring_only_when_asked_to(guest: NvmeGuest) -> None:
    guest.make_queues()
    assert guest.do(nvme.NVME_ADMIN_DBBUF, prp1=SHADOW, prp2=EVENTS) == (0, 0)
    (bell,) = guest.bells.values()
    assert list(guest.bells) == [0xC0001008]
    for round_ in range(3 * ENTRIES):
        guest.put(1, guest.command(READ, nsid=1))
        guest.memory.write_u32(SHADOW + 8, guest.tails[1])
        before = guest.memory.read_u32(EVENTS + 8)
        assert before == (guest.tails[1] - 1) % ENTRIES, "it sleeps, and wants to be rung"
        bell()
        guest.loop.settle()
        assert len(guest.take(1, ring=False)) == 1, round_
        guest.memory.write_u32(SHADOW + 12, guest.heads[1])
    guest.device.moved(guest.device.function.bars[0], 0xD0000000)
    guest.loop.settle()
    assert list(guest.bells) == [0xD0001008]


def test_with_doorbells_in_memory_the_line_falls_when_the_driver_has_read(guest: NvmeGuest) -> None:
    """The driver looks at the event index as Linux does, and else does not ring: then INTx would stay up."""
    guest.make_queues()
    assert guest.do(nvme.NVME_ADMIN_DBBUF, prp1=SHADOW, prp2=EVENTS) == (0, 0)
    (bell,) = guest.bells.values()
    for round_ in range(3 * ENTRIES):
        for _ in range(1 + round_ % 2):
            guest.put(1, guest.command(READ, nsid=1))
        guest.memory.write_u32(SHADOW + 8, guest.tails[1])
        bell()
        guest.loop.settle()
        assert guest.intx[-1], round_
        old = guest.heads[1]
        assert guest.take(1, ring=False)
        new = guest.heads[1]
        guest.memory.write_u32(SHADOW + 12, new)
        event = guest.memory.read_u32(EVENTS + 12)
        assert (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF, "it wants to be rung"
        guest.reg(nvme.NVME_REG_DBS + 12, new)
        guest.loop.settle()
        assert not guest.intx[-1], round_


def test_saved_it_goes_on_as_if_nothing_had_been(guest: NvmeGuest, new_routes: Any) -> None:
    guest.make_queues()
    guest.do(nvme.NVME_ADMIN_SET_FEATURES, cdw=(nvme.NVME_FEAT_ASYNC_EVENT, 0x300))
    guest.put(0, guest.command(nvme.NVME_ADMIN_ASYNC_EVENT))
    guest.ring(0)
    guest.loop.settle()
    for _ in range(2):
        for _ in range(ENTRIES - 1):
            guest.put(1, guest.command(READ, nsid=1))
        guest.ring(1)
        guest.loop.settle()
    stopped: list[int] = []
    guest.device.stop(lambda: stopped.append(1))
    guest.loop.settle()
    assert stopped == [1]
    guest.put(1, guest.command(READ, nsid=1))
    guest.ring(1)
    guest.loop.settle()
    state = guest.device.save()
    assert codec.restored(ControllerState, codec.plain(state), "test") == state
    function = guest.device.function.save()
    other = NvmeGuest(new_routes(), guest.memory)
    stopped.clear()
    other.device.stop(lambda: stopped.append(1))
    other.loop.settle()
    other.device.function.load(function)
    other.device.load(state)
    assert other.device.save() == state
    other.device.moved(other.device.function.bars[0], 0xC0000000)
    other.heads, other.phases, other.tails = guest.heads, guest.phases, guest.tails
    other.device.start()
    other.ring(1)  # what a stopped one did not hear was in its doorbells
    seen = 0
    for _ in range(4):
        other.loop.settle()
        seen += len(other.take(1))
    assert seen == 2 * (ENTRIES - 1) + 1
    other.device.stop(lambda: None)
    other.device.reset()
    other.device.close()


def test_its_smart_log_counts_on_in_a_restored_machine(guest: NvmeGuest, new_routes: Any) -> None:
    """What it had read and written was nothing again."""

    def counted(one: NvmeGuest) -> tuple[int, ...]:
        words = ((512 // 4 - 1) << 16 | nvme.NVME_LOG_SMART,)
        assert one.do(nvme.NVME_ADMIN_GET_LOG_PAGE, prp1=DATA, cdw=words) == (0, 0)
        return struct.unpack_from("<QxxxxxxxxQxxxxxxxxQxxxxxxxxQ", one.memory.read(DATA, 512), 32)

    for op, requests, size in ((Op.READ, 3, 700_000), (Op.WRITE, 2, 100)):
        guest.disk.counters[op].requests, guest.disk.counters[op].bytes = requests, size
    before = counted(guest)
    assert before == (2, 1, 3, 2)
    guest.device.stop(lambda: None)
    guest.loop.settle()
    state = codec.restored(ControllerState, codec.plain(guest.device.save()), "test")
    other = NvmeGuest(new_routes(), memory=guest.memory)
    other.device.stop(lambda: None)
    other.device.load(state)
    other.device.start()
    other.tails, other.heads, other.phases = guest.tails, guest.heads, guest.phases
    assert counted(other) == before
    other.disk.counters[Op.READ].bytes += 400_000
    assert counted(other) == (3, 1, 3, 2)
    other.device.stop(lambda: None)
    assert other.device.save().moved == (1_100_000, 100, 3, 2)
    other.device.close()


def self_test_log(guest: NvmeGuest) -> bytes:
    words = ((564 // 4 - 1) << 16 | nvme.NVME_LOG_DEVICE_SELF_TEST,)
    assert guest.do(nvme.NVME_ADMIN_GET_LOG_PAGE, prp1=DATA, cdw=words) == (0, 0)
    return guest.memory.read(DATA, 564)


def test_it_tests_itself(guest: NvmeGuest) -> None:
    """What a test finds is in its log, newest first; one runs at a time, and may be ended."""
    start = nvme.NVME_ADMIN_DEV_SELF_TEST
    assert self_test_log(guest) == bytes(4) + (b"\x0f" + bytes(27)) * 20
    assert guest.do(start, nsid=1, cdw=(1,)) == (0, 0)
    assert [request.op for request in guest.disk.seen] == [Op.READ] * 3
    guest.disk.status = Status.ERROR
    assert guest.do(start, nsid=0xFFFFFFFF, cdw=(2,)) == (0, 0)
    guest.disk.status, guest.disk.held = Status.OK, True
    assert guest.do(start, cdw=(1,)) == (0, 0)
    assert guest.do(start, cdw=(1,)) == (nvme.NVME_SC_SELT_TEST_IN_PROGRESS, 0)
    assert self_test_log(guest)[0] == 1
    assert guest.do(start, cdw=(0xF,)) == (0, 0)
    guest.disk.held = False
    guest.disk.release()
    guest.loop.settle()
    for wrong in ({"cdw": (3,)}, {"cdw": (1,), "nsid": 2}):
        assert guest.do(start, **wrong)[0] != 0
    found = self_test_log(guest)
    results = [found[4 + 28 * index] for index in range(4)]
    assert (found[0], results) == (0, [0x11, 0x27, 0x10, 0x0F])
    assert struct.unpack_from("<I", found, 4 + 28 * 2 + 12) == (1,)
    for _ in range(25):
        assert guest.do(start, cdw=(1,)) == (0, 0)
    found = self_test_log(guest)
    assert {found[4 + 28 * index] for index in range(20)} == {0x10}


def test_a_test_that_was_ended_keeps_its_reads_until_they_are_answered(guest: NvmeGuest) -> None:
    """Tests begun and ended in turn leave three reads at a disk that does not answer, over resets, too."""
    start = nvme.NVME_ADMIN_DEV_SELF_TEST
    guest.disk.held = True
    assert guest.do(start, cdw=(1,)) == (0, 0)
    for _ in range(10):
        assert guest.do(start, cdw=(0xF,)) == (0, 0)
        assert guest.do(start, cdw=(1,)) == (nvme.NVME_SC_SELT_TEST_IN_PROGRESS, 0)
    guest.device.self_test.reset()
    assert guest.do(start, cdw=(1,)) == (nvme.NVME_SC_SELT_TEST_IN_PROGRESS, 0)
    assert len(guest.disk.waiting) == 3
    guest.disk.release()
    assert self_test_log(guest)[4] == 0x11
    assert self_test_log(guest)[4 + 28] == 0x0F
    guest.disk.held = False
    assert guest.do(start, cdw=(1,)) == (0, 0)
    assert self_test_log(guest)[4] == 0x10


def test_a_state_that_cannot_be_is_refused(guest: NvmeGuest) -> None:
    guest.make_queues()
    guest.device.stop(lambda: None)
    state = guest.device.save()
    good = state.completions[1]
    for wrong in (
        good._replace(id=0),
        good._replace(base=1 << 50),
        good._replace(head=1 << 20),
        good._replace(vector=99),
        good._replace(phase=7),
        good._replace(waiting=((0, 0, 9, 1, 0),)),
    ):
        with pytest.raises(ValueError, match="NVMe"):
            guest.device.load(state._replace(completions=(state.completions[0], wrong)))
    with pytest.raises(ValueError, match="doorbell"):
        guest.device.load(state._replace(shadow=(1 << 50, 0)))


@given(
    prp1=st.integers(0, 2 * MIB) | st.integers(0, 2**64 - 1),
    prp2=st.integers(0, 2 * MIB) | st.integers(0, 2**64 - 1) | st.just(0x10000),
    length=st.integers(1, 1 << 20),
    pages=st.lists(st.integers(0, 600).map(lambda n: n * 4096) | st.integers(0, 2**64 - 1), max_size=300),
)
def test_prps_are_inside_ram_and_as_long_as_asked_or_refused(
    prp1: int, prp2: int, length: int, pages: list[int]
) -> None:
    with ram() as memory:
        memory.write(0x10000, struct.pack(f"<{len(pages)}Q", *pages))
        try:
            views = buffers(memory, prp1, prp2, length)
        except PrpError as error:
            assert error.status & 0xFF in (nvme.NVME_SC_PRP_INVALID_OFFSET, nvme.NVME_SC_DATA_XFER_ERROR)
        else:
            assert sum(map(len, views)) == length
            for view in views:
                view.release()


registers = st.tuples(
    st.just("reg"),
    st.sampled_from([*range(0, 0x40, 4), 0x1000, 0x1004, 0x1008, 0x100C, 0x1010, 0x2000, 0x200C, 0x2800]),
    st.sampled_from((1, 2, 4, 8)),
    st.integers(0, 2**64 - 1) | st.integers(0, 16) | st.sampled_from((0x00460001, 0x00460000, 0x464001)),
)
entries = st.tuples(
    st.just("entry"),
    st.sampled_from((0, 1)),
    st.integers(0, 12) | st.integers(0, 255) | st.just(0x7C),
    st.tuples(
        *[st.integers(0, 2**32 - 1) | st.integers(0, 9) | st.sampled_from((0x70001, 0x10001, 0x30003))] * 3
    ),
    st.sampled_from((DATA, IO_SQ, IO_CQ, SHADOW, 1 << 41, DATA + 4)) | st.integers(0, 2**64 - 1),
)
noise = st.tuples(st.just("ram"), st.integers(0, 0x7FFFF), st.binary(min_size=1, max_size=64))
config = st.tuples(
    st.just("config"), st.integers(0x20, 0x40).map(lambda n: 2 * n), st.integers(0, 0xFFFF) | st.just(0x8001)
)
others = st.sampled_from((("bell",), ("rest",), ("hold",), ("release",), ("moved",)))


@given(steps=st.lists(registers | entries | noise | config | others, max_size=40))
def test_a_hostile_driver_gets_answers_or_nothing(new_routes: Any, steps: list[Any]) -> None:
    """Nothing raises, nothing grows, the loop comes to rest, and it can be reset after all."""
    guest = NvmeGuest(new_routes())
    guest.enable()
    guest.make_queues()
    for step in steps:
        if step[0] == "reg":
            guest.device.write(step[1], step[2], step[3] & (1 << 8 * step[2]) - 1)
            guest.device.read(step[1], step[2])
        elif step[0] == "entry":
            _kind, queue, opcode, words, prp = step
            guest.put(queue, guest.command(opcode, nsid=1, prp1=prp, prp2=prp, cdw=words))
            guest.ring(queue)
        elif step[0] == "config":
            guest.device.function.write(step[1], 2, step[2])
        elif step[0] == "ram":
            guest.memory.write(step[1], step[2])
        elif step[0] == "bell":
            for bell in list(guest.bells.values()):
                bell()
        elif step[0] == "hold":
            guest.disk.held = True
        elif step[0] == "release":
            guest.disk.held = False
            guest.disk.release()
        elif step[0] == "moved":
            guest.device.moved(guest.device.function.bars[0], None)
        guest.loop.settle()
        assert len(guest.disk.waiting) <= MAX_COMMANDS + 1
        assert len(guest.device.admin.events) <= 4
    guest.disk.held = False
    guest.disk.release()
    guest.loop.settle()
    stopped: list[int] = []
    guest.device.stop(lambda: stopped.append(1))
    guest.loop.settle()
    assert stopped == [1]
    state = guest.device.save()
    guest.device.load(state)
    guest.device.reset()
    assert guest.device.save().submissions == ()
    assert guest.bells == {}
    guest.close()
