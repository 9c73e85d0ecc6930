"""vsock against a guest that behaves as Linux: streams, ends, refusals, and guests that break the rules."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hvkvm.abi import hvsock as abi
from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import VM_PKT_COMP, WORD_WRITE_INDEX
from hvkvm.devices.synth.vsock import MAX_CONNECTIONS
from hvkvm.testing.vsock_guest import GuestSocket
from hvkvm.testing.vsock_loopback import HostProgram, VsockLoopback

Make = Callable[..., VsockLoopback]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes vsocks with a guest; closes them, and looks whether they left anything behind."""
    before = open_fds()
    made: list[VsockLoopback] = []

    def new(seed: int = 0, **options: Any) -> VsockLoopback:
        made.append(VsockLoopback(tmp_path / f"v{len(made)}", Random(seed), **options))
        return made[-1]

    yield new
    for one in made:
        one.close()
        assert not one.path or not one.path.exists()
        assert one.io.readers == {}
        assert one.io.timers == 0
    assert open_fds() == before


def from_host(bench: VsockLoopback, port: int = 77) -> tuple[HostProgram, GuestSocket]:
    """A connection that a host program made and a guest's took."""
    bench.guest.listening.add(port)
    count = len(bench.guest.sockets)
    program = bench.caller(b"CONNECT %d\n" % port)
    bench.run(lambda: program.line is not None)
    return program, bench.guest.sockets[count]


def from_guest(bench: VsockLoopback, port: int = 99) -> tuple[HostProgram, GuestSocket]:
    """A connection that a guest's program made to a program of this process."""
    came: list[socket.socket] = []
    bench.vsock.listen(port, came.append)
    count = len(bench.guest.sockets)
    bench.guest.connect(port)
    bench.run(lambda: came)
    return bench.run_program(came[0]), bench.guest.sockets[count]


def ended(bench: VsockLoopback, program: HostProgram, guest: GuestSocket) -> None:
    """Both have read to the end, and the guest's kernel has given the channel back."""
    bench.run(lambda: program.at_end and guest.state == "gone")


WAYS = {"from host": from_host, "from guest": from_guest}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.parametrize("mix", [False, True], ids=["in order", "in any order"])
@pytest.mark.parametrize("pages", [3, 6, 64])
@ways
def test_streams_arrive_unchanged_both_ways(make: Make, way: Any, pages: int, mix: bool) -> None:
    for seed in range(6):
        bench = make(seed, pages=pages, mix=mix)
        program, guest = way(bench)
        there, back = (bench.random.randbytes(bench.random.choice((0, 5, 90_000, 800_000))) for _ in "ab")
        program.outgoing += there
        guest.outgoing += back
        program.finish = guest.finish = True
        ended(bench, program, guest)
        assert program.incoming == back
        assert guest.incoming == there
        assert not program.reset
        bench.run()
        counters = bench.vsock.counters
        assert (counters.bytes_to_guest, counters.bytes_to_host) == (len(there), len(back))
        assert bench.loopback.host.server.reports.total == 0


@ways
def test_a_reader_that_stops_holds_the_writer_up_and_loses_nothing(make: Make, way: Any) -> None:
    bench = make(3)
    program, guest = way(bench)
    there, back = bench.random.randbytes(2_000_000), bench.random.randbytes(2_000_000)
    program.reads = guest.reads = False
    program.outgoing += there
    guest.outgoing += back
    bench.run()
    assert program.outgoing
    assert guest.outgoing
    assert len(there) - len(program.outgoing) < 1_000_000
    program.reads = guest.reads = True
    program.finish = guest.finish = True
    ended(bench, program, guest)
    assert program.incoming == back
    assert guest.incoming == there


@ways
def test_a_full_socket_holds_up_a_guest_that_only_sends(make: Make, way: Any) -> None:
    """Nothing but the socket's own word wakes us: the ring's doorbell is masked, the host sends nothing."""
    bench = make(3)
    program, guest = way(bench)
    back = bench.random.randbytes(1_500_000)
    guest.outgoing += back
    for _ in range(4):
        program.reads = False
        bench.run()
        assert guest.outgoing
        program.reads = True
        for _ in range(3):
            program.step(bench.random)
    bench.run()
    assert program.incoming == back


@ways
def test_a_ring_full_of_small_packets_is_emptied_by_one_doorbell(make: Make, way: Any) -> None:
    bench = make(3)
    program, guest = way(bench)
    for number in range(500):
        guest.send_packet(b"%03d" % number)
    bench.run()
    assert program.incoming == b"".join(b"%03d" % number for number in range(500))


@ways
def test_one_end_may_be_done_while_the_other_goes_on(make: Make, way: Any) -> None:
    bench = make(4)
    program, guest = way(bench)
    guest.finish = True
    bench.run()
    assert program.at_end
    assert not guest.rescinded
    program.outgoing += b"answer" * 20_000
    program.finish = True
    bench.run(lambda: guest.state == "gone")
    assert guest.incoming == b"answer" * 20_000
    assert guest.fin_seen

    program, guest = way(bench)
    program.finish = True
    bench.run()
    assert guest.fin_seen
    assert not guest.rescinded
    guest.outgoing += b"answer" * 20_000
    guest.finish = True
    ended(bench, program, guest)
    assert program.incoming == b"answer" * 20_000


def test_the_guest_is_signalled_once_a_batch(make: Make) -> None:
    bench = make(5, pages=64)
    program, guest = from_host(bench)
    program.outgoing += bytes(10_000_000)
    program.finish = guest.finish = True
    bench.run(lambda: guest.state == "gone")
    counters = bench.vsock.counters
    assert counters.packets_to_guest < 10_000_000 / 16384 * 1.5
    assert counters.signals < counters.packets_to_guest


def test_the_host_port_is_told_and_the_offer_says_what_it_is(make: Make) -> None:
    bench = make()
    program, guest = from_host(bench, 0x7FFFFFFF)
    assert program.line is not None
    assert program.line.startswith(b"OK 10737418")
    offer = guest.channel.offer
    assert offer["interface"] == vmbus.guid("7fffffff-facb-11e6-bd58-64006a7986d3")
    assert offer["user_defined"][:5] == b"\0\0\0\0\1"
    _, guest = from_guest(bench)
    offer = guest.channel.offer
    assert offer["interface"] == vmbus.guid("00000063-facb-11e6-bd58-64006a7986d3")
    assert offer["user_defined"][:5] == b"\0\0\0\0\0"


def test_data_may_follow_the_connect_line_at_once(make: Make) -> None:
    bench = make()
    bench.guest.listening.add(5)
    program = bench.caller(b"CONNECT 5\nhello")
    bench.run(lambda: bench.guest.sockets and bench.guest.sockets[0].incoming)
    assert bench.guest.sockets[0].incoming == b"hello"
    assert program.line is not None


def test_the_connect_line_may_come_in_pieces(make: Make) -> None:
    bench = make()
    bench.guest.listening.add(5)
    program = bench.caller(b"CON")
    for piece in (b"NECT", b" ", b"5", b"\r\n"):
        bench.run()
        program.sock.send(piece)
    bench.run(lambda: program.line is not None)
    assert len(bench.guest.sockets) == 1


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"CONNECT\n",
        b"CONNECT -5\n",
        b"CONNECT 5x\n",
        b"CONNECT 2147483648\n",
        b"x" * 40,
        b"GET / \n",
        b"\n",
    ],
)
def test_other_lines_are_told_off(make: Make, line: bytes) -> None:
    bench = make()
    program = bench.caller(line)
    if not line:
        bench.run()
        assert not program.at_end
        bench.io.advance(10.0)  # a silent one
    bench.run(lambda: program.at_end or program.reset)
    assert program.incoming == b""
    assert bench.guest.sockets == []


def test_a_port_without_listener_is_refused_after_a_while(make: Make) -> None:
    bench = make()
    program = bench.caller(b"CONNECT 5\n")
    bench.run()
    assert not program.at_end
    bench.io.advance(5.0)
    bench.run(lambda: program.at_end)
    bench.run()
    assert bench.loopback.client.offers == {}
    assert bench.loopback.host._devices == {}
    assert program.incoming == b""


def test_a_program_that_leaves_before_the_guest_accepts_leaves_nothing(make: Make) -> None:
    bench = make()
    program = bench.caller(b"CONNECT 5\n")
    bench.run()
    assert len(bench.loopback.client.offers) == 1
    program.sock.close()
    bench.programs.clear()
    bench.run()
    assert bench.loopback.client.offers == {}


def test_a_late_accept_is_taken_back(make: Make) -> None:
    """The guest's connect has timed out when our offer comes: it opens nothing."""
    bench = make()
    came: list[socket.socket] = []
    bench.vsock.listen(99, came.append)
    bench.guest.connect(99)
    bench.guest.connects.clear()
    bench.run()
    assert len(bench.loopback.client.offers) == 1
    bench.io.advance(5.0)
    bench.run()
    assert bench.loopback.client.offers == {}
    assert came == []


@pytest.mark.parametrize("version", [vmbus.VERSION_WIN10, vmbus.VERSION_WIN10_V4_1, vmbus.VERSION_COPPER])
def test_who_connects_to_nobody_is_told_from_4_1_on(make: Make, version: int) -> None:
    bench = make(version=version)
    bench.guest.connect(98)
    bench.run()
    answers = bench.loopback.client.count(wire.TL_CONNECT_RESULT)
    assert answers == (version > vmbus.VERSION_WIN10)
    if answers:
        answer = bench.loopback.client.last(wire.TL_CONNECT_RESULT)
        assert answer["status"] == vmbus.STATUS_CONNECTION_REFUSED
        assert answer["service_id"] == abi.service_guid(98)
    assert bench.loopback.client.offers == {}


def test_there_is_no_vsock_below_4_0(make: Make) -> None:
    bench = make(version=vmbus.VERSION_WIN8_1)
    program = bench.caller(b"CONNECT 5\n")
    bench.guest.connect(98)
    bench.run(lambda: program.at_end)
    assert bench.loopback.client.offers == {}
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 0


def test_the_guest_reaches_a_socket_of_the_host(make: Make) -> None:
    bench = make()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{bench.path}_1234")
        listener.listen(1)
        for _ in range(4):  # more than its queue holds: they wait their turn
            bench.guest.connect(1234)
        bench.run()
        assert len(bench.guest.sockets) == 2
        for number in range(4):
            accepted, _ = listener.accept()
            program = bench.run_program(accepted)
            bench.io.advance(0.1)
            bench.run(lambda n=number: len(bench.guest.sockets) > n)
            program.outgoing += b"%d" % number
            program.finish = True
            bench.run()
        assert sorted(bytes(s.incoming) for s in bench.guest.sockets) == [b"0", b"1", b"2", b"3"]


def test_a_queue_that_stays_full_is_a_refusal(make: Make) -> None:
    bench = make()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{bench.path}_1234")
        listener.listen(0)
        for _ in range(3):
            bench.guest.connect(1234)
        bench.run()
        for _ in range(40):
            bench.io.advance(0.1)
            bench.run()
        assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 2


FRONTS = {
    "more than a packet may have": (1, abi.MAX_DATA_BYTES + 8, bytes(abi.MAX_DATA_BYTES + 8)),
    "more than is there": (1, 200, b"x" * 100),
    "huge": (1, 0xFFFFFFFF, b""),
    "another pipe type": (2, 0, b""),
}


@pytest.mark.parametrize("name", FRONTS)
@ways
def test_lying_headers_end_that_connection_alone(make: Make, way: Any, name: str) -> None:
    bench = make()
    kind, size, data = FRONTS[name]
    other, other_guest = from_host(bench, 1)
    program, guest = way(bench)
    guest.send_packet(data, header=abi.pipe_header.pack(kind, size))
    bench.run(lambda: program.at_end)
    bench.run()
    assert guest.state == "gone"
    assert program.incoming == b""
    assert bench.loopback.host.server.reports.total == 0
    assert "pipe packet" in str(bench.loopback.notes.events)
    other_guest.outgoing += b"still here"
    bench.run(lambda: other.incoming == b"still here")


def test_data_behind_the_end_is_a_broken_rule(make: Make) -> None:
    bench = make()
    program, guest = from_host(bench)
    guest.send_packet(b"")
    guest.send_packet(b"more")
    bench.run(lambda: program.at_end)
    bench.run()
    assert guest.state == "gone"
    assert "behind the empty one" in str(bench.loopback.notes.events)


@pytest.mark.parametrize("name", ["completion", "no pipe header", "index"])
def test_other_nonsense_ends_the_connection(make: Make, name: str) -> None:
    bench = make()
    program, guest = from_guest(bench)
    if name == "completion":
        guest.send_packet(b"", kind=VM_PKT_COMP)
    elif name == "no pipe header":
        guest.send_packet(b"", header=b"")
    else:
        guest.writer.words[WORD_WRITE_INDEX] = 0x12345
        bench.loopback.synic.signal(guest.channel.connection_id)
    bench.run(lambda: program.at_end)
    bench.run()
    assert guest.state == "gone"
    assert len(bench.loopback.notes.events) == 1


def test_junk_in_a_ring_never_raises(make: Make) -> None:
    for seed in range(200):
        bench = make(seed)
        program, guest = from_host(bench)
        random = bench.random
        pages = guest.channel.pages
        for _ in range(3):
            for pfn in pages:
                bench.loopback.memory.write(pfn * 4096 + random.randrange(4000), random.randbytes(96))
            guest.writer.words[WORD_WRITE_INDEX] = random.choice((random.randrange(0, 20480, 8), 24, 1 << 31))
            bench.loopback.synic.signal(guest.channel.connection_id)
            program.outgoing += bytes(random.randrange(40000))
            guest.reads = False
            while bench.loopback.step() or bench.io.poll() or program.step(random):
                pass
        bench.close()


def _with(context: Any, fn: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def wrapped(payload: bytes) -> None:
        with context:
            fn(payload)

    return wrapped


def test_no_order_of_messages_leaves_anything_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that connects, opens, closes and releases as it likes, while programs come and go."""
    for seed in range(40):
        bench = make(seed, mix=True)
        random, client = bench.random, bench.loopback.client
        bench.guest.listening |= {1, 2}
        came: list[socket.socket] = []
        bench.vsock.listen(3, came.append)
        # Its own mistakes confuse this guest; what counts is the host.
        tolerant = contextlib.suppress(AssertionError, KeyError, ValueError)
        monkeypatch.setattr(client, "deliver", _with(tolerant, client.deliver))
        for _ in range(150):
            relid = random.choice([*client.offers, random.randrange(3000)])
            what = random.randrange(9)
            if what == 0:
                client.post(
                    wire.TL_CONNECT_REQUEST,
                    endpoint_id=abi.service_guid(random.randrange(5)),
                    service_id=abi.service_guid(random.randrange(5)),
                )
            elif what == 1:
                client.post(wire.CLOSECHANNEL, relid=relid)
            elif what == 2:
                client.post(wire.RELID_RELEASED, relid=relid)
            elif what == 3:
                client.post(wire.GPADL_TEARDOWN, relid=relid, gpadl=random.choice((0xE1E10, 0xE1E11, 5)))
            elif what == 4:
                bench.caller(b"CONNECT %d\n" % random.randrange(4))
            elif what == 5 and bench.programs:
                bench.programs.pop(random.randrange(len(bench.programs))).sock.close()
            elif what == 6 and bench.guest.sockets:
                random.choice(bench.guest.sockets).outgoing += bytes(random.randrange(30000))
            elif what == 7 and random.random() < 0.1:
                bench.io.advance(6.0)
            elif what == 8 and random.random() < 0.05:
                client.contact(vmbus.VERSION_WIN10_V5_3)
                bench.guest.sockets.clear()
                client.free_pages = list(range(64, 1024))
                client.post(wire.REQUESTOFFERS)
            for _ in range(random.randrange(4)):
                bench.loopback.step()
                bench.io.poll()
                with tolerant:
                    bench.guest.step(random)
        bench.loopback.host.reset()
        while bench.loopback.step() or bench.io.poll():
            pass
        bench.io.advance(20.0)
        for sock in came:
            sock.close()
        assert "0 connections" in bench.vsock.describe()[0]
        assert bench.loopback.host._devices == {}
        assert bench.loopback.host._open == {}
        bench.close()


@ways
def test_the_program_that_leaves_mid_stream_ends_the_guests(make: Make, way: Any) -> None:
    bench = make(6)
    program, guest = way(bench)
    guest.outgoing += bytes(3_000_000)
    bench.run(lambda: len(program.incoming) > 500_000)
    program.sock.close()
    bench.programs.clear()
    bench.run(lambda: guest.state == "gone")
    bench.run()


@ways
def test_a_rescind_mid_stream_ends_the_program(make: Make, way: Any) -> None:
    bench = make(7)
    program, guest = way(bench)
    guest.outgoing += bytes(3_000_000)
    program.outgoing += bytes(3_000_000)
    bench.run(lambda: len(program.incoming) > 500_000)
    host = bench.loopback.host
    host.remove(next(c for c in host.server.channels.all if c.relid == guest.channel.relid))
    bench.run(lambda: program.at_end or program.reset)
    bench.run(lambda: guest.state == "gone")
    bench.run()


@ways
def test_a_guest_that_closes_the_channel_ends_the_program(make: Make, way: Any) -> None:
    bench = make(8)
    program, guest = way(bench)
    bench.loopback.client.post(wire.CLOSECHANNEL, relid=guest.channel.relid)
    guest.state = "closed"
    bench.run(lambda: program.at_end)
    assert guest.rescinded


def test_a_guest_that_is_done_and_takes_nothing_is_given_up(make: Make) -> None:
    """What a killed program leaves behind: its end, and a ring that nobody empties."""
    bench = make(9)
    program, guest = from_host(bench)
    guest.reads = False
    guest.finish = True
    program.outgoing += bytes(3_000_000)
    bench.run()
    assert program.at_end
    bench.io.advance(29.0)
    bench.run()
    assert not guest.rescinded
    bench.io.advance(40.0)
    bench.run()
    assert guest.rescinded
    assert program.reset


def test_a_guest_that_is_done_but_slow_is_not(make: Make) -> None:
    bench = make(9)
    program, guest = from_host(bench)
    guest.finish = True
    program.outgoing += bytes(1_000_000)
    program.finish = True
    while not guest.fin_seen:
        guest.reads = False
        bench.run()
        bench.io.advance(25.0)
        guest.reads = True
        for _ in range(3):
            bench.round()
    bench.run(lambda: guest.state == "gone")
    assert len(guest.incoming) == 1_000_000


def test_sixty_four_at_a_time(make: Make) -> None:
    bench = make(10)
    pairs = []
    for number in range(32):
        pairs += [from_host(bench, number), from_guest(bench, 1000 + number)]
    assert len(bench.vsock.describe()) == 65
    data = {}
    for program, guest in pairs:
        data[program] = bench.random.randbytes(60_000), bench.random.randbytes(60_000)
        program.outgoing += data[program][0]
        guest.outgoing += data[program][1]
        program.finish = guest.finish = True
    bench.run(lambda: all(p.at_end and g.state == "gone" for p, g in pairs))
    for program, guest in pairs:
        assert (guest.incoming, program.incoming) == data[program]
    bench.run()
    assert len(bench.vsock.describe()) == 1


def test_there_are_not_more_than_so_many(make: Make) -> None:
    bench = make(accept_seconds=60.0)
    callers = []
    for number in range(MAX_CONNECTIONS + 3):
        callers.append(bench.caller(b"CONNECT 5\n" if number % 2 else b""))
        bench.run()
    assert [program.at_end or program.reset for program in callers] == [False] * MAX_CONNECTIONS + [True] * 3
    bench.vsock.listen(99, pytest.fail)
    bench.guest.connect(99)
    bench.run()
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 1


def test_out_of_file_descriptors_callers_wait(make: Make) -> None:
    bench = make()
    bench.guest.listening.add(5)
    program = bench.caller(b"CONNECT 5\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (program.sock.fileno() + 1, hard))
    try:
        bench.run()  # comes to rest, though somebody waits
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "cannot accept" in str(bench.loopback.notes.events)
    assert not program.reset
    bench.io.advance(1.0)
    bench.run(lambda: program.line is not None)


LEAVES = {
    "reset": lambda bench: bench.loopback.host.reset(),
    "contact": lambda bench: bench.loopback.client.contact(vmbus.VERSION_WIN10_V5_3),
    "unload": lambda bench: bench.loopback.client.post(wire.UNLOAD),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_a_guest_that_leaves_ends_every_program(make: Make, leave: Any) -> None:
    for seed in range(5):
        bench = make(seed, mix=True)
        pairs = [from_host(bench), from_guest(bench)]
        waiting = bench.caller(b"CONNECT 6\n")
        came: list[socket.socket] = []
        bench.vsock.listen(100, came.append)
        bench.guest.connect(100)
        for program, guest in pairs:
            program.outgoing += bytes(300_000)
            guest.outgoing += bytes(300_000)
        for _ in range(seed * 3):
            bench.round()
        leave(bench)
        bench.guest.sockets.clear()
        bench.guest.connects.clear()
        bench.loopback.client.offers.clear()
        bench.loopback.client.messages.clear()
        bench.run()
        bench.io.advance(5.0)  # for what named its port only then
        bench.run()
        ends = [waiting, *(program for program, _ in pairs), *map(bench.run_program, came)]
        bench.run()
        assert all(program.at_end or program.reset for program in ends)
        # And the next one finds nothing of the old.
        assert bench.loopback.client.offers == {}
        bench.guest.listening.clear()
        bench.loopback.client.free_pages = list(range(64, 1024))
        bench.loopback.connect(vmbus.VERSION_WIN10_V5_3)
        bench.run()
        assert bench.loopback.client.offers == {}
        program, guest = from_host(bench, 8)
        guest.outgoing += b"again"
        bench.run()
        assert program.incoming == b"again"
        assert bench.loopback.client.count(wire.RESCIND_CHANNELOFFER) == 0


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_a_guest_that_leaves_ends_what_it_had_not_accepted(make: Make, leave: Any) -> None:
    bench = make()
    program = bench.caller(b"CONNECT 6\n")
    came: list[socket.socket] = []
    bench.vsock.listen(100, came.append)
    bench.guest.connect(100)
    bench.guest.connects.clear()
    bench.run()
    assert len(bench.loopback.client.offers) == 2
    leave(bench)
    bench.run()
    assert program.at_end
    bench.loopback.connect(vmbus.VERSION_WIN10_V5_3)
    assert bench.loopback.client.offers == {}
    assert bench.loopback.client.count(wire.RESCIND_CHANNELOFFER) == 0
    assert bench.loopback.host._devices == {}


def test_programs_of_this_process_connect_without_a_path(make: Make) -> None:
    bench = VsockLoopback(None, Random(1))
    bench.guest.listening.add(7)
    program = bench.run_program(bench.vsock.connect(7))
    refused = bench.run_program(bench.vsock.connect(8))
    program.outgoing += b"hello"
    bench.run(lambda: bench.guest.sockets and bench.guest.sockets[0].incoming == b"hello")
    bench.guest.sockets[0].outgoing += b"world"
    bench.run(lambda: program.incoming == b"world")
    bench.io.advance(5.0)
    bench.run(lambda: refused.at_end)
    bench.close()


def test_a_guest_that_asks_for_what_it_has_is_refused(make: Make) -> None:
    bench = make()
    program, guest = from_guest(bench)
    endpoint = guest.channel.offer["instance"]
    bench.loopback.client.post(
        wire.TL_CONNECT_REQUEST, endpoint_id=endpoint, service_id=guest.channel.offer["interface"]
    )
    bench.run()
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 1
    guest.outgoing += b"unharmed"
    bench.run(lambda: program.incoming == b"unharmed")


def test_services_that_are_no_ports_are_refused(make: Make) -> None:
    bench = make()
    for service in (vmbus.HV_KVP_GUID, abi.service_guid(0x80000000)):
        bench.loopback.client.post(
            wire.TL_CONNECT_REQUEST, endpoint_id=abi.service_guid(1), service_id=service
        )
    bench.run()
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 2
