"""vsock: what was written before a close arrives, whoever closes first and at whichever moment."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from vsock_pairs import Make, Poor, from_host, ways

from hvkvm.abi import vmbus_messages as wire
from hvkvm.devices.synth.hvsock import MAX_LAST_PACKETS
from hvkvm.runtime.retry import RETRY_SECONDS
from hvkvm.testing.vsock_guest import GuestSocket
from hvkvm.testing.vsock_loopback import VsockLoopback

SIZES = (0, 5, 15_000, 100_000)
PORT = 1234

Stage = Callable[[VsockLoopback], None]


def host_alone(bench: VsockLoopback) -> None:
    """Everything but the guest's sockets and the programs goes on until it rests."""
    while bench.io.poll() or bench.loopback.step():
        pass


def offered(bench: VsockLoopback) -> None:
    """The guest has the offer and has not looked at it."""
    host_alone(bench)


def opening(bench: VsockLoopback) -> None:
    """The guest has asked to open the channel; the host has not heard."""
    while not any(one.state == "opening" for one in bench.guest.sockets):
        host_alone(bench)
        assert bench.guest.step(bench.random)


def answered(bench: VsockLoopback) -> None:
    """The channel is open to the host; the guest has not seen that."""
    opening(bench)
    host_alone(bench)


def opened(bench: VsockLoopback) -> None:
    """The channel is open to both."""
    bench.run(lambda: any(one.state == "open" for one in bench.guest.sockets))
    bench.run()


stages = pytest.mark.parametrize("stage", [offered, opening, answered, opened], ids=lambda s: s.__name__)
sizes = pytest.mark.parametrize("size", SIZES)


@contextmanager
def server(bench: VsockLoopback) -> Iterator[socket.socket]:
    """A host's program that listens where the guest connects to."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{bench.path}_{PORT}")
        listener.listen(8)
        listener.settimeout(0)
        yield listener


def only_socket(bench: VsockLoopback) -> GuestSocket:
    assert len(bench.guest.sockets) == 1
    return bench.guest.sockets[0]


def all_is_over(bench: VsockLoopback) -> None:
    """The guest's program closes; nothing is left of the connection, and nobody broke a rule."""
    for one in bench.guest.sockets:
        one.finish = True
    bench.run()
    assert bench.loopback.client.offers == {}
    assert len(bench.vsock.describe()) == 1
    assert bench.loopback.host.server.reports.total == 0


@sizes
@stages
def test_a_server_that_answers_and_closes_is_heard(make_vsock: Make, stage: Stage, size: int) -> None:
    bench = make_vsock(1)
    data = bench.random.randbytes(size)
    with server(bench) as listener:
        bench.guest.connect(PORT)
        stage(bench)
        with listener.accept()[0] as sock:
            sock.sendall(data)
        host_alone(bench)
        bench.run()
    guest = only_socket(bench)
    assert guest.incoming == data
    assert guest.fin_seen
    assert not guest.rescinded, "Linux's connect may still be waiting"
    all_is_over(bench)


@sizes
def test_a_guest_that_stays_open_behind_a_server_that_left_is_ended(make_vsock: Make, size: int) -> None:
    bench = make_vsock(2)
    data = bench.random.randbytes(size)
    with server(bench) as listener:
        bench.guest.connect(PORT)
        bench.run()
        with listener.accept()[0] as sock:
            sock.sendall(data)
        guest = only_socket(bench)
        guest.reads = False
        bench.run()
        for _ in range(100):
            bench.io.advance(2.5)
            bench.run()
        assert guest.rescinded == (not size), "it may be slow to read"
        guest.reads = True
        guest.close() if guest.state == "gone" else bench.run()
        bench.io.advance(2.5)
        bench.run()
    assert guest.rescinded
    assert guest.incoming == data


@sizes
@stages
def test_a_caller_that_sends_and_leaves_is_heard(make_vsock: Make, stage: Stage, size: int) -> None:
    """Also before the guest accepts; but one that left without a word by then is not offered any more."""
    bench = make_vsock(3)
    bench.guest.listening.add(PORT)
    data = bench.random.randbytes(size)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(bench.path))
        caller.sendall(b"CONNECT %d\n" % PORT)
        stage(bench)
        caller.sendall(data)
    host_alone(bench)
    bench.run()
    if not size and stage is not opened and not bench.guest.sockets:
        return
    guest = only_socket(bench)
    assert guest.incoming == data
    if size:
        assert guest.fin_seen
    bench.io.advance(2.5)
    all_is_over(bench)


@stages
@pytest.mark.parametrize("size", SIZES)
def test_a_caller_that_says_it_is_done_still_gets_the_answer(
    make_vsock: Make, stage: Stage, size: int
) -> None:
    bench = make_vsock(4)
    bench.guest.listening.add(PORT)
    there, back = bench.random.randbytes(size), bench.random.randbytes(90_000)
    program = bench.caller(b"CONNECT %d\n" % PORT)
    bench.programs.clear()  # it does nothing by itself yet
    stage(bench)
    program.sock.sendall(there)
    program.sock.shutdown(socket.SHUT_WR)
    program.shut = True
    bench.programs.append(program)
    host_alone(bench)
    bench.run()
    guest = only_socket(bench)
    assert (guest.incoming, guest.fin_seen) == (there, True)
    assert not guest.rescinded
    guest.outgoing += back
    guest.finish = True
    bench.run(lambda: program.at_end)
    assert (program.incoming, program.reset) == (back, False)
    all_is_over(bench)


@stages
@sizes
def test_a_guest_that_sends_and_closes_is_heard(make_vsock: Make, stage: Stage, size: int) -> None:
    """The guest's end comes before the host's program has even accepted."""
    bench = make_vsock(5)
    data = bench.random.randbytes(size)
    with server(bench) as listener:
        bench.guest.connect(PORT)
        stage(bench)
        bench.run(lambda: bench.guest.sockets)
        guest = only_socket(bench)
        guest.outgoing += data
        guest.finish = True
        bench.run()
        program = bench.run_program(listener.accept()[0])
        bench.run(lambda: program.at_end)
        assert program.incoming == data
        assert not program.reset
        program.finish = True
        bench.run()
    all_is_over(bench)


@pytest.mark.parametrize("poor", [False, True])
@ways
def test_what_a_guest_wrote_before_it_closed_its_channel_waits_for_a_slow_program(
    make_vsock: Make, way: Any, poor: bool
) -> None:
    """Linux closes the channel 8 s after its program did, whatever the host has taken by then.

    Also on a host that has no memory each other time.
    """
    bench = make_vsock(6)
    program, guest = way(bench)
    program.reads = False
    if poor:
        (connection,) = bench.vsock.connections.live
        connection._host.sock = Poor(connection._host.sock)
    written = bench.random.randbytes(900_000)
    guest.outgoing += written
    bench.run()
    kept = len(written) - len(guest.outgoing)
    bench.loopback.client.post(wire.CLOSECHANNEL, relid=guest.channel.relid)
    guest.state = "closed"
    bench.run()
    assert guest.rescinded, "the guest has its channel back at once"
    bench.io.advance(20.0)
    program.reads = True
    for _ in range(1000):
        bench.run()
        if program.at_end:
            break
        bench.io.advance(RETRY_SECONDS)
    assert not program.reset
    assert program.incoming == written[:kept]
    bench.run()
    assert bench.io.timers == 0


def test_what_is_taken_from_a_closed_channel_has_a_bound(make_vsock: Make) -> None:
    """Far more than Linux's rings hold; the guest gave up the rest with its channel."""
    bench = make_vsock(6, pages=64)
    program, guest = from_host(bench)
    bench.run()
    count = 0
    while guest._writable_bytes() > 100:
        guest.send_packet(b"%08d" % count)
        count += 1
    assert count > MAX_LAST_PACKETS
    bench.loopback.client.post(wire.CLOSECHANNEL, relid=guest.channel.relid)
    guest.state = "closed"
    while bench.loopback.deferred:  # no doorbell comes through before
        bench.loopback._run_deferred()
    taken = bench.vsock.connections.counters.packets_to_host
    assert MAX_LAST_PACKETS <= taken < MAX_LAST_PACKETS + 100
    bench.run(lambda: program.at_end)
    assert program.incoming == b"".join(b"%08d" % number for number in range(taken))


def test_a_program_that_never_reads_the_rest_is_given_up(make_vsock: Make) -> None:
    bench = make_vsock(7)
    program, guest = from_host(bench)
    program.reads = False
    guest.outgoing += bytes(900_000)
    bench.run()
    bench.loopback.client.post(wire.CLOSECHANNEL, relid=guest.channel.relid)
    guest.state = "closed"
    bench.run()
    assert bench.io.timers == 1
    bench.io.advance(30.0)
    assert bench.io.timers == 0


def test_the_end_of_the_machine_still_brings_what_lies_in_the_ring(make_vsock: Make) -> None:
    """The guest has powered off behind its last write; the loop has ended with that doorbell unheard."""
    bench = make_vsock(8)
    program, guest = from_host(bench)
    bench.run()
    guest.send_packet(b"last words")
    bench.vsock.close()
    while program.step(bench.random):
        pass
    assert program.incoming == b"last words"
    assert program.at_end


@pytest.mark.parametrize("seed", range(60))
def test_data_arrives_in_any_order_of_events(make_vsock: Make, seed: int) -> None:
    """Somebody writes and closes at a random moment of a random schedule; the other reads to the end."""
    random = Random(seed)
    bench = make_vsock(seed, mix=True, pages=random.choice((3, 6, 64)))
    data = random.randbytes(random.choice(SIZES))
    with server(bench) as listener:
        bench.guest.connect(PORT)
        for _ in range(random.randrange(30)):
            bench.round()
        bench.run(lambda: bench.loopback.client.offers)
        with listener.accept()[0] as sock:
            sock.sendall(data)
            if random.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
                for _ in range(random.randrange(10)):
                    bench.round()
        bench.run(lambda: bench.guest.sockets and bench.guest.sockets[0].fin_seen)
    assert only_socket(bench).incoming == data
    all_is_over(bench)


def test_a_listener_that_raises_ends_that_connection_alone(make_vsock: Make) -> None:
    bench = make_vsock(9)

    def broken(_sock: socket.socket) -> None:
        raise KeyError("its own mistake")

    bench.vsock.listen(PORT, broken)
    bench.guest.connect(PORT)
    bench.run()
    assert only_socket(bench).fin_seen
    assert "the listener of port 1234 failed: KeyError: 'its own mistake'" in str(bench.loopback.notes.events)
    came: list[socket.socket] = []
    bench.vsock.listen(PORT, came.append)
    bench.guest.connect(PORT)
    bench.run(lambda: came)
    came[0].close()
    all_is_over(bench)


def test_retries_end_with_the_guest_that_asked(make_vsock: Make) -> None:
    """A guest that contacts anew again and again leaves no timers of its earlier requests."""
    bench = make_vsock(10)
    with server(bench) as listener:
        listener.listen(0)
        bench.guest.connect(PORT)
        bench.run()
        for _ in range(20):
            for _ in range(5):
                bench.guest.connect(PORT)
            bench.run()
            assert bench.io.timers <= 6
            bench.loopback.client.contact(bench.loopback.host.server.version)
            bench.run()
        assert bench.io.timers == 0
