"""All connections of a vsock share one bounded turn of the I/O loop, in rotation."""

from __future__ import annotations

from vsock_pairs import Make, from_host

from hvkvm.devices.synth.hvsock import TURN
from hvkvm.devices.synth.hvsock_packets import PACKETS
from hvkvm.devices.synth.vsock_connections import TURN_PACKETS
from hvkvm.testing.vsock_guest import GuestSocket
from hvkvm.testing.vsock_loopback import HostProgram, VsockLoopback

CONNECTIONS = 12
MOST = TURN_PACKETS + 2 * TURN * PACKETS + 2
"""Packets of one turn: a connection that begins within the budget moves its own each way, and an end."""


def busy(make_vsock: Make) -> tuple[VsockLoopback, list[tuple[HostProgram, GuestSocket]]]:
    """Connections with much to move both ways, of which nothing has moved yet."""
    bench = make_vsock(pages=32)
    pairs = [from_host(bench, number) for number in range(CONNECTIONS)]
    bench.run()
    for program, guest in pairs:
        program.sock.send(bytes(200_000))
        while guest._writable_bytes() > 500:
            guest.send_packet(bytes(400))
    return bench, pairs


def moved(bench: VsockLoopback) -> int:
    counters = bench.vsock.connections.counters
    return counters.packets_to_guest + counters.packets_to_host


def test_no_turn_is_longer_than_its_bound_and_one_is_pending(make_vsock: Make) -> None:
    bench, pairs = busy(make_vsock)
    turns = 0
    before_all = moved(bench)
    while True:
        bench.io.poll()
        for doorbell in bench.loopback.synic.events.values():
            doorbell()
        assert len(bench.loopback.deferred) <= 1
        before = moved(bench)
        if bench.loopback.deferred:
            bench.loopback._run_deferred()
        assert moved(bench) - before <= MOST
        for program, _guest in pairs:
            program._read(bench.random)
        turns += 1
        if moved(bench) == before and not bench.loopback.deferred:
            break
        assert turns < 10_000
    assert moved(bench) - before_all > 10 * MOST


def test_nobody_has_a_second_turn_before_all_have_had_one(make_vsock: Make) -> None:
    bench, _pairs = busy(make_vsock)
    connections = list(bench.vsock.connections.live)
    bench.io.poll()
    for doorbell in bench.loopback.synic.events.values():
        doorbell()
    before = [connection.counters.wakes for connection in connections]  # the first had one at once
    for _ in range(4 * CONNECTIONS):
        if not bench.loopback.deferred:
            break
        bench.loopback._run_deferred()
        turns = [c.counters.wakes - n for c, n in zip(connections, before, strict=True)]
        assert max(turns) - min(turns) <= 1
    assert min(turns) >= 1


def test_a_connection_that_ends_while_it_waits_has_no_turn(make_vsock: Make) -> None:
    bench, pairs = busy(make_vsock)
    bench.io.poll()
    for connection in list(bench.vsock.connections.live):
        connection.end()
    for program, _guest in pairs:
        program.sock.close()
    bench.programs.clear()
    bench.run()
    assert len(bench.vsock.connections.turns) == 0
