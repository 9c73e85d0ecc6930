"""What an NVMe driver is refused while it sets a controller up, and a file that says that it has done so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from nvme_guest import DATA, IO_CQ, IO_SQ, MIB, SHADOW, NvmeGuest

from hvkvm.abi import nvme
from hvkvm.devices.pci.nvme import identify
from hvkvm.devices.pci.nvme.admin import MAX_ENTRIES, MAX_IO_QUEUES
from hvkvm.devices.pci.nvme.queues import MAX_IN_FLIGHT
from hvkvm.devices.pci.nvme.saved import ControllerState

END = 2 * MIB
CREATE_CQ, CREATE_SQ = nvme.NVME_ADMIN_CREATE_CQ, nvme.NVME_ADMIN_CREATE_SQ
DELETE_CQ, DELETE_SQ = nvme.NVME_ADMIN_DELETE_CQ, nvme.NVME_ADMIN_DELETE_SQ
SET, GET = nvme.NVME_ADMIN_SET_FEATURES, nvme.NVME_ADMIN_GET_FEATURES


@pytest.fixture
def guest(routes: Any) -> Iterator[NvmeGuest]:
    made = NvmeGuest(routes)
    made.enable()
    yield made
    made.close()


def sized(qid: int, entries: int = 4) -> int:
    return (entries - 1) << 16 | qid


@pytest.mark.parametrize(
    ("qid", "entries", "flags", "prp1", "status"),
    [
        (0, 4, 1, IO_CQ, nvme.NVME_SC_QID_INVALID),
        (MAX_IO_QUEUES + 1, 4, 1, IO_CQ, nvme.NVME_SC_QID_INVALID),
        (1, 1, 1, IO_CQ, nvme.NVME_SC_QUEUE_SIZE),
        (1, MAX_ENTRIES + 1, 1, IO_CQ, nvme.NVME_SC_QUEUE_SIZE),
        (1, 4, 0, IO_CQ, nvme.NVME_SC_INVALID_FIELD),
        (1, 4, 1, IO_CQ + 8, nvme.NVME_SC_PRP_INVALID_OFFSET),
        (1, 4, 1, END, nvme.NVME_SC_INVALID_FIELD),
        (1, 257, 1, END - 4096, nvme.NVME_SC_INVALID_FIELD),
        (2, 4, 1, IO_CQ, nvme.NVME_SC_QID_INVALID),  # which there is already
    ],
)
def test_queues_that_cannot_be(
    guest: NvmeGuest, qid: int, entries: int, flags: int, prp1: int, status: int
) -> None:
    assert guest.do(CREATE_CQ, prp1=IO_CQ, cdw=(sized(2), 1)) == (0, 0)
    assert guest.do(CREATE_SQ, prp1=IO_SQ, cdw=(sized(2), 2 << 16 | 1)) == (0, 0)
    for opcode, more in ((CREATE_CQ, 0), (CREATE_SQ, 2 << 16)):
        assert guest.do(opcode, prp1=prp1, cdw=(sized(qid, entries), more | flags))[0] == status


def test_queues_at_their_limits_can_be(guest: NvmeGuest) -> None:
    last = MAX_IO_QUEUES
    assert guest.do(CREATE_CQ, prp1=END - 4096, cdw=(sized(last, 256), 1)) == (0, 0)
    assert guest.do(CREATE_SQ, prp1=END - 4096, cdw=(sized(last, 64), last << 16 | 1)) == (0, 0)
    assert guest.do(CREATE_CQ, prp1=MIB, cdw=(sized(1, MAX_ENTRIES), 1)) == (0, 0)
    assert guest.do(CREATE_SQ, prp1=MIB, cdw=(sized(1, 2), 1 << 16 | 1)) == (0, 0)


def test_a_queue_goes_behind_those_that_use_it(guest: NvmeGuest) -> None:
    vectors = guest.device.vectors
    for vector, status in ((vectors, nvme.NVME_SC_INVALID_VECTOR), (vectors - 1, 0)):
        assert guest.do(CREATE_CQ, prp1=IO_CQ, cdw=(sized(1), vector << 16 | 3))[0] == status
    for completion in (0, 3):
        cdw = (sized(1), completion << 16 | 1)
        assert guest.do(CREATE_SQ, prp1=IO_SQ, cdw=cdw)[0] == nvme.NVME_SC_CQ_INVALID
    assert guest.do(CREATE_SQ, prp1=IO_SQ, cdw=(sized(1), 1 << 16 | 1))[0] == 0
    assert guest.do(DELETE_CQ, cdw=(1,))[0] == nvme.NVME_SC_INVALID_QUEUE
    for opcode in (DELETE_SQ, DELETE_CQ):
        for qid in (0, 2):
            assert guest.do(opcode, cdw=(qid,))[0] == nvme.NVME_SC_QID_INVALID
        assert guest.do(opcode, cdw=(1,))[0] == 0
        assert guest.do(opcode, cdw=(1,))[0] == nvme.NVME_SC_QID_INVALID


@pytest.mark.parametrize(
    ("shadow", "events"), [(SHADOW + 8, DATA), (SHADOW, DATA + 8), (END, DATA), (SHADOW, END)]
)
def test_doorbells_in_memory_that_there_is_not(guest: NvmeGuest, shadow: int, events: int) -> None:
    refused = guest.do(nvme.NVME_ADMIN_DBBUF, prp1=shadow, prp2=events)
    assert refused[0] == nvme.NVME_SC_INVALID_FIELD
    assert guest.device.save().shadow == ()


def test_features_are_kept_or_refused(guest: NvmeGuest) -> None:
    queues, temperature = nvme.NVME_FEAT_NUM_QUEUES, nvme.NVME_FEAT_TEMP_THRESH
    most = (MAX_IO_QUEUES - 1) * 0x10001
    assert guest.do(SET, cdw=(queues, 0x00070007)) == (0, most)
    assert guest.do(GET, cdw=(queues,)) == (0, most)
    for value in (0xFFFF, 0xFFFF0000):
        assert guest.do(SET, cdw=(queues, value))[0] == nvme.NVME_SC_INVALID_FIELD
    assert guest.do(SET, cdw=(temperature, 0x151)) == (0, 0)
    assert guest.do(GET, cdw=(temperature,)) == (0, 0x151)
    saving = guest.do(SET, cdw=(1 << 31 | temperature, 1))
    assert saving[0] == nvme.NVME_SC_FEATURE_NOT_SAVEABLE
    assert guest.do(SET, cdw=(nvme.NVME_FEAT_POWER_MGMT, 1))[0] == nvme.NVME_SC_INVALID_FIELD
    assert guest.do(SET, cdw=(nvme.NVME_FEAT_POWER_MGMT, 0)) == (0, 0)
    assert guest.do(SET, cdw=(nvme.NVME_FEAT_VOLATILE_WC, 0)) == (0, 0)
    assert guest.do(GET, cdw=(nvme.NVME_FEAT_VOLATILE_WC,)) == (0, 1), "the host's cache stays"
    last = guest.device.vectors - 1
    assert guest.do(GET, cdw=(nvme.NVME_FEAT_IRQ_CONFIG, last)) == (0, 1 << 16 | last)
    for opcode, cdw in ((GET, (nvme.NVME_FEAT_IRQ_CONFIG, last + 1)), (GET, (0xEE,)), (SET, (0xEE, 0))):
        assert guest.do(opcode, cdw=cdw)[0] == nvme.NVME_SC_INVALID_FIELD


def test_logs_are_as_long_as_asked_and_inside_a_page(guest: NvmeGuest) -> None:
    def log(length: int, offset: int = 0, which: int = nvme.NVME_LOG_SMART, prp1: int = DATA) -> int:
        cdw = (which | (length // 4 - 1) << 16, 0, offset)
        return guest.do(nvme.NVME_ADMIN_GET_LOG_PAGE, prp1=prp1, cdw=cdw)[0]

    guest.memory.write(DATA, b"\xa5" * 8192)
    assert log(1024) == 0
    assert guest.memory.read(DATA + 512, 1024) == bytes(512) + b"\xa5" * 512
    assert log(4096, offset=512) == 0
    assert guest.memory.read(DATA, 4100) == bytes(4096) + b"\xa5" * 4
    assert log(4, offset=516) == nvme.NVME_SC_INVALID_FIELD
    assert log(4100) == nvme.NVME_SC_INVALID_FIELD
    assert log(64, which=0xEE) == nvme.NVME_SC_INVALID_LOG_PAGE
    assert log(64, prp1=END) == nvme.NVME_SC_DATA_XFER_ERROR


def test_what_it_is_asked_of_others(guest: NvmeGuest) -> None:
    def who(cns: int, nsid: int) -> int:
        return guest.do(nvme.NVME_ADMIN_IDENTIFY, nsid=nsid, cdw=(cns,))[0]

    for cns in (nvme.NVME_ID_CNS_NS, nvme.NVME_ID_CNS_NS_DESC_LIST):
        assert (who(cns, 1), who(cns, 0)) == (0, nvme.NVME_SC_INVALID_NS)
    active = nvme.NVME_ID_CNS_NS_ACTIVE_LIST
    assert who(active, 1) == 0
    assert guest.memory.read(DATA, 4096) == bytes(4096), "none behind the first"
    assert who(active, nvme.NVME_NSID_ALL - 1) == nvme.NVME_SC_INVALID_NS
    assert who(0xEE, 1) == nvme.NVME_SC_INVALID_FIELD
    assert guest.do(nvme.NVME_ADMIN_ABORT_CMD, cdw=(0,)) == (0, 1)
    for flags in (0x01, 0x40):
        assert guest.do(nvme.NVME_ADMIN_ABORT_CMD, flags=flags)[0] == nvme.NVME_SC_INVALID_FIELD
    assert guest.do(nvme.NVME_ADMIN_DEV_SELF_TEST, nsid=2, cdw=(1,))[0] == nvme.NVME_SC_INVALID_NS
    assert guest.do(nvme.NVME_ADMIN_DEV_SELF_TEST, nsid=1, cdw=(7,))[0] == nvme.NVME_SC_INVALID_FIELD


def test_events_are_waited_for_up_to_its_limit(guest: NvmeGuest) -> None:
    for _ in range(identify.ASYNC_EVENT_LIMIT + 1):
        guest.put(0, guest.command(nvme.NVME_ADMIN_ASYNC_EVENT))
    guest.ring(0)
    guest.loop.settle()
    assert guest.take(0) == []
    assert guest.do(nvme.NVME_ADMIN_ASYNC_EVENT)[0] == nvme.NVME_SC_ASYNC_LIMIT


def saved(guest: NvmeGuest) -> ControllerState:
    guest.make_queues()
    guest.device.stop(lambda: None)
    guest.loop.settle()
    return guest.device.save()


@pytest.mark.parametrize(
    "change",
    [
        {"id": -1},
        {"id": MAX_IO_QUEUES + 1},
        {"id": 0},  # which there is already
        {"size": 1},
        {"size": MAX_ENTRIES + 1},
        {"base": IO_SQ + 8},
        {"base": END},
        {"head": -1},
        {"head": 8},
        {"tail": -1},
        {"tail": 8},
    ],
)
def test_saved_queues_are_such_as_a_driver_could_have_made(guest: NvmeGuest, change: dict[str, int]) -> None:
    state = saved(guest)
    for field in ("completions", "submissions"):
        admin, one = getattr(state, field)
        with pytest.raises(ValueError, match=r"its NVMe queue .* cannot be"):
            guest.device.load(state._replace(**{field: (admin, one._replace(**change))}))
    guest.device.load(state)


def test_what_belongs_to_a_saved_queue(guest: NvmeGuest) -> None:
    state = saved(guest)
    admin, one = state.completions
    for change in ({"vector": -1}, {"vector": guest.device.vectors}, {"phase": 2}):
        with pytest.raises(ValueError, match="completion queue 1 cannot be"):
            guest.device.load(state._replace(completions=(admin, one._replace(**change))))
    guest.device.load(state._replace(completions=(admin, one._replace(vector=guest.device.vectors - 1))))
    for owner in (0, 2):  # who answers elsewhere, and nobody
        answers = one._replace(waiting=((0, 0, owner, 1, 0),))
        with pytest.raises(ValueError, match="has answers of nobody"):
            guest.device.load(state._replace(completions=(admin, answers)))
    for count, good in ((MAX_IN_FLIGHT, True), (MAX_IN_FLIGHT + 1, False)):
        answers = one._replace(waiting=((0, 0, 1, 1, 0),) * count)
        if good:
            guest.device.load(state._replace(completions=(admin, answers)))
        else:
            with pytest.raises(ValueError, match="has answers of nobody"):
                guest.device.load(state._replace(completions=(admin, answers)))
    admin_queue, queue = state.submissions
    with pytest.raises(ValueError, match="submission queue 1 has no completion queue"):
        guest.device.load(state._replace(submissions=(admin_queue, queue._replace(completion=2))))
    for shadow in ((SHADOW,), (SHADOW, DATA, DATA), (SHADOW + 8, DATA), (SHADOW, DATA + 8), (SHADOW, END)):
        with pytest.raises(ValueError, match="doorbell buffer is nowhere"):
            guest.device.load(state._replace(shadow=shadow))
    guest.device.load(state._replace(shadow=(SHADOW, DATA)))
