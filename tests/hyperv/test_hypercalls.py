"""HvPostMessage and HvSignalEvent: what is checked, in which order (S44 to S51, S53, S56)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fake_kvm import FakeVm
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.hyperv.hypercalls import Hypercalls
from hvkvm.memory.guest import GuestMemory

RAM = 4 << 20
POST, SIGNAL, FAST = 0x5C, 0x5D, 1 << 16
INPUT = 0x1000


class Tables:
    """Connections 1 and 0xABCDEF; keeps what they heard."""

    def __init__(self) -> None:
        self.messages: list[hv_post_message_input] = []
        self.signals: list[int] = []
        self.status = 0

    def post(self, message: hv_post_message_input) -> int:
        if message.connection_id & 0xFFFFFF != 1:
            return HvStatus.INVALID_CONNECTION_ID
        self.messages.append(message)
        return self.status

    def signal(self, conn_id: int) -> int:
        self.signals.append(conn_id)
        return 0 if conn_id in (1, 0xABCDEF) else HvStatus.INVALID_CONNECTION_ID


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(FakeVm(), RAM)
    yield memory
    memory.close()


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def calls(memory: GuestMemory, tables: Tables) -> Hypercalls:
    return Hypercalls(memory, tables)


def put(memory: GuestMemory, gpa: int, *, conn_id: int = 1, size: int = 0, body: bytes = b"") -> None:
    memory.write(gpa, struct.pack("<IIII", conn_id, 0, 7, size) + body)


def test_s44_checks_come_in_this_order(memory: GuestMemory, tables: Tables, calls: Hypercalls) -> None:
    """Each input has every fault from some point on; only the first may be told."""
    outside = RAM
    put(memory, INPUT, conn_id=99, size=241)
    put(memory, INPUT + 0x1000, conn_id=99, size=240)
    put(memory, INPUT + 0x2000, conn_id=1, size=240)
    assert calls.call(POST | FAST, outside + 2) == HvStatus.INVALID_HYPERCALL_CODE
    assert calls.call(POST, outside + 2) == HvStatus.INVALID_ALIGNMENT
    assert calls.call(POST, outside) == HvStatus.INSUFFICIENT_MEMORY
    assert calls.call(POST, INPUT) == HvStatus.INVALID_HYPERCALL_INPUT
    assert calls.call(POST, INPUT + 0x1000) == HvStatus.INVALID_CONNECTION_ID
    assert tables.messages == []
    tables.status = HvStatus.INSUFFICIENT_BUFFERS
    assert calls.call(POST, INPUT + 0x2000) == HvStatus.INSUFFICIENT_BUFFERS
    assert [m.payload_size for m in tables.messages] == [240]


@pytest.mark.parametrize(("strict", "alignment"), [(False, 4), (True, 8)])
def test_s45_alignment_is_qemus_4_or_strictly_8(
    memory: GuestMemory, tables: Tables, strict: bool, alignment: int
) -> None:
    calls = Hypercalls(memory, tables, strict_alignment=strict)
    memory.zero(INPUT, 4096)
    for offset in range(16):
        put(memory, INPUT + offset)
        expected = HvStatus.SUCCESS if offset % alignment == 0 else HvStatus.INVALID_ALIGNMENT
        assert calls.call(POST, INPUT + offset) == expected


def test_s46_connection_ids_top_bits_pass_a_post_but_not_a_signal(
    memory: GuestMemory, tables: Tables, calls: Hypercalls
) -> None:
    put(memory, INPUT, conn_id=0xFF000001)
    assert calls.call(POST, INPUT) == 0
    assert calls.call(SIGNAL | FAST, 0xFF000001) == HvStatus.INVALID_HYPERCALL_INPUT
    assert tables.signals == []


@pytest.mark.parametrize("gpa", [RAM - 252, RAM - 4, RAM, 0xC000_0000, 0xFEE0_0000, (1 << 64) - 4])
def test_s47_any_byte_outside_ram_is_insufficient_memory(
    memory: GuestMemory, tables: Tables, calls: Hypercalls, gpa: int
) -> None:
    if gpa < RAM:
        memory.write(gpa, b"\x01".ljust(RAM - gpa, b"\0"))
    assert calls.call(POST, gpa) == HvStatus.INSUFFICIENT_MEMORY
    assert tables.messages == []


def test_s48_input_is_copied_once_and_the_copy_is_what_was_checked(
    memory: GuestMemory, tables: Tables
) -> None:
    """A guest that changes its input all the time cannot change what the handler gets."""
    reads: list[tuple[int, int]] = []

    def read(gpa: int, n: int) -> bytes:
        data = memory.read(gpa, n)
        reads.append((gpa, n))
        put(memory, gpa, size=0xFFFFFFFF, body=b"changed")
        return data

    hostile = SimpleNamespace(read=read, read_u64=memory.read_u64)
    put(memory, INPUT, size=5, body=b"first" + bytes(235))
    assert Hypercalls(hostile, tables).call(POST, INPUT) == 0
    assert reads == [(INPUT, 256)]
    (heard,) = tables.messages
    assert (heard.payload_size, bytes(heard.payload[:7])) == (5, b"first\0\0")


@pytest.mark.parametrize("gpa", [0x2000 - 4, 0x2000 - 128, RAM - 256])
def test_s49_input_may_cross_a_page_and_end_with_ram(
    memory: GuestMemory, tables: Tables, calls: Hypercalls, gpa: int
) -> None:
    body = bytes(range(240))
    put(memory, gpa, size=240, body=body)
    assert calls.call(POST, gpa) == 0
    assert bytes(tables.messages[0].payload) == body


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (1, HvStatus.SUCCESS),
        (0xABCDEF, HvStatus.SUCCESS),
        (2, HvStatus.INVALID_CONNECTION_ID),
        (1 | 1 << 24, HvStatus.INVALID_HYPERCALL_INPUT),
        (1 | 1 << 31, HvStatus.INVALID_HYPERCALL_INPUT),
        (1 | 1 << 48, HvStatus.INVALID_HYPERCALL_INPUT),
        (1 | 1 << 63, HvStatus.INVALID_HYPERCALL_INPUT),
        (1 | 1 << 32, HvStatus.INVALID_PORT_ID),
        (1 | 1 << 47, HvStatus.INVALID_PORT_ID),
        (1 << 63 | 1 << 40 | 1 << 24, HvStatus.INVALID_PORT_ID),
    ],
)
def test_s51_signal_value_is_checked_alike_fast_and_slow(
    memory: GuestMemory, tables: Tables, calls: Hypercalls, value: int, status: HvStatus
) -> None:
    assert calls.call(SIGNAL | FAST, value) == status
    memory.write_u64(INPUT, value)
    assert calls.call(SIGNAL, INPUT) == status
    assert tables.signals == ([value] * 2 if status in (0, HvStatus.INVALID_CONNECTION_ID) else [])


def test_s51_slow_signal_is_aligned_to_8_and_in_ram(calls: Hypercalls, memory: GuestMemory) -> None:
    memory.write_u64(INPUT, 1)
    for offset in range(1, 8):
        assert calls.call(SIGNAL, INPUT + offset) == HvStatus.INVALID_ALIGNMENT
    assert calls.call(SIGNAL, RAM) == HvStatus.INVALID_ALIGNMENT
    memory.write_u64(RAM - 8, 1)
    assert calls.call(SIGNAL, RAM - 8) == 0


@pytest.mark.parametrize("code", [POST, SIGNAL, SIGNAL | FAST])
@pytest.mark.parametrize("bit", [17, 26, 27, 31, 32, 43, 44, 48, 59, 60, 63])
def test_s53_simple_calls_have_no_header_no_repetition_and_no_reserved_bit(
    calls: Hypercalls, tables: Tables, code: int, bit: int
) -> None:
    assert calls.call(code | 1 << bit, 1) == HvStatus.INVALID_HYPERCALL_INPUT
    assert tables.messages == tables.signals == []


@pytest.mark.parametrize("code", [0, 2, 0x5B, 0x5E, 0x69, 0x8001, 0xFFFF])
def test_s56_unknown_code_says_so(calls: Hypercalls, code: int) -> None:
    assert calls.call(code, 0) == calls.call(code | FAST, 0) == HvStatus.INVALID_HYPERCALL_CODE
    assert calls.call(code | 1 << 17 | 1 << 32, 0) == HvStatus.INVALID_HYPERCALL_CODE
    assert calls.call(code | 1 << 60, 0) == HvStatus.INVALID_HYPERCALL_INPUT


U64 = st.integers(0, (1 << 64) - 1)


@given(
    control=st.one_of(U64, st.sampled_from([POST, SIGNAL, SIGNAL | FAST])),
    param=st.one_of(U64, st.integers(0, RAM + 4096)),
    fill=st.binary(min_size=16, max_size=16),
)
def test_no_input_of_a_guest_raises(memory: GuestMemory, control: int, param: int, fill: bytes) -> None:
    aligned = param & ~7
    if memory.contains(aligned, 16):
        memory.write(aligned, fill)
    tables = Tables()
    result = Hypercalls(memory, tables).call(control, param)
    assert 0 <= result <= 0xFFFF
    assert all(message.payload_size <= 240 for message in tables.messages)
    assert all(0 <= conn_id <= 0xFFFFFF for conn_id in tables.signals)
