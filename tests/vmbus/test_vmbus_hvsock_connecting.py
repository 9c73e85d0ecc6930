"""vsock: who reaches whom, who is refused, and how many there may be."""

from __future__ import annotations

import resource
import socket
from random import Random

import pytest
from vsock_pairs import Make, from_guest, from_host

from hvkvm.abi import hvsock as abi
from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.devices.synth.vsock import MAX_CONNECTIONS
from hvkvm.testing.vsock_loopback import VsockLoopback


def test_the_host_port_is_told_and_the_offer_says_what_it_is(make_vsock: Make) -> None:
    bench = make_vsock()
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


def test_data_may_follow_the_connect_line_at_once(make_vsock: Make) -> None:
    bench = make_vsock()
    bench.guest.listening.add(5)
    program = bench.caller(b"CONNECT 5\nhello")
    bench.run(lambda: bench.guest.sockets and bench.guest.sockets[0].incoming)
    assert bench.guest.sockets[0].incoming == b"hello"
    assert program.line is not None


def test_the_connect_line_may_come_in_pieces(make_vsock: Make) -> None:
    bench = make_vsock()
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
def test_other_lines_are_told_off(make_vsock: Make, line: bytes) -> None:
    bench = make_vsock()
    program = bench.caller(line)
    if not line:
        bench.run()
        assert not program.at_end
        bench.io.advance(10.0)  # a silent one
    bench.run(lambda: program.at_end or program.reset)
    assert program.incoming == b""
    assert bench.guest.sockets == []


def test_a_port_without_listener_is_refused_after_a_while(make_vsock: Make) -> None:
    bench = make_vsock()
    program = bench.caller(b"CONNECT 5\n")
    bench.run()
    assert not program.at_end
    bench.io.advance(5.0)
    bench.run(lambda: program.at_end)
    bench.run()
    assert bench.loopback.client.offers == {}
    assert bench.loopback.host.devices._devices == {}
    assert program.incoming == b""


def test_a_program_that_leaves_before_the_guest_accepts_leaves_nothing(make_vsock: Make) -> None:
    bench = make_vsock()
    program = bench.caller(b"CONNECT 5\n")
    bench.run()
    assert len(bench.loopback.client.offers) == 1
    program.sock.close()
    bench.programs.clear()
    bench.run()
    assert bench.loopback.client.offers == {}


def test_a_late_accept_is_taken_back(make_vsock: Make) -> None:
    """The guest's connect has timed out when our offer comes: it opens nothing."""
    bench = make_vsock()
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
def test_who_connects_to_nobody_is_told_from_4_1_on(make_vsock: Make, version: int) -> None:
    bench = make_vsock(version=version)
    bench.guest.connect(98)
    bench.run()
    answers = bench.loopback.client.count(wire.TL_CONNECT_RESULT)
    assert answers == (version > vmbus.VERSION_WIN10)
    if answers:
        answer = bench.loopback.client.last(wire.TL_CONNECT_RESULT)
        assert answer["status"] == vmbus.STATUS_CONNECTION_REFUSED
        assert answer["service_id"] == abi.service_guid(98)
    assert bench.loopback.client.offers == {}


def test_there_is_no_vsock_below_4_0(make_vsock: Make) -> None:
    bench = make_vsock(version=vmbus.VERSION_WIN8_1)
    program = bench.caller(b"CONNECT 5\n")
    bench.guest.connect(98)
    bench.run(lambda: program.at_end)
    assert bench.loopback.client.offers == {}
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 0


def test_the_guest_reaches_a_socket_of_the_host(make_vsock: Make) -> None:
    bench = make_vsock()
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


def test_a_queue_that_stays_full_is_a_refusal(make_vsock: Make) -> None:
    bench = make_vsock()
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


def test_sixty_four_at_a_time(make_vsock: Make) -> None:
    bench = make_vsock(10)
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


def test_there_are_not_more_than_so_many(make_vsock: Make, request: pytest.FixtureRequest) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < 3 * MAX_CONNECTIONS:
        pytest.skip(f"this process may have {hard} files")
    if resource.RLIM_INFINITY != soft < 3 * MAX_CONNECTIONS:
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3 * MAX_CONNECTIONS, hard))
    bench = make_vsock(accept_seconds=60.0)
    callers = []
    for number in range(MAX_CONNECTIONS + 3):
        callers.append(bench.caller(b"CONNECT 5\n" if number % 2 else b""))
        bench.run()
    assert [program.at_end or program.reset for program in callers] == [False] * MAX_CONNECTIONS + [True] * 3
    bench.vsock.listen(99, pytest.fail)
    bench.guest.connect(99)
    bench.run()
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 1


def test_out_of_file_descriptors_callers_wait(make_vsock: Make) -> None:
    bench = make_vsock()
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


def test_programs_of_this_process_connect_without_a_path(make_vsock: Make) -> None:
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


def test_a_guest_that_asks_for_what_it_has_is_refused(make_vsock: Make) -> None:
    bench = make_vsock()
    program, guest = from_guest(bench)
    endpoint = guest.channel.offer["instance"]
    bench.loopback.client.post(
        wire.TL_CONNECT_REQUEST, endpoint_id=endpoint, service_id=guest.channel.offer["interface"]
    )
    bench.run()
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 1
    guest.outgoing += b"unharmed"
    bench.run(lambda: program.incoming == b"unharmed")


def test_services_that_are_no_ports_are_refused(make_vsock: Make) -> None:
    bench = make_vsock()
    for service in (vmbus.HV_KVP_GUID, abi.service_guid(0x80000000)):
        bench.loopback.client.post(
            wire.TL_CONNECT_REQUEST, endpoint_id=abi.service_guid(1), service_id=service
        )
    bench.run()
    assert bench.loopback.client.count(wire.TL_CONNECT_RESULT) == 2
