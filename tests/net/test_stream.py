"""Frames over stream sockets: between two of ours, to hostile peers, and to QEMU."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.abi.virtio_net_hdr import VALID, VnetHeader
from hvkvm.errors import ConfigError
from hvkvm.events import Observer
from hvkvm.net.port import MAX_FRAME_BYTES, NO_OFFLOADS
from hvkvm.net.segment import finish
from hvkvm.net.stream import StreamPort
from hvkvm.net.stream_peer import Answerer, Caller
from hvkvm.net.user import UserPort
from tests.net import packets as p
from tests.net.conftest import Loop, connect, views
from tests.net.test_segment import V4, tcp_frame


class Telling(Observer):
    def __init__(self):
        self.events = []

    def event(self, event):
        self.events.append(event)


@pytest.fixture
def ends(loop):
    """A port, and the bare socket of its peer."""
    port = StreamPort(loop, 1500)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(30)
    loop.do(port.connected, ours)
    yield port, theirs
    loop.do(port.close)
    theirs.close()


def framed(*frames):
    return b"".join(len(f).to_bytes(4, "big") + f for f in frames)


def received(sock, size):
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, data
        data += more
    return data


def test_frames_go_both_ways_behind_their_length(loop, ends):
    port, theirs = ends
    nic = connect(loop, port)
    assert nic.links == [True]
    small, large = bytes(range(60)), random.Random(1).randbytes(MAX_FRAME_BYTES)
    assert loop.do(port.send, views(small, large, small)) == 3
    wanted = framed(small, large, small)
    assert received(theirs, len(wanted)) == wanted
    theirs.sendall(framed(large, small))
    nic.wait(lambda n: n.got == [large, small])
    came, went = loop.do(lambda: (port.statistics.received_bytes, port.statistics.sent_bytes))
    assert came == went - len(small) == len(large) + len(small)


def test_a_frame_in_any_pieces_is_the_same_frame(loop, ends):
    port, theirs = ends
    nic = connect(loop, port)
    frames = [random.Random(n).randbytes(14 + n) for n in range(40)]
    data = framed(*frames)
    for at in range(0, len(data), 7):
        theirs.sendall(data[at : at + 7])
        loop.do(lambda: None)
    nic.wait(lambda n: n.got == frames)


def test_a_full_socket_holds_the_sender_up_and_nothing_is_lost_or_torn(loop, ends):
    port, theirs = ends
    nic = connect(loop, port)
    frames = [random.Random(n).randbytes(14 + n * 41 % 60000) for n in range(300)]
    wanted = framed(*frames)
    got = []
    reader = threading.Thread(target=lambda: got.append(received(theirs, len(wanted))))
    sent = waits = 0
    while sent < len(frames):
        before = nic.writables
        batch = views(*frames[sent : sent + 50])
        taken = loop.do(port.send, batch)
        sent += taken
        if taken < len(batch):
            waits += 1
            if not reader.ident:
                assert loop.do(port.send, views(*frames[sent:])) == 0
                reader.start()
            nic.wait(lambda n, before=before: n.writables > before)
    reader.join()
    assert got == [wanted]
    assert waits > 0
    assert port.statistics.send_waits >= waits


@pytest.mark.parametrize("at_rest", [False, True])
def test_a_cable_that_is_pulled_has_what_waits_dropped(loop, ends, at_rest):
    """Though the peer reads nothing: a driver that waits for its completions can leave."""
    port, _theirs = ends
    nic = connect(loop, port)
    batch = views(*[bytes(1514)] * 50)
    while loop.do(port.send, batch) == len(batch):
        pass
    assert nic.writables == 0
    if at_rest:
        loop.do(port.stop, lambda: None)
    loop.do(port.plug, False)
    if at_rest:
        loop.do(lambda: None)
        assert nic.writables == 0
        loop.do(port.start)
    nic.wait(lambda n: n.writables)
    assert nic.links == [True, False]
    assert loop.do(port.send, batch) == len(batch)


class Recording:
    """A socket that keeps what each call writes."""

    def __init__(self, sock):
        self.sock, self.calls = sock, []

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def sendmsg(self, views, *rest):
        count = self.sock.sendmsg(views, *rest)
        self.calls.append(b"".join(views)[:count])
        return count

    def send(self, data, *rest):
        count = self.sock.send(data, *rest)
        self.calls.append(bytes(data[:count]))
        return count


LEAST_PIECE = 36544
"""Bytes of one call that a reader gets at once at least: Linux 6.1, `unix_stream_sendmsg`."""


def test_what_passt_reads_at_once_are_whole_frames_or_one_that_is_long(loop):
    """Of two frames, the first in two pieces, passt of 2023 would lose its place in the stream at times."""
    port = StreamPort(loop, 65520)
    port.call_bytes = UserPort.call_bytes
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(30)
    recording = Recording(ours)
    loop.do(port.connected, recording)
    nic = connect(loop, port)
    sizes = random.Random(5)
    frames = [
        bytes(sizes.choice([60, 1514, 14000, 32700, 36540, 61494, MAX_FRAME_BYTES])) for _ in range(200)
    ]
    wanted = framed(*frames)
    got = []
    reader = threading.Thread(target=lambda: got.append(received(theirs, len(wanted))))
    reader.start()
    sent = 0
    while sent < len(frames):
        before = nic.writables
        taken = loop.do(port.send, views(*frames[sent : sent + 50]))
        sent += taken
        if sent < len(frames) and taken < 50:
            nic.wait(lambda n, before=before: n.writables > before)
    reader.join()
    assert got == [wanted]
    loop.do(port.close)
    theirs.close()
    starts = {}
    at = 0
    for frame in frames:
        starts[at] = len(frame) + 4
        at += len(frame) + 4
    at = 0
    for call in recording.calls:
        end = at + len(call)
        if len(call) > LEAST_PIECE:
            assert at in starts
            assert starts[at] >= len(call), "a long frame and more"
        at = end
    assert at == len(wanted)
    assert max(map(len, recording.calls)) > LEAST_PIECE


def test_a_nic_without_room_gets_the_rest_later_in_order(loop, ends):
    port, theirs = ends
    nic = connect(loop, port, room=5)
    frames = [b"frame number %04d" % n for n in range(500)]
    theirs.sendall(framed(*frames))
    nic.wait(lambda n: len(n.got) == 5)
    while len(nic.got) < len(frames):
        with nic.changed:
            nic.room = 90
        loop.do(port.resume)
        nic.wait(lambda n: n.room == 0 or len(n.got) == len(frames))
    assert nic.got == frames
    assert port.statistics.receive_waits >= 5


def test_what_an_offload_left_undone_is_done(loop, ends):
    port, theirs = ends
    connect(loop, port)
    assert port.offloads == NO_OFFLOADS
    frame, header, _data = tcp_frame(V4, 3000)
    assert loop.do(port.send, views(frame, header=header.pack())) == 1
    wanted = framed(*finish(header, frame))
    assert received(theirs, len(wanted)) == wanted
    assert loop.do(port.send, views(frame, header=VnetHeader(1, 5, 1, 1, 34, 16).pack())) == 1
    assert port.statistics.sent_dropped == 1


def test_many_packets_to_be_cut_are_more_than_one_turn(loop, ends):
    """A guest that was never offered to leave them uncut may send them all the same."""
    port, theirs = ends
    nic = connect(loop, port)
    frame, header, _data = tcp_frame(V4, 300 * 100)
    header = header._replace(gso_size=100)
    batch = views(*[frame] * 6, header=header.pack())
    reader = threading.Thread(target=received, args=(theirs, 6 * len(framed(*finish(header, frame)))))
    reader.start()
    taken = []
    while batch:
        before = nic.writables
        taken.append(loop.do(port.send, batch))
        batch = batch[taken[-1] :]
        if batch:
            nic.wait(lambda n, before=before: n.writables > before)
    reader.join()
    assert max(taken) <= 2


def test_every_frame_for_the_guest_has_the_header_that_was_asked_for(loop):
    port = StreamPort(loop, 1500, header=VALID)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop.do(port.connected, ours)
    nic = connect(loop, port)
    theirs.sendall(framed(bytes(60)))
    nic.wait(lambda n: n.headers == [VALID])
    loop.do(port.close)


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_a_length_that_no_frame_has_ends_the_connection(loop, ends, size):
    port, theirs = ends
    nic = connect(loop, port)
    theirs.sendall(framed(bytes(20)) + size.to_bytes(4, "big") + bytes(100))
    nic.wait(lambda n: n.links == [True, False])
    assert theirs.recv(1) == b""
    assert not port.has_peer
    assert loop.do(port.send, views(bytes(60))) == 1


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=600), st.lists(st.integers(1, 100), max_size=6))
def test_nothing_a_peer_sends_raises(data, cuts):
    loop = Loop()
    loop.start()
    port = StreamPort(loop, 1500)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop.do(port.connected, ours)
    nic = connect(loop, port)
    at = 0
    for cut in [*cuts, len(data)]:
        try:
            theirs.sendall(data[at : at + cut])
        except BrokenPipeError:
            break
        at += cut
        loop.do(lambda: None)
    theirs.close()
    nic.wait(lambda n: n.links == [True, False])
    loop.do(port.close)
    loop.stop()
    assert loop.faults == []


def test_two_find_one_another_in_any_order_and_again(loop, tmp_path):
    path = tmp_path / "wire"
    calling = StreamPort(loop, 1500)
    telling = Telling()
    Caller(loop, calling, path, observer=telling)
    caller = connect(loop, calling)
    assert caller.links == [False]
    answering = StreamPort(loop, 1500)
    Answerer(loop, answering, path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    answerer = connect(loop, answering)
    caller.wait(lambda n: n.links == [False, True])
    answerer.wait(lambda n: n.links[-1])
    loop.do(calling.send, views(b"from the one that calls"))
    answerer.frame(lambda f: f == b"from the one that calls")
    loop.do(answering.send, views(b"from the one that answers"))
    caller.frame(lambda f: f == b"from the one that answers")
    assert len(telling.events) == 1

    loop.do(calling.close)
    answerer.wait(lambda n: n.links[-1] is False)
    again = StreamPort(loop, 1500)
    Caller(loop, again, path)
    second = connect(loop, again)
    answerer.wait(lambda n: n.links[-1])
    loop.do(answering.send, views(b"to the second one"))
    second.frame(lambda f: f == b"to the second one")
    loop.do(answering.close)
    second.wait(lambda n: n.links[-1] is False)
    loop.do(again.close)
    assert not path.exists()


def test_the_next_peer_begins_with_a_frame_of_its_own(loop, ends):
    """What the one before left of a frame, and was to get of one, is nothing to it."""
    port, theirs = ends
    nic = connect(loop, port)
    theirs.sendall(framed(b"a" * 60)[:30])
    assert loop.do(port.send, views(*[bytes(60000)] * 50)) < 50
    theirs.close()
    nic.wait(lambda n: n.links[-1] is False)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(30)
    loop.do(port.connected, ours)
    nic.wait(lambda n: n.links[-1] is True)
    theirs.sendall(framed(b"b" * 60))
    nic.wait(lambda n: n.got == [b"b" * 60])
    assert loop.do(port.send, views(b"c" * 60)) == 1
    assert received(theirs, 64) == framed(b"c" * 60)
    theirs.close()


def test_a_second_peer_waits_for_the_first_to_go(loop, tmp_path):
    path = tmp_path / "wire"
    port = StreamPort(loop, 1500)
    Answerer(loop, port, path)
    nic = connect(loop, port)
    first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    first.connect(str(path))
    nic.wait(lambda n: n.links[-1])
    second.connect(str(path))
    second.sendall(framed(b"of the second one"))
    first.sendall(framed(b"of the first one"))
    nic.frame(lambda f: f == b"of the first one")
    first.close()
    nic.frame(lambda f: f == b"of the second one")
    assert nic.got == [b"of the first one", b"of the second one"]
    loop.do(port.close)
    second.close()


def test_a_socket_that_cannot_be_is_told_with_the_remedy(loop, tmp_path):
    port = StreamPort(loop, 1500)
    for make, word in ((Caller, "socket"), (Answerer, "listen")):
        for path in (tmp_path / "no" / "wire", tmp_path / ("x" * 120)):
            with pytest.raises(ConfigError, match=f"--net {word}=.*; "):
                make(loop, port, path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no socket"):
        Answerer(loop, port, tmp_path / "file")


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU; make setup installs it")
@pytest.mark.parametrize("server", ["off", "on"])
def test_qemu_is_a_peer(loop, tmp_path, server):
    """QEMU joins our stream to its own user-mode network, whose gateway answers."""
    path = tmp_path / "wire"
    port = StreamPort(loop, 1500)
    nic = connect(loop, port)
    peer = Answerer(loop, port, path) if server == "off" else Caller(loop, port, path)
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-serial", "none"),
            *("-netdev", f"stream,id=s,server={server},addr.type=unix,addr.path={path}"),
            *("-netdev", "hubport,id=a,hubid=1,netdev=s"),
            *("-netdev", "user,id=u", "-netdev", "hubport,id=b,hubid=1,netdev=u"),
        ]
    )
    try:
        nic.wait(lambda n: n.links[-1])
        loop.do(port.send, views(p.arp_request(p.OURS, "10.0.2.15", "10.0.2.2")))
        gateway = nic.frame(p.is_arp_reply)[6:12]
        echo = b"\x08\x00\xf7\xff" + bytes(4)
        packet = p.ipv4("10.0.2.15", "10.0.2.2", 1, echo)
        loop.do(port.send, views(p.ethernet(gateway, p.OURS, 0x800, packet)))
        nic.frame(lambda f: f[23:24] == b"\x01" and f[34:35] == b"\x00")
    finally:
        process.terminate()
        process.wait()
        nic.wait(lambda n: not n.links[-1])
        loop.do(peer.close)
        loop.do(port.close)
