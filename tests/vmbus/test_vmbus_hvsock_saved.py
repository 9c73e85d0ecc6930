"""Streams of a command that go on in another machine: nothing lost, doubled or torn, at any moment."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from saved_bus import through_json
from vsock_pairs import Make, from_guest

from hvkvm.abi import guest_command as abi
from hvkvm.devices.synth.hvsock import HvsockState
from hvkvm.devices.synth.vsock import Vsock
from hvkvm.devices.synth.vsock_saved import SavedStream
from hvkvm.state.codec import plain, restored
from hvkvm.testing.vsock_guest import GuestSocket
from hvkvm.testing.vsock_loopback import HostProgram, VsockLoopback
from hvkvm.vmbus.host import VmbusHost

PORT = abi.VSOCK_OUTPUT


def swap(
    bench: VsockLoopback,
    came: Callable[[socket.socket], object],
    at_rest: Callable[[], object] = lambda: None,
) -> tuple[SavedStream, ...]:
    """Save the bus and its streams; another goes on, where `came` listens. The former programs are left."""
    loop, old = bench.loopback, bench.vsock
    for _ in range(3):
        for _ in range(len(loop.deferred)):
            loop._run_deferred()
    rested: list[bool] = []
    loop.host.stop(lambda: rested.append(True))
    while not rested:
        loop._run_deferred()
    at_rest()
    while loop.deferred:
        loop._run_deferred()
    state = through_json(loop.host.save())
    streams = restored(tuple[SavedStream, ...], json.loads(json.dumps(plain(old.save()))), "streams")
    old.close()
    synic = loop.synic
    for left in (synic.handlers, synic.events, synic.messages, synic.doorbells, loop.deferred):
        left.clear()
    loop.host = VmbusHost(
        synic, loop.memory, synic.vp_count, loop.call_soon, loop.call_later, observer=loop.notes
    )
    loop.host.attach()
    bench.vsock = vsock = Vsock(loop.host, bench.io, None, observer=loop.notes)
    vsock.start()
    loop.host.load(state, vsock.restore(streams))
    vsock.listen(PORT, came)
    loop.host.go_on()
    return streams


def drained(program: HostProgram) -> bytes:
    """What the program of a bus that was saved still gets: all that had left the guest's ring."""
    while not program.at_end and not program.reset:
        try:
            data = program.sock.recv(1 << 17)
        except OSError:
            break
        program.incoming += data
        program.at_end = not data
    return bytes(program.incoming)


@pytest.mark.parametrize("pages", [3, 64])
@pytest.mark.parametrize("seed", range(6))
def test_a_stream_goes_on_through_many_machines(make_vsock: Make, seed: int, pages: int) -> None:
    bench = make_vsock(seed, pages=pages, mix=bool(seed % 2))
    random = bench.random
    program, guest = from_guest(bench, PORT)
    back = random.randbytes(400_000)
    there = random.randbytes(300_000)
    guest.outgoing += back
    guest.finish = True
    program.outgoing += there
    got, swaps = bytearray(), 0
    while guest.state != "gone" and not program.at_end:
        for _ in range(random.randrange(1, 30)):
            bench.round()
        if swaps < 12 and len(guest.outgoing) > 1000:
            came: list[socket.socket] = []
            swap(bench, came.append)
            swaps += 1
            got += drained(program)
            program.sock.close()
            bench.programs.remove(program)
            left = program.outgoing
            bench.run(lambda: came)  # noqa: B023
            program = bench.run_program(came[0])
            program.outgoing += left
        program.finish = not program.outgoing
    bench.run(lambda: program.at_end)
    got += program.incoming
    assert bytes(got) == back
    bench.run()
    assert bytes(guest.incoming) == there
    assert swaps > 3
    assert bench.loopback.host.server.reports.total == 0


@pytest.mark.parametrize(("piece", "buffer"), [(4096, 0), (65536, 0), (65536, 1 << 21)])
def test_input_that_fills_its_socket_goes_on_byte_for_byte(make_vsock: Make, piece: int, buffer: int) -> None:
    """A socket that was filled piece by piece holds more than another takes of that at once."""
    bench = make_vsock(3, pages=3)
    program, guest = from_guest(bench, PORT)
    if buffer:
        program.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    guest.reads = False
    sent = b""
    for _ in range(2):  # the guest's ring is full at first, and then the socket
        with suppress(BlockingIOError):
            while True:
                data = bench.random.randbytes(piece)
                sent += data[: program.sock.send(data)]
        bench.run()
    for _ in range(2):
        came: list[socket.socket] = []
        (stream,) = swap(bench, came.append)
        assert len(stream.state.unsent) > 100_000
        program.sock.close()
        bench.programs.remove(program)
        bench.run(lambda: came)  # noqa: B023
        program = bench.run_program(came[0])
    program.outgoing += b"and more"
    program.finish = True
    guest.reads = True
    bench.run(lambda: guest.fin_seen)
    assert bytes(guest.incoming) == sent + b"and more"


def test_the_end_of_input_goes_on(make_vsock: Make) -> None:
    """A command whose input has ended stays so, and its output comes."""
    bench = make_vsock(3)
    program, guest = from_guest(bench, PORT)
    program.finish = True
    bench.run(lambda: guest.fin_seen)
    came: list[socket.socket] = []
    (stream,) = swap(bench, came.append)
    assert stream.state.told_guest
    bench.run(lambda: came)
    program.sock.close()
    bench.programs.remove(program)
    program = bench.run_program(came[0])
    guest.outgoing += b"output"
    guest.finish = True
    bench.run(lambda: program.at_end)
    assert program.incoming == b"output"
    bench.run(lambda: guest.state == "gone")


def test_other_streams_are_reset(make_vsock: Make) -> None:
    bench = make_vsock(3)
    _program, guest = from_guest(bench, 99)
    came: list[socket.socket] = []
    assert swap(bench, came.append) == ()
    bench.run(lambda: guest.state == "gone")
    assert came == []


def test_a_stream_that_ends_while_the_machine_is_at_rest_ends_in_the_restored_guest(make_vsock: Make) -> None:
    """The program has left, and the time in which the guest may still read what it sent passes at rest."""
    bench = make_vsock(3)
    program, guest = from_guest(bench, 99)
    program.outgoing += b"answer"
    bench.run(lambda: guest.incoming == b"answer")
    program.sock.close()
    bench.programs.clear()
    bench.run()
    assert swap(bench, lambda _sock: None, at_rest=lambda: bench.io.advance(60)) == ()
    bench.run(lambda: guest.state == "gone")


def sample(**changed: Any) -> SavedStream:
    state = HvsockState(False, False, False, 0, b"")
    return SavedStream(PORT, bytes(16), state)._replace(**changed)


@pytest.mark.parametrize(
    "streams",
    [
        (sample(port=99),),
        (sample(port=-1),),
        (sample(), sample(endpoint=bytes(15) + b"1")),
        (sample(endpoint=b"short"),),
    ],
)
def test_streams_that_no_command_has_are_refused(make_vsock: Make, streams: tuple[SavedStream, ...]) -> None:
    bench = make_vsock(3)
    with pytest.raises(ValueError, match="is none of a command"):
        bench.vsock.restore(streams)


def test_a_stream_without_its_channel_harms_nothing(make_vsock: Make) -> None:
    """As a made-up file may have it."""
    bench = make_vsock(3)
    state = HvsockState(True, True, True, 1 << 40, bytes(1 << 20))
    bench.vsock.restore((sample(state=state),))
    program, guest = from_guest(bench, PORT)
    guest.outgoing += b"hello"
    bench.run(lambda: program.incoming == b"hello")
    assert isinstance(guest, GuestSocket)
