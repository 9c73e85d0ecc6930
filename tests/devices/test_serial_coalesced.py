"""Coalesced THR writes: whatever KVM queues, the guest and the reader see what a plain UART would do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polled_line import UnconnectedLine

from hvkvm.devices.port import serial_coalesced
from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.serial import Serial16550
from hvkvm.devices.port.serial_coalesced import PATIENCE, POLL_MAX, POLL_MIN, CoalescedSerial
from hvkvm.errors import CapabilityMissing, HvkvmError
from hvkvm.kvm.coalesced import CoalescedWrite

THR, IER, IIR, LCR, MCR, LSR = 0x3F8, 0x3F9, 0x3FA, 0x3FB, 0x3FC, 0x3FD
FCR = IIR


class Kernel:
    """What KVM does with port writes: queue those of a zone while the ring has room, else exit."""

    def __init__(self, bus: PortBus, slots: int = 170) -> None:
        self.bus = bus
        self.slots = slots
        self.ring: list[CoalescedWrite] = []
        self.zones: list[Zone] = []
        self.exits = 0
        self.queued = 0

    def out(self, port: int, value: int, size: int = 1) -> None:
        if len(self.ring) < self.slots and any(
            z.port <= port and port + size <= z.port + z.size for z in self.zones
        ):
            self.queued += 1
            self.ring.append(CoalescedWrite(port, True, value.to_bytes(size, "little")))
            return
        self.exits += 1
        self.bus.write(port, size, value)

    def inb(self, port: int) -> int:
        self.exits += 1
        return self.bus.read(port, 1)


class Zone:
    """CoalescedPio over such a kernel."""

    kernel: Kernel
    fails = False

    def __init__(self, vm: object, port: int, size: int) -> None:
        if self.fails:
            raise HvkvmError("no memory")
        self.port, self.size = port, size
        self.kernel.zones.append(self)

    def close(self) -> None:
        if self in self.kernel.zones:
            self.kernel.zones.remove(self)


class Ring:
    """CoalescedRing over such a kernel."""

    kernel: Kernel

    def __init__(self, vm: object, vcpu: object) -> None:
        pass

    @property
    def empty(self) -> bool:
        return not self.kernel.ring

    @property
    def last(self) -> int:
        return self.kernel.queued

    def take_bytes(self, port: int) -> bytes | None:
        if any(queued.address != port for queued in self.kernel.ring):
            return None
        taken, self.kernel.ring = self.kernel.ring, []
        return b"".join(queued.data for queued in taken)

    def take_writes(self) -> list[CoalescedWrite]:
        taken, self.kernel.ring = self.kernel.ring, []
        return taken


class Rig:
    def __init__(self, loop, patch, *, line=None, threshold: int = 4, slots: int = 170, cap: int = 1) -> None:
        self.loop = loop
        self.out: list[bytes] = []
        self.line = line
        self.serial = Serial16550(line or UnconnectedLine(), self.out.append, loop)
        self.bus = PortBus()
        self.kernel = Kernel(self.bus, slots)
        self.zone = type("BoundZone", (Zone,), {"kernel": self.kernel})
        patch.setattr(serial_coalesced, "CoalescedPio", self.zone)
        patch.setattr(serial_coalesced, "CoalescedRing", type("BoundRing", (Ring,), {"kernel": self.kernel}))
        vm = SimpleNamespace(check_extension=lambda number: cap)
        self.device = CoalescedSerial(self.serial, vm, SimpleNamespace(), loop, first_threshold=threshold)
        self.device.attach(self.bus)

    def print(self, data: bytes) -> None:
        for byte in data:
            self.kernel.out(THR, byte)

    def text(self) -> bytes:
        self.device.close()
        self.loop.settle()
        return b"".join(self.out)


@pytest.fixture
def rig(loop, line, monkeypatch):
    return Rig(loop, monkeypatch, line=line)


def test_a_run_of_writes_makes_a_zone_and_then_costs_no_exits(rig):
    rig.print(b"abcd")
    assert rig.device.zone_is_open
    exits = rig.kernel.exits
    rig.print(b"e" * 100)
    assert rig.kernel.exits == exits
    assert rig.text() == b"abcd" + b"e" * 100


def test_a_register_access_sees_the_writes_before_it(rig):
    rig.print(b"abcdefg")
    assert rig.kernel.ring
    rig.kernel.inb(LSR)
    assert not rig.kernel.ring
    rig.print(b"hi")
    rig.kernel.out(IER, 0)
    assert not rig.kernel.ring
    rig.serial.output.flush()
    assert b"".join(rig.out) == b"abcdefghi"


@pytest.mark.parametrize(("port", "value"), [(LCR, 0x83), (MCR, 0x10)])
def test_the_zone_ends_before_a_thr_write_means_something_else(rig, port, value):
    rig.print(b"abcdef")
    assert rig.kernel.zones
    rig.kernel.out(port, value)
    assert not rig.kernel.zones
    rig.print(b"xy")
    assert not rig.kernel.ring
    if port == LCR:
        assert rig.text() == b"abcdef", "xy went to the divisor"
        assert rig.kernel.inb(THR) == ord("y")


def test_each_forced_end_makes_the_next_zone_dearer(rig):
    needed = []
    for _ in range(4):
        count = 0
        while not rig.device.zone_is_open:
            rig.print(b"x")
            count += 1
        needed.append(count)
        rig.kernel.out(LCR, 0x80)
        rig.kernel.out(LCR, 0)
    assert needed == [4, 8, 16, 32]


class Driver:
    """An interrupt-driven transmitter: 16 bytes an interrupt, woken by edges only."""

    def __init__(self, rig: Rig, data: bytes, *, asks_again: bool) -> None:
        self.rig, self.rest, self.asks_again = rig, data, asks_again
        self.interrupts = 0
        rig.kernel.out(FCR, 0x01)
        rig.kernel.out(MCR, 0x0B)

    def start(self) -> None:
        self.rig.kernel.out(IER, 0x02)

    def interrupt(self) -> None:
        """The handler. Linux's goes on until IIR has nothing more to say."""
        self.interrupts += 1
        while self.rig.kernel.inb(IIR) & 0x0F == 0x02:
            if not self.rest:
                self.rig.kernel.out(IER, 0)
                return
            self.rig.print(self.rest[:16])
            self.rest = self.rest[16:]
            if not self.asks_again:
                return


def run_by_edges(driver: Driver, line) -> None:
    while line.taken():
        driver.interrupt()


def test_a_driver_that_asks_iir_again_runs_through_the_zone_without_the_poll(rig):
    text = bytes(i & 0x7F for i in range(3200))
    driver = Driver(rig, text, asks_again=True)
    driver.start()
    run_by_edges(driver, rig.line)
    assert driver.rest == b""
    assert rig.device.zone_is_open
    assert rig.device.zones_made == 1
    assert rig.kernel.exits < 2 * len(text) / 16 + 30, "three exits for sixteen bytes"
    assert rig.text() == text


def test_a_driver_that_waits_for_the_next_edge_is_found_out_and_served_plainly(rig):
    text = bytes(i & 0x7F for i in range(800))
    driver = Driver(rig, text, asks_again=False)
    driver.start()
    run_by_edges(driver, rig.line)
    assert driver.rest, "its bytes are in the ring, and it waits"
    polls = 0
    while driver.rest:
        rig.loop.run_later()
        polls += 1
        run_by_edges(driver, rig.line)
    assert polls <= 3
    assert not rig.device.zone_is_open
    assert rig.text() == text
    rig.kernel.out(IER, 0x02)
    rig.print(b"x" * 5000)
    assert rig.device.zones_made == 1, "not again while the THRE interrupt is on"


def test_a_burst_under_way_is_no_reason_to_end_the_zone(rig):
    rig.kernel.out(IER, 0x02)
    rig.print(b"abcd")
    for _ in range(20):
        rig.print(b"x")
        (poll,) = [item for item in rig.loop.later if item[1] == rig.device._poll]
        rig.loop.later.remove(poll)
        poll[1](*poll[2])
    assert rig.device.zone_is_open
    assert rig.loop.later[-1][0] == PATIENCE
    rig.kernel.inb(IIR)
    rig.print(b"y")
    rig.loop.run_later()
    assert rig.device.zone_is_open
    rig.loop.run_later()
    assert not rig.device.zone_is_open
    assert rig.text() == b"abcd" + b"x" * 20 + b"y"


def test_a_full_ring_exits_in_order(loop, monkeypatch):
    rig = Rig(loop, monkeypatch, slots=7)
    text = bytes(i & 0x7F for i in range(200))
    rig.print(text)
    assert rig.text() == text


def test_a_guest_that_prints_and_halts_is_heard_by_the_poll(rig):
    rig.print(b"abcdPANIC")
    delay, poll, args = next(item for item in rig.loop.later if item[1] == rig.device._poll)
    assert delay == POLL_MIN
    poll(*args)
    rig.serial.output.flush()
    assert b"".join(rig.out) == b"abcdPANIC"


def test_polling_slows_down_while_nothing_comes_and_stops_with_the_zone(rig):
    rig.print(b"abcd")
    delays = []
    for _ in range(6):
        polls = [item for item in rig.loop.later if item[1] == rig.device._poll]
        assert len(polls) == 1
        rig.loop.later.remove(polls[0])
        delays.append(polls[0][0])
        polls[0][1](*polls[0][2])
    assert delays == [POLL_MIN, *(min(POLL_MIN * 2**n, POLL_MAX) for n in range(1, 6))]
    rig.kernel.out(LCR, 0x80)
    rig.loop.settle()
    assert rig.loop.later == []


def test_a_stale_poll_does_not_poll_the_next_zone_twice(rig):
    rig.print(b"abcd")
    rig.kernel.out(LCR, 0x80)
    rig.kernel.out(LCR, 0)
    rig.print(b"x" * 8)
    assert rig.device.zone_is_open
    rig.loop.run_later()
    assert len([item for item in rig.loop.later if item[1] == rig.device._poll]) == 1


def test_other_zones_of_the_vm_share_the_ring_and_get_their_writes(rig):
    seen = []
    rig.bus.add(0x500, 4, SimpleNamespace(read=None, write=lambda *call: seen.append(call)))
    rig.print(b"abcd")
    rig.kernel.zones.append(SimpleNamespace(port=0x500, size=4))
    rig.kernel.out(THR, ord("e"))
    rig.kernel.out(0x502, 0x1234, 2)
    rig.kernel.out(THR, ord("f"))
    assert rig.text() == b"abcdef"
    assert seen == [(2, 2, 0x1234)]


def test_where_kvm_refuses_a_zone_the_plain_way_goes_on(rig):
    rig.zone.fails = True
    rig.print(b"x" * 100)
    assert not rig.device.zone_is_open
    assert rig.text() == b"x" * 100


def test_without_the_capability_it_says_so(loop, monkeypatch):
    with pytest.raises(CapabilityMissing, match="COALESCED_PIO"):
        Rig(loop, monkeypatch, cap=0)


def test_reset_ends_the_zone_and_loses_nothing(rig):
    rig.print(b"abcdefg")
    rig.device.reset()
    assert not rig.kernel.zones
    assert rig.text() == b"abcdefg"


STEP = st.one_of(
    st.tuples(st.just("print"), st.binary(min_size=1, max_size=30)),
    st.tuples(st.just("out"), st.integers(1, 7), st.integers(0, 255)),
    st.tuples(st.just("out"), st.sampled_from((1, 3, 4)), st.sampled_from((0, 0x02, 0x80, 0x10))),
    st.tuples(st.just("in"), st.integers(0, 7)),
    st.tuples(st.just("turn")),
)


@settings(max_examples=400, deadline=None)
@given(steps=st.lists(STEP, max_size=60), slots=st.integers(1, 12))
def test_a_guest_cannot_tell_it_from_a_plain_uart(steps, slots, new_loop):
    with pytest.MonkeyPatch.context() as patch:
        rig = Rig(new_loop(), patch, threshold=3, slots=slots)
        plain_out: list[bytes] = []
        plain_loop = new_loop()
        plain = Serial16550(UnconnectedLine(), plain_out.append, plain_loop)
        for name, *rest in steps:
            if name == "print":
                rig.print(rest[0])
                for byte in rest[0]:
                    plain.write(0, 1, byte)
            elif name == "out":
                rig.kernel.out(THR + rest[0], rest[1])
                plain.write(rest[0], 1, rest[1])
            elif name == "in":
                assert rig.kernel.inb(THR + rest[0]) == plain.read(rest[0], 1)
            else:
                rig.loop.run_later()
                rig.loop.run_soon()
            # The invariant that makes it safe: KVM queues only while the first port means output.
            assert not rig.kernel.zones or plain.thr_is_output
        plain.output.flush()
        assert rig.text() == b"".join(plain_out)
