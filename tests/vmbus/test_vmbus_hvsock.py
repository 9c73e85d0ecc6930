"""vsock against a guest that behaves as Linux: streams, and how they end."""

from __future__ import annotations

from typing import Any

import pytest
from vsock_pairs import Make, Poor, ended, ended_in_time, from_host, ways

from hvkvm.abi import vmbus_messages as wire
from hvkvm.runtime.retry import RETRY_SECONDS


@pytest.mark.parametrize("mix", [False, True], ids=["in order", "in any order"])
@pytest.mark.parametrize("pages", [3, 6, 64])
@ways
def test_streams_arrive_unchanged_both_ways(make_vsock: Make, way: Any, pages: int, mix: bool) -> None:
    for seed in range(6):
        bench = make_vsock(seed, pages=pages, mix=mix)
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
        counters = bench.vsock.connections.counters
        assert (counters.bytes_to_guest, counters.bytes_to_host) == (len(there), len(back))
        assert bench.loopback.host.server.reports.total == 0


@ways
def test_a_host_without_memory_for_a_moment_loses_nothing(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(3)
    program, guest = way(bench)
    (connection,) = bench.vsock.connections.live
    poor: Any = Poor(connection._host.sock)
    connection._host.sock = poor
    back = bench.random.randbytes(800_000)
    guest.outgoing += back
    program.finish = guest.finish = True
    ended_in_time(bench, program, guest, RETRY_SECONDS)
    assert program.incoming == back
    assert poor.asked > 4


@ways
def test_a_host_without_memory_is_not_asked_again_at_once(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(3)
    program, guest = way(bench)
    (connection,) = bench.vsock.connections.live
    connection._host.sock = poor = Poor(connection._host.sock, times=200)
    guest.outgoing += b"word"
    bench.run()
    assert (poor.asked, program.incoming) == (1, b"")
    bench.io.advance(RETRY_SECONDS)
    bench.run()
    assert (poor.asked, program.incoming) == (2, b"")
    poor.times = 2
    bench.io.advance(RETRY_SECONDS)
    bench.run()
    assert (poor.asked, program.incoming) == (3, b"word")


@ways
def test_a_reader_that_stops_holds_the_writer_up_and_loses_nothing(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(3)
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
def test_a_full_socket_holds_up_a_guest_that_only_sends(make_vsock: Make, way: Any) -> None:
    """Nothing but the socket's own word wakes us: the ring's doorbell is masked, the host sends nothing."""
    bench = make_vsock(3)
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
def test_a_ring_full_of_small_packets_is_emptied_by_one_doorbell(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(3)
    program, guest = way(bench)
    for number in range(500):
        guest.send_packet(b"%03d" % number)
    bench.run()
    assert program.incoming == b"".join(b"%03d" % number for number in range(500))


@ways
def test_one_end_may_be_done_while_the_other_goes_on(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(4)
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


def test_the_guest_is_signalled_once_a_batch(make_vsock: Make) -> None:
    bench = make_vsock(5, pages=64)
    program, guest = from_host(bench)
    program.outgoing += bytes(10_000_000)
    program.finish = guest.finish = True
    bench.run(lambda: guest.state == "gone")
    counters = bench.vsock.connections.counters
    assert counters.packets_to_guest < 10_000_000 / 16384 * 1.5
    assert counters.signals < counters.packets_to_guest


@ways
def test_the_program_that_leaves_mid_stream_ends_the_guests(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(6)
    program, guest = way(bench)
    guest.outgoing += bytes(3_000_000)
    bench.run(lambda: len(program.incoming) > 500_000)
    program.sock.close()
    bench.programs.clear()
    bench.run(lambda: guest.state == "gone")
    bench.run()


@ways
def test_a_rescind_mid_stream_ends_the_program(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(7)
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
def test_a_guest_that_closes_the_channel_ends_the_program(make_vsock: Make, way: Any) -> None:
    bench = make_vsock(8)
    program, guest = way(bench)
    bench.loopback.client.post(wire.CLOSECHANNEL, relid=guest.channel.relid)
    guest.state = "closed"
    bench.run(lambda: program.at_end)
    assert guest.rescinded


def test_a_guest_that_is_done_and_takes_nothing_is_given_up(make_vsock: Make) -> None:
    """What a killed program leaves behind: its end, and a ring that nobody empties."""
    bench = make_vsock(9)
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


def test_a_guest_that_is_done_but_slow_is_not(make_vsock: Make) -> None:
    bench = make_vsock(9)
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
