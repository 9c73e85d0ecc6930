"""HvPostMessage and HvSignalEvent as a guest meets them: every status (S44-S56)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from struct import pack

import pytest
from guest_agent import HYPERCALL_PAGE, SCRATCH
from guest_machine import MEMORY, Guest

from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.kvm.irqfd import EventFd

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
POST, SIGNAL, FAST = 0x5C, 0x5D, 1 << 16
CONNECTION = 0x1234
INPUT = SCRATCH + 0x4000
SIGNAL_PATHS = pytest.mark.parametrize(
    "path", [pytest.param("kernel", marks=pytest.mark.kernel_synic), "user"]
)


def post_input(
    connection: int = CONNECTION, payload: bytes = b"", size: int | None = None, kind: int = 1
) -> bytes:
    return pack("<IIII240s", connection, 0, kind, len(payload) if size is None else size, payload)


class Inbox:
    """A message handler that keeps what it got and answers as told."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.got: list[tuple[int, int, bytes]] = []

    def __call__(self, message: hv_post_message_input) -> int:
        self.got.append(
            (message.connection_id, message.message_type, bytes(message.payload)[: message.payload_size])
        )
        return self.answer


@pytest.fixture
def guest(boot_agent: BootAgent) -> Guest:
    guest = boot_agent()
    guest.enlighten()
    return guest


def call_post(guest: Guest, data: bytes, gpa: int = INPUT, control: int = POST) -> int:
    guest.machine.memory.write(gpa, data)
    return guest[0].hypercall(control, gpa)


# --- HvPostMessage ------------------------------------------------------------------------------------


def test_post_reaches_its_handler_with_a_private_copy(guest: Guest) -> None:
    """S40, S48: type and payload as posted; the handler's status is the guest's result."""
    inbox = Inbox()
    assert guest.partition.connections.add_message(CONNECTION, inbox) == 0
    assert call_post(guest, post_input(payload=b"hello", kind=0x55)) == HvStatus.SUCCESS
    assert call_post(guest, post_input(payload=bytes(range(240)))) == HvStatus.SUCCESS
    assert inbox.got == [(CONNECTION, 0x55, b"hello"), (CONNECTION, 1, bytes(range(240)))]
    for status in (HvStatus.INSUFFICIENT_BUFFERS, HvStatus.INVALID_HYPERCALL_INPUT, HvStatus.ACCESS_DENIED):
        inbox.answer = status
        assert call_post(guest, post_input()) == status


def test_post_statuses_in_order(guest: Guest) -> None:
    """S44: fast, then alignment, then the size, then the connection."""
    inbox = Inbox()
    assert guest.partition.connections.add_message(CONNECTION, inbox) == 0
    cpu = guest[0]
    assert cpu.hypercall(POST | FAST, INPUT + 1) == HvStatus.INVALID_HYPERCALL_CODE
    for offset in (1, 2, 3, 5):
        assert cpu.hypercall(POST, INPUT + offset) == HvStatus.INVALID_ALIGNMENT
    assert call_post(guest, post_input(connection=9, size=241)) == HvStatus.INVALID_HYPERCALL_INPUT
    assert call_post(guest, post_input(size=0xFFFF_FFFF)) == HvStatus.INVALID_HYPERCALL_INPUT
    assert call_post(guest, post_input(connection=9)) == HvStatus.INVALID_CONNECTION_ID
    assert inbox.got == []
    assert call_post(guest, post_input(payload=b"4"), gpa=INPUT + 4) == HvStatus.SUCCESS  # S45
    assert call_post(guest, post_input(connection=0xAB00_0000 | CONNECTION)) == HvStatus.SUCCESS  # S46
    assert len(inbox.got) == 2


def test_post_input_at_the_end_of_ram_and_beyond(guest: Guest) -> None:
    """S47, S49: across a page is fine, the last 256 bytes are fine, one byte more is not, a hole is not."""
    inbox = Inbox()
    assert guest.partition.connections.add_message(CONNECTION, inbox) == 0
    cpu = guest[0]
    assert call_post(guest, post_input(payload=b"x"), gpa=INPUT + 4096 - 128) == HvStatus.SUCCESS
    assert call_post(guest, post_input(payload=b"x"), gpa=MEMORY - 256) == HvStatus.SUCCESS
    for gpa in (MEMORY - 252, MEMORY - 8, MEMORY, 0xD000_0000, 1 << 40, (1 << 64) - 256, (1 << 64) - 8):
        assert cpu.hypercall(POST, gpa) == HvStatus.INSUFFICIENT_MEMORY, hex(gpa)
    assert len(inbox.got) == 2


def test_control_bits_that_a_simple_call_cannot_have(guest: Guest) -> None:
    """S53, S56: rep counts, variable headers, reserved bits, unknown codes; the guest goes on."""
    assert guest.partition.connections.add_message(CONNECTION, Inbox()) == 0
    guest.machine.memory.write(INPUT, post_input())
    cpu = guest[0]
    for bit in (17, 26, 27, 30, 32, 43, 44, 47, 60, 63):
        for code in (POST, SIGNAL | FAST):
            status = cpu.hypercall(code | 1 << bit, INPUT) & 0xFFFF
            assert status == HvStatus.INVALID_HYPERCALL_INPUT, f"code {code:#x} bit {bit}"
    for code in (0x0, 0x5E, 0x4000, 0x7FFF, 0xFFFF):
        assert cpu.hypercall(code, INPUT) & 0xFFFF == HvStatus.INVALID_HYPERCALL_CODE, hex(code)
    assert cpu.hypercall(POST, INPUT) == HvStatus.SUCCESS


def test_removed_connection_is_unknown_again(guest: Guest) -> None:
    """S37, S39: nothing reaches a handler after its removal returned."""
    inbox = Inbox()
    connections = guest.partition.connections
    assert connections.add_message(CONNECTION, inbox) == 0
    assert call_post(guest, post_input()) == HvStatus.SUCCESS
    assert connections.remove_message(CONNECTION) == 0
    assert call_post(guest, post_input()) == HvStatus.INVALID_CONNECTION_ID
    assert len(inbox.got) == 1


def test_handler_may_be_removed_while_a_vcpu_is_in_it(guest: Guest) -> None:
    """S39: removal waits for the handler that runs on the vCPU's thread."""
    entered, leave = threading.Event(), threading.Event()
    ended = False

    def handler(message: hv_post_message_input) -> int:
        nonlocal ended
        entered.set()
        leave.wait(30)
        ended = True
        return 0

    connections = guest.partition.connections
    assert connections.add_message(CONNECTION, handler) == 0
    guest.machine.memory.write(INPUT, post_input())
    guest[0].begin("HYPERCALL", POST, INPUT)
    assert entered.wait(30)
    threading.Timer(0.05, leave.set).start()
    assert connections.remove_message(CONNECTION) == 0
    assert ended
    assert guest[0].finish().value == 0


# --- HvSignalEvent ---------------------------------------------------------------------------------------


@SIGNAL_PATHS
def test_signal_statuses_fast(boot_agent: BootAgent, path: str) -> None:
    """S51: flag number, reserved bits, unknown id, known id, by either signal path."""
    guest = boot_agent(signal_path=path)
    guest.enlighten()
    cpu = guest[0]
    calls: list[int] = []
    assert guest.partition.connections.add_event(CONNECTION, lambda: calls.append(1)) == 0
    assert cpu.hypercall(SIGNAL | FAST, CONNECTION + 1) == HvStatus.INVALID_CONNECTION_ID
    for flag in (1, 5, 0x8000, 0xFFFF):
        assert cpu.hypercall(SIGNAL | FAST, CONNECTION | flag << 32) == HvStatus.INVALID_PORT_ID
    for bit in (24, 31, 48, 63):
        status = cpu.hypercall(SIGNAL | FAST, CONNECTION | 1 << bit)
        assert status == HvStatus.INVALID_HYPERCALL_INPUT, f"bit {bit}"
    guest.io_barrier()
    assert calls == []
    assert cpu.hypercall(SIGNAL | FAST, CONNECTION) == HvStatus.SUCCESS
    guest.until(lambda: bool(calls), "the event's callback runs")


@SIGNAL_PATHS
def test_signal_statuses_slow(boot_agent: BootAgent, path: str) -> None:
    """S52: since 5.13 KVM loads the value itself and passes it on; it must not be taken for an address."""
    guest = boot_agent(signal_path=path)
    guest.enlighten()
    cpu, memory = guest[0], guest.machine.memory
    calls: list[int] = []
    assert guest.partition.connections.add_event(CONNECTION, lambda: calls.append(1)) == 0

    def slow(value: int, gpa: int = INPUT) -> int:
        memory.write_u64(gpa, value)
        return cpu.hypercall(SIGNAL, gpa)

    assert slow(CONNECTION) == HvStatus.SUCCESS
    guest.until(lambda: len(calls) == 1, "the event's callback runs")
    assert slow(CONNECTION + 1) == HvStatus.INVALID_CONNECTION_ID
    assert slow(CONNECTION | 7 << 32) == HvStatus.INVALID_PORT_ID
    assert slow(CONNECTION | 1 << 24) == HvStatus.INVALID_HYPERCALL_INPUT
    # Values that would be misaligned or absent as addresses, or that are one (the page's own).
    assert slow(0x1235) == HvStatus.INVALID_CONNECTION_ID
    assert slow(0xFF_FFF8) == HvStatus.INVALID_CONNECTION_ID
    assert slow(INPUT & 0xFFFFFF or 8) == HvStatus.INVALID_CONNECTION_ID
    for offset in (1, 2, 4, 7):
        assert cpu.hypercall(SIGNAL, INPUT + offset) == HvStatus.INVALID_ALIGNMENT
    assert (
        cpu.hypercall(SIGNAL, 0xD000_0000) == HvStatus.INVALID_ALIGNMENT
    )  # KVM's answer to an unbacked page
    guest.io_barrier()
    assert len(calls) == 1


@SIGNAL_PATHS
def test_signals_take_an_exit_only_by_the_userspace_table(boot_agent: BootAgent, path: str) -> None:
    """S42, S53, S54: KVM_HYPERV_EVENTFD answers without an exit; none is lost, several may come as one."""
    guest = boot_agent(signal_path=path)
    guest.enlighten()
    calls: list[int] = []
    connections = guest.partition.connections
    assert connections.add_event(CONNECTION, lambda: calls.append(1)) == 0
    before = guest.machine.platform.threads[0].exit_counts[guest.hypercall_exit]
    reply = guest[0].do("SIGNAL", CONNECTION, 50)
    assert reply.results[:3] == (50, 0, 0)
    exits = guest.machine.platform.threads[0].exit_counts[guest.hypercall_exit] - before
    assert exits == (50 if path == "user" else 0)
    guest.until(lambda: bool(calls), "the event's callback runs")
    guest.io_barrier()
    assert 1 <= len(calls) <= 50
    # S43: gone means gone, although KVM held its own reference.
    assert connections.remove_event(CONNECTION) == 0
    calls.clear()
    assert guest[0].hypercall(SIGNAL | FAST, CONNECTION) == HvStatus.INVALID_CONNECTION_ID
    guest.io_barrier()
    assert calls == []


@SIGNAL_PATHS
def test_signals_count_up_an_eventfd_of_the_callers(boot_agent: BootAgent, path: str) -> None:
    """S41, S43: the host's program reads each signal from its own eventfd, until the connection is gone."""
    guest = boot_agent(signal_path=path)
    guest.enlighten()
    connections = guest.partition.connections
    with EventFd() as mine:
        assert connections.add_eventfd(CONNECTION, mine.fd) == 0
        assert guest[0].do("SIGNAL", CONNECTION, 50).results[:3] == (50, 0, 0)
        assert mine.drain() == 50
        assert connections.remove_event(CONNECTION) == 0
        assert guest[0].hypercall(SIGNAL | FAST, CONNECTION) == HvStatus.INVALID_CONNECTION_ID
        assert mine.drain() == 0


@SIGNAL_PATHS
def test_event_table_answers(boot_agent: BootAgent, path: str) -> None:
    """S37, S38, S41: duplicate, missing, and an id that no guest could name."""
    import errno

    connections = boot_agent(signal_path=path).partition.connections
    nothing: Callable[[], object] = lambda: None  # noqa: E731
    assert connections.add_event(1, nothing) == 0
    assert connections.add_event(1, nothing) == -errno.EEXIST
    assert connections.add_event(0x1000000, nothing) == -errno.EINVAL
    assert connections.remove_event(2) == -errno.ENOENT
    assert connections.remove_event(1) == 0
    assert connections.remove_event(1) == -errno.ENOENT
    assert connections.add_event(1, nothing) == 0


def test_hypercall_page_follows_guest_os_id(guest: Guest) -> None:
    """Writing 0 to GUEST_OS_ID switches the page off; enabling it without an id does not take."""
    cpu = guest[0]
    assert cpu.rdmsr(0x40000001) == HYPERCALL_PAGE | 1
    cpu.wrmsr(0x40000000, 0)
    assert cpu.rdmsr(0x40000001) & 1 == 0
    cpu.wrmsr(0x40000001, HYPERCALL_PAGE | 1)
    assert cpu.rdmsr(0x40000001) & 1 == 0
