"""hyperv-testdev against the real Partition, over a SynIC that a test can look into."""

from __future__ import annotations

import errno
import threading
from functools import partial

import pytest
from at_once import at_once
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.devices.port import hyperv_testdev
from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.hyperv_testdev import HypervTestdev
from hvkvm.hyperv.partition import Partition


class Vp:
    """A VP whose thread is the test: what is submitted runs at once, one thing after the other."""

    def __init__(self, vp_index: int) -> None:
        self.vp_index = vp_index
        self.turn = threading.RLock()
        self.slots: dict[int, bytes] = {}
        self.flags: set[tuple[int, int]] = set()
        self.pulses: list[int] = []
        self.waiters: list[tuple[int, object]] = []

    def submit(self, fn, cancelled) -> None:
        with self.turn:
            fn()

    def post_message(self, sint: int, message: bytes) -> int:
        if sint in self.slots:
            return -errno.EAGAIN
        self.slots[sint] = message
        return 0

    def set_event_flag(self, sint: int, number: int) -> int:
        before = (sint, number) in self.flags
        self.flags.add((sint, number))
        return 0 if before else 1

    def eom(self, sint: int, then: bytes | None = None) -> bytes | None:
        """The guest empties a slot, which somebody fills with `then` at once, and says so."""
        message = self.slots.pop(sint, None)
        if then is not None:
            self.slots[sint] = then
        with self.turn:
            waiters = [w for s, w in self.waiters if s == sint]
            self.waiters = [(s, w) for s, w in self.waiters if s != sint]
        for waiter in waiters:
            waiter()
        return message


class Line:
    def __init__(self, synic: Synic, vp: Vp, sint: int) -> None:
        self.synic, self.vp, self.sint = synic, vp, sint
        synic.count(1)

    def pulse(self) -> int:
        self.vp.pulses.append(self.sint)
        return 0

    def enable_acks(self) -> None:
        pass

    def arm_ack(self, waiter) -> None:
        with self.vp.turn:
            self.vp.waiters.append((self.sint, waiter))

    def disarm_ack(self, waiter) -> None:
        with self.vp.turn:
            self.vp.waiters = [(s, w) for s, w in self.vp.waiters if w is not waiter]

    def close(self) -> None:
        self.synic.count(-1)


class Synic:
    signal_path = None
    signal_path_missing = "a test's SynIC has none"

    def __init__(self, cpus: int) -> None:
        self.vps = [Vp(index) for index in range(cpus)]
        self.lines = 0
        self._lock = threading.Lock()

    def count(self, change: int) -> None:
        with self._lock:
            self.lines += change

    def vp(self, vp_index: int) -> Vp | None:
        return self.vps[vp_index] if vp_index < len(self.vps) else None

    def open_line(self, vp_index: int, sint: int, *, acks: bool) -> Line:
        return Line(self, self.vps[vp_index], sint)

    def activate(self) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


class Kit:
    def __init__(self, loop, cpus: int = 2) -> None:
        self.loop = loop
        self.synic = Synic(cpus)
        self.partition = Partition(None, None, None, loop, [], synic=self.synic)
        self.testdev = HypervTestdev(self.partition)
        self.bus = PortBus()
        self.testdev.attach(self.bus)

    def do(self, command: int, vp: int = 0, sint: int = 0, conn: int = 0) -> int:
        """One request; how many complaints it made."""
        before = self.testdev.complaints.count
        self.bus.write(0x3000, 4, sint | vp << 8 | command << 16 | conn << 24)
        return self.testdev.complaints.count - before

    def post(self, conn: int, payload: bytes, message_type: int = 1) -> int:
        message = hv_post_message_input(
            connection_id=conn, message_type=message_type, payload_size=len(payload)
        )
        message.payload[: len(payload)] = payload
        return self.partition.connections.post(message)


@pytest.fixture
def kit(loop):
    return Kit(loop)


def test_routes_pulse_their_sint_and_die_one_by_one(kit):
    assert kit.do(1, vp=1, sint=5) == 0
    assert kit.do(1, vp=1, sint=5) == 0
    assert kit.do(3, vp=1, sint=5) == 0
    assert kit.synic.vps[1].pulses == [5]
    assert kit.do(2, vp=1, sint=5) == 0
    assert kit.do(3, vp=1, sint=5) == 0
    assert kit.do(2, vp=1, sint=5) == 0
    assert kit.do(3, vp=1, sint=5) == 1
    assert kit.do(2, vp=1, sint=5) == 1
    assert kit.synic.lines == 0


def test_s10_s11_bad_vp_and_bad_sint_are_complaints_not_exceptions(kit):
    for command in (1, 4, 6):
        assert kit.do(command, vp=99, sint=1, conn=7) == 1
        assert kit.do(command, vp=0, sint=16, conn=7) == 1
        assert kit.do(command, vp=0, sint=255, conn=7) == 1
    assert kit.synic.lines == 0
    assert kit.post(7, b"x") == HvStatus.INVALID_CONNECTION_ID


def test_reads_are_zero_and_only_dword_writes_are_requests(kit):
    assert kit.bus.read(0x3000, 4) == 0
    for port, size in ((0x3000, 1), (0x3000, 2), (0x3002, 2)):
        kit.bus.write(port, size, 0x0101)
    assert kit.synic.lines == 0
    assert kit.testdev.complaints.count == 3


@pytest.mark.parametrize("size", [0, 1, 8, 239, 240])
def test_a_message_is_echoed_to_the_connections_own_sint(kit, size):
    kit.do(4, vp=1, sint=8, conn=0x11)
    payload = bytes(range(size))
    assert kit.post(0x11, payload, message_type=0x1234) == HvStatus.SUCCESS
    message = kit.synic.vps[1].slots[8]
    assert len(message) == 256
    assert message[:4] == (0x1234).to_bytes(4, "little")
    assert message[4] == size
    assert message[5:16] == bytes(11), "flags, reserved and sender are 0 (S28)"
    assert message[16 : 16 + size] == payload
    assert kit.synic.vps[1].pulses == [8]


def test_a_payload_size_beyond_the_message_is_cut(kit):
    kit.do(4, sint=8, conn=0x11)
    message = hv_post_message_input(connection_id=0x11, message_type=1, payload_size=0xFFFFFFFF)
    assert kit.partition.connections.post(message) == HvStatus.SUCCESS
    assert kit.synic.vps[0].slots[8][4] == 240


def test_type_zero_cannot_be_echoed(kit):
    kit.do(4, sint=8, conn=0x11)
    assert kit.post(0x11, b"x", message_type=0) == HvStatus.INVALID_HYPERCALL_INPUT
    assert kit.post(0x11, b"x") == HvStatus.SUCCESS


def test_kut_connections_busy_slot_gets_the_new_message_after_eom(kit, loop):
    """hyperv_connections: post to a taken slot returns 0, raises nothing; after EOM the new one arrives."""
    vp = kit.synic.vps[0]
    kit.do(4, sint=8, conn=0x10)
    assert kit.post(0x10, b"first") == HvStatus.SUCCESS
    loop.settle()
    assert kit.post(0x10, b"second") == HvStatus.SUCCESS
    loop.settle()
    assert vp.pulses == [8]
    assert vp.eom(8)[16:21] == b"first"
    loop.settle()
    assert vp.eom(8)[16:22] == b"second"
    assert vp.pulses == [8, 8]


def test_an_echo_that_waits_for_its_slot_is_overtaken_by_nothing(kit, loop):
    vp = kit.synic.vps[0]
    kit.do(4, sint=8, conn=0x10)
    kit.post(0x10, b"first")
    loop.settle()
    kit.post(0x10, b"second")
    assert kit.post(0x10, b"third") == HvStatus.INSUFFICIENT_BUFFERS
    vp.eom(8)  # the echo is to be tried again
    assert kit.post(0x10, b"third") == HvStatus.INSUFFICIENT_BUFFERS
    loop.settle()
    assert vp.eom(8)[16:22] == b"second"
    loop.settle()
    assert kit.post(0x10, b"third") == HvStatus.SUCCESS


def test_an_echo_that_finds_the_slot_taken_again_waits_again(kit, loop):
    vp = kit.synic.vps[0]
    kit.do(4, sint=8, conn=0x10)
    kit.post(0x10, b"first")
    loop.settle()
    kit.post(0x10, b"second")
    for _ in range(5):
        vp.eom(8, then=b"somebody else's")
        loop.settle()
        assert vp.slots[8] == b"somebody else's"
    vp.eom(8)
    loop.settle()
    assert vp.slots[8][16:22] == b"second"


def test_an_event_connection_sets_the_flag_of_its_number_once(kit, loop):
    vp = kit.synic.vps[1]
    assert kit.do(6, vp=1, sint=9, conn=0x21) == 0
    assert kit.partition.connections.signal(0x21) == HvStatus.SUCCESS
    loop.settle()
    assert vp.flags == {(9, 0x21)}
    assert vp.pulses == [9]
    kit.partition.connections.signal(0x21)
    loop.settle()
    assert vp.pulses == [9], "already set: no second interrupt (S35)"
    assert kit.do(7, conn=0x21) == 0
    assert kit.partition.connections.signal(0x21) == HvStatus.INVALID_CONNECTION_ID


def test_duplicates_and_absent_connections_are_complaints(kit):
    for create, destroy in ((4, 5), (6, 7)):
        assert kit.do(destroy, conn=3) == 1
        assert kit.do(create, sint=1, conn=3) == 0
        assert kit.do(create, sint=2, conn=3) == 1
        assert kit.do(destroy, conn=3) == 0
        assert kit.do(destroy, conn=3) == 1
    assert kit.synic.lines == 0


def test_destroy_with_a_message_under_way_leaves_nothing(kit, loop):
    vp = kit.synic.vps[0]
    kit.do(4, sint=8, conn=0x10)
    kit.post(0x10, b"first")
    loop.settle()
    kit.post(0x10, b"second")
    assert kit.do(5, conn=0x10) == 0
    vp.eom(8)
    loop.settle()
    assert kit.synic.lines == 0
    assert 8 not in vp.slots
    assert kit.testdev.complaints.count == 0
    assert kit.do(4, sint=8, conn=0x10) == 0
    assert kit.post(0x10, b"third") == HvStatus.SUCCESS


def test_routes_are_bounded(kit, monkeypatch):
    monkeypatch.setattr(hyperv_testdev, "MAX_ROUTES", 10)
    assert [kit.do(1) for _ in range(12)] == [0] * 10 + [1, 1]


def test_s7_reset_gives_everything_up(kit, loop):
    for command in (1, 4, 6):
        kit.do(command, sint=3 + command, conn=1)
    kit.post(1, b"x")
    kit.testdev.reset()
    loop.settle()
    assert kit.synic.lines == 0
    assert loop.readers == {}
    assert [kit.do(c, sint=3 + c, conn=1) for c in (1, 4, 6)] == [0, 0, 0]
    kit.testdev.reset()


def test_a_stopped_loop_is_a_complaint(kit, loop):
    kit.do(4, sint=8, conn=1)
    loop.stopped = True
    assert kit.post(1, b"x") == HvStatus.SUCCESS
    kit.do(5, conn=1)


def test_creating_destroying_and_posting_from_several_vcpus(io, tiny_switch_interval):
    kit = Kit(io)
    hammering = [True] * 3

    def hammer(seed: int) -> None:
        try:
            for i in range(400):
                conn = i // 4 % 4  # each of the four commands for one, then for the next
                kit.do(4 + (i + seed) % 4, vp=seed % 2, sint=conn, conn=conn)
                kit.post(conn, b"x")
                kit.partition.connections.signal(conn)
        finally:
            hammering[seed] = False

    def empty_slots() -> None:
        for vp in kit.synic.vps:
            for sint in range(4):
                vp.eom(sint)

    def empty_on() -> None:
        while any(hammering):
            empty_slots()

    at_once(*(partial(hammer, seed) for seed in range(3)), empty_on)
    # Each of the 200 that one of them makes and destroys was made by somebody, and destroyed by somebody.
    assert 3 * 400 - kit.testdev.complaints.count >= 400
    kit.testdev.reset()
    empty_slots()
    for _ in range(2):  # whole rounds of the loop
        done = threading.Event()
        io.call_soon(done.set)
        assert done.wait(100)
    assert kit.synic.lines == 0


@settings(max_examples=150, deadline=None)
@given(
    operations=st.lists(
        st.one_of(
            st.integers(0, 0xFFFFFFFF),
            st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 17), st.integers(0, 3)),
            st.integers(0, 3).map(lambda conn: ("post", conn)),
            st.integers(0, 3).map(lambda conn: ("signal", conn)),
            st.just("eom"),
            st.just("turn"),
        ),
        max_size=50,
    )
)
def test_no_sequence_of_requests_raises_or_leaks(operations, new_loop):
    kit = Kit(new_loop())
    for operation in operations:
        if isinstance(operation, int):
            kit.bus.write(0x3000, 4, operation)
        elif operation == "turn":
            kit.loop.run_soon()
        elif operation == "eom":
            for vp in kit.synic.vps:
                for sint in range(16):
                    vp.eom(sint)
        elif operation[0] == "post":
            kit.post(operation[1], b"payload")
        elif operation[0] == "signal":
            kit.partition.connections.signal(operation[1])
        else:
            kit.do(*operation)
    kit.testdev.close()
    for vp in kit.synic.vps:
        for sint in range(16):
            vp.eom(sint)
    kit.loop.settle()
    assert kit.synic.lines == 0
    assert kit.loop.readers == {}
