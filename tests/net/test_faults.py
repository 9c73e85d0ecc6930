"""A faulty wire: how often what happens, and that the same seed does the same again."""

from __future__ import annotations

import socket
import threading

import pytest

from hvkvm.abi.virtio_net_hdr import PLAIN, VALID
from hvkvm.net import faults
from hvkvm.net.faults import MAX_HELD, REORDER_SECONDS, Direction, Faults, FaultyWire
from hvkvm.net.port import NO_OFFLOADS
from tests.net.conftest import connect, views
from tests.net.test_segment import V4, tcp_frame
from tests.net.wires import TestWire

COUNT = 3000
FRAMES = [b"%014d" % n for n in range(COUNT)]


def outcome(loop, faults, frames=FRAMES):
    """What comes out of a wire that `frames` were sent into, one behind the other."""
    below = TestWire(loop)
    wire = FaultyWire(loop, below, faults)
    connect(loop, wire)
    for at in range(0, len(frames), 50):
        assert loop.do(wire.send, views(*frames[at : at + 50])) == len(frames[at : at + 50])
        while loop.do(lambda: wire._out._held):
            pass
    shown = loop.do(wire.inspect)
    loop.do(wire.close)
    assert below.closed
    return [data for _header, data in below.sent], shown


def test_without_faults_all_come_in_order(loop):
    assert outcome(loop, Faults())[0] == FRAMES


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_damage_and_doubles_are_as_frequent_as_asked_and_the_same_for_a_seed(loop, seed):
    faults = Faults(loss=0.1, corrupt=0.1, duplicate=0.1, seed=seed)
    got, shown = outcome(loop, faults)
    assert outcome(loop, faults)[0] == got
    assert outcome(loop, faults._replace(seed=7))[0] != got
    for name in ("lost", "corrupted", "duplicated"):
        assert COUNT * 0.07 < shown[f"{name}_out"] < COUNT * 0.13
    assert len(got) == COUNT - shown["lost_out"] + shown["duplicated_out"]
    wrong = [frame for frame in got if frame not in set(FRAMES)]
    assert 0 < len(wrong) <= shown["corrupted_out"] * 2
    for frame in wrong:
        assert len(frame) == 14


def test_frames_that_are_passed_come_all_the_same(loop):
    got, shown = outcome(loop, Faults(reorder=0.1))
    assert sorted(got) == FRAMES
    assert got != FRAMES
    assert shown["reordered_out"] > COUNT * 0.07


def test_one_that_comes_late_holds_up_none_behind_it(monkeypatch):
    """In a time of the test's own."""
    now, timers, got = [0.0], [], []

    class Clock:
        def call_later(self, seconds, call):
            timers.append((now[0] + seconds, call))
            return self

        def cancel(self):
            timers.pop()

    def give(frames):
        got.extend((now[0], bytes(frame[1])) for frame in frames)
        return len(frames)

    monkeypatch.setattr(faults, "monotonic", lambda: now[0])
    way = Direction(Clock(), Faults(reorder=0.5), "out", give)
    way.running = True
    # Six numbers a frame, of which the fourth decides whether it is passed: the first of two.
    way._random.random = iter([*[1.0] * 3, 0.0, *[1.0] * 8]).__next__
    way.take(views(FRAMES[0]))
    now[0] = 0.001
    way.take(views(FRAMES[1]))
    while timers:
        assert len(timers) == 1
        due, call = timers.pop()
        now[0] = max(now[0], due)
        call()
    assert got == [(0.001, FRAMES[1]), (REORDER_SECONDS, FRAMES[0])]


def test_a_cable_that_is_pulled_releases_what_waited_for_room(loop):
    below = TestWire(loop, room=0)
    wire = FaultyWire(loop, below, Faults())
    connect(loop, wire)
    loop.do(wire.send, views(*FRAMES[:3]))
    while not loop.do(lambda: wire._out._full):
        pass
    loop.do(wire.plug, False)
    while loop.do(lambda: wire._out._held):
        pass
    assert below.statistics.sent_dropped == 3
    loop.do(wire.close)


def test_a_delay_is_one(loop):
    from time import monotonic

    began = monotonic()
    assert outcome(loop, Faults(delay=0.05), FRAMES[:50])[0] == FRAMES[:50]
    assert monotonic() - began >= 0.05


def test_the_queue_is_bounded(loop):
    below = TestWire(loop)
    wire = FaultyWire(loop, below, Faults(delay=3000))
    connect(loop, wire)
    loop.do(wire.send, views(*FRAMES))
    assert loop.do(wire.inspect)["overrun_out"] == COUNT - MAX_HELD
    loop.do(wire.close)


def test_frames_for_the_guest_meet_faults_too_and_wait_for_room(loop):
    below = TestWire(loop)
    wire = FaultyWire(loop, below, Faults(loss=0.1))
    nic = connect(loop, wire, room=10)
    loop.do(below.arrive, views(*FRAMES[:100], header=VALID))
    nic.wait(lambda n: len(n.got) == 10)
    with nic.changed:
        nic.room = None
    loop.do(wire.resume)
    lost = loop.do(wire.inspect)["lost_in"]
    assert 0 < lost < 100
    nic.wait(lambda n: len(n.got) == 100 - lost)
    assert nic.got == sorted(nic.got)
    assert set(nic.headers) == {PLAIN}  # a damaged frame must not be called valid
    loop.do(wire.close)


def test_a_wire_without_room_gets_the_rest_later(loop):
    below = TestWire(loop, room=7)
    wire = FaultyWire(loop, below, Faults())
    connect(loop, wire)
    loop.do(wire.send, views(*FRAMES[:30]))
    while len(below.sent) < 7:
        loop.do(lambda: None)
    assert len(below.sent) == 7
    loop.do(below.writable, None)
    while len(below.sent) < 30:
        loop.do(lambda: None)
    assert [data for _header, data in below.sent] == FRAMES[:30]
    loop.do(wire.close)


def test_no_offload_is_offered_and_what_was_left_undone_is_done(loop):
    below = TestWire(loop)
    wire = FaultyWire(loop, below, Faults())
    assert wire.offloads == NO_OFFLOADS
    connect(loop, wire)
    frame, header, _data = tcp_frame(V4, 3000)
    loop.do(wire.send, views(frame, header=header.pack()))
    while len(below.sent) < 3:
        loop.do(lambda: None)
    assert {header for header, _data in below.sent} == {PLAIN}
    loop.do(wire.close)


def test_many_packets_to_be_cut_are_more_than_one_turn(loop):
    below = TestWire(loop)
    wire = FaultyWire(loop, below, Faults())
    nic = connect(loop, wire)
    frame, header, _data = tcp_frame(V4, 300 * 100)
    header = header._replace(gso_size=100)
    assert loop.do(wire.send, views(*[frame] * 6, header=header.pack())) == 2
    nic.wait(lambda n: n.writables == 1)
    loop.do(wire.close)


def test_the_link_flaps_and_is_up_again(loop):
    below = TestWire(loop)
    wire = FaultyWire(loop, below, Faults(flap=0.01))
    nic = connect(loop, wire)
    nic.wait(lambda n: n.links.count(False) >= 2 and n.links[-1])
    assert nic.links[:4] == [True, False, True, False]
    loop.do(wire.plug, False)
    loop.do(wire.stop, lambda: None)
    before = len(nic.links)
    loop.do(lambda: None)
    assert len(nic.links) == before
    loop.do(wire.close)


def test_a_stopped_wire_lets_nothing_arrive(loop):
    below = TestWire(loop)
    wire = FaultyWire(loop, below, Faults(delay=0.01))
    nic = connect(loop, wire)
    late = threading.Event()

    def arrive_and_stop() -> None:
        below.arrive(views(*FRAMES[:10]))
        wire.stop(lambda: None)  # in the same call: else they may have come before
        loop.call_later(0.02, late.set)

    loop.do(arrive_and_stop)
    assert late.wait(100)  # what would let them arrive was due before this
    assert nic.got == []
    loop.do(wire.start)
    nic.wait(lambda n: n.got == FRAMES[:10])
    loop.do(wire.close)


def test_a_damaged_tcp_packet_is_found_out(loop):
    """By the sum that every receiver makes."""
    from tests.net import packets as p

    whole = p.tcp(*V4, 1, 2, 3, 0x10, b"data of a packet")
    frame = p.ethernet(p.OTHER, p.OURS, 0x800, p.ipv4(*V4, 6, whole))
    got, shown = outcome(loop, Faults(corrupt=1.0), [frame] * 50)
    assert shown["corrupted_out"] == 50
    ends = socket.inet_aton(V4[0]) + socket.inet_aton(V4[1])
    damaged = [f for f in got if f[34:] != whole]
    assert damaged
    for each in damaged:
        assert p.word_sum(p.pseudo(ends[:4], ends[4:], 6, len(each) - 34) + each[34:]) != 0xFFFF
