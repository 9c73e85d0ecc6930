"""What the guest gets of passt's TCP, and passt is asked for it; the real passt is in test_namespace."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import tcp
from hvkvm.abi.virtio_net_hdr import PLAIN, VALID
from hvkvm.net import tcp_help
from hvkvm.net.tcp_help import CLOSED_WINDOW, MAX_CLOSED, MAX_FLOWS, MAX_WINDOW, SMALL_WINDOW, TcpHelp
from tests.net import packets as p

GUEST = {4: "10.0.2.15", 6: "fd00::15"}
SERVER = {4: "10.0.2.2", 6: "fd00::2"}
SCALE = 7
HEADER = memoryview(VALID)


class Clock:
    """Runs what is due when told to: `call_later` and `monotonic` of one time."""

    def __init__(self):
        self.now = 0.0
        self.timers = []

    def call_later(self, seconds, fn, *args):
        timer = Timer(self.now + seconds, fn, args)
        self.timers.append(timer)
        return timer

    def run(self, seconds):
        end = self.now + seconds
        while due := [t for t in self.timers if t.at <= end]:
            first = min(due, key=lambda t: t.at)
            self.timers.remove(first)
            self.now = max(self.now, first.at)
            if not first.cancelled:
                first.fn(*first.args)
        self.now = end


class Timer:
    def __init__(self, at, fn, args):
        self.at, self.fn, self.args, self.cancelled = at, fn, args, False

    def cancel(self):
        self.cancelled = True


def segment(version, source, target, ports, flags, *, sequence=0, ack=0, window=0, options=b"", data=b""):
    """An Ethernet frame with a TCP segment, its checksums filled in."""
    body = struct.pack(">HHIIBBHHH", *ports, sequence, ack, 0x50 + len(options) * 4, flags, window, 0, 0)
    body += options + data
    addresses = p.addresses(source, target)
    body = (
        body[:16]
        + struct.pack(">H", 0xFFFF ^ p.word_sum(p.pseudo(*addresses, 6, len(body)) + body))
        + body[18:]
    )
    made = p.ipv4 if version == 4 else p.ipv6
    return bytearray(
        p.ethernet(p.OTHER, p.OURS, 0x800 if version == 4 else 0x86DD, made(source, target, 6, body))
    )


def scale_option(shift):
    return b"" if shift is None else struct.pack(">BBBB", 1, 3, 3, shift)


def checks_out(frame, version):
    """Whether the checksum of the TCP segment in `frame` is right."""
    at = 34 if version == 4 else 54
    pair = frame[26:34] if version == 4 else frame[22:54]
    half = len(pair) // 2
    return p.word_sum(p.pseudo(pair[:half], pair[half:], 6, len(frame) - at) + frame[at:]) == 0xFFFF


class Connection:
    """A guest's connection through `windows`; its frames as the two sides would send them."""

    def __init__(self, windows, version=4, port=1000, ours=SCALE, theirs=SCALE, segment_bytes=None):
        self.windows, self.version, self.port = windows, version, port
        size = b"" if segment_bytes is None else struct.pack(">BBH", 2, 4, segment_bytes)
        self.guest(tcp.SYN, options=size + scale_option(ours))
        self.server(tcp.SYN | tcp.ACK, window=0xFFFF, options=scale_option(theirs))
        self.guest(tcp.ACK)

    def guest(self, flags, **more):
        frame = segment(
            self.version,
            GUEST[self.version],
            SERVER[self.version],
            (self.port, 80),
            flags,
            window=501,
            **more,
        )
        self.windows.from_guest([(memoryview(PLAIN), memoryview(frame))])

    def server(self, flags, window=0, **more):
        """The frame as the guest gets it."""
        frame = segment(
            self.version,
            SERVER[self.version],
            GUEST[self.version],
            (80, self.port),
            flags,
            window=window,
            **more,
        )
        self.windows.from_passt([(HEADER, memoryview(frame))])
        assert checks_out(frame, self.version)
        return frame

    def window_seen(self, window):
        at = 34 if self.version == 4 else 54
        return struct.unpack_from(">H", self.server(tcp.ACK, window=window), at + 14)[0]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tcp_help, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def asked():
    return []


@pytest.fixture
def windows(clock, asked):
    return TcpHelp(clock, asked.extend)


@pytest.mark.parametrize("version", [4, 6])
def test_no_window_is_larger_than_what_passt_takes(windows, version):
    connection = Connection(windows, version)
    assert connection.window_seen(0xFFFF) << SCALE == MAX_WINDOW
    assert connection.window_seen(MAX_WINDOW >> SCALE) << SCALE == MAX_WINDOW
    assert connection.window_seen(100) == 100
    assert windows.limited == 1


@pytest.mark.parametrize(
    ("segment_bytes", "most"), [(None, SMALL_WINDOW), (1460, SMALL_WINDOW), (61440, MAX_WINDOW)]
)
def test_small_segments_have_a_small_window_where_sockets_have_little_room(clock, asked, segment_bytes, most):
    windows = TcpHelp(clock, asked.extend, little_room=True)
    assert Connection(windows, segment_bytes=segment_bytes).window_seen(0xFFFF) << SCALE == most


@pytest.mark.parametrize(("ours", "theirs"), [(None, SCALE), (SCALE, None), (None, None), (SCALE, 0)])
def test_a_window_that_is_not_scaled_is_left_alone(windows, ours, theirs):
    connection = Connection(windows, ours=ours, theirs=theirs)
    assert connection.window_seen(0xFFFF) == 0xFFFF


def test_a_connection_whose_begin_was_not_seen_is_left_alone(windows):
    frame = segment(4, SERVER[4], GUEST[4], (80, 1000), tcp.ACK, window=0xFFFF)
    before = bytes(frame)
    windows.from_passt([(HEADER, memoryview(frame))])
    assert frame == before


@pytest.mark.parametrize("version", [4, 6])
def test_passt_is_asked_while_a_window_is_closed_as_a_guest_asks(windows, clock, asked, version):
    connection = Connection(windows, version)
    connection.guest(tcp.ACK, ack=77)
    assert connection.window_seen(0) == 0
    connection.server(tcp.ACK, ack=5000)
    clock.run(10)
    assert 20 < len(asked) < 40  # after 5 ms first, and every half second in the end
    frame = bytes(asked[0][1])
    assert len(asked[0]) == 2
    assert asked[0][0] == VALID
    expected = segment(
        version, GUEST[version], SERVER[version], (1000, 80), tcp.ACK, sequence=4999, ack=77, window=501
    )
    expected[:12] = p.OURS + p.OTHER  # the frame that it answers, turned round
    if version == 4:  # the identification is ours
        expected[18:20], expected[24:26] = frame[18:20], frame[24:26]
    assert frame == bytes(expected)
    assert version == 6 or p.word_sum(frame[14:34]) == 0xFFFF
    count = len(asked)
    assert connection.window_seen(0xFFFF) << SCALE == MAX_WINDOW
    clock.run(10)
    assert len(asked) == count


@pytest.mark.parametrize("end", ["rst of the guest", "rst of the server", "both fins", "stop"])
def test_nobody_is_asked_once_a_connection_has_ended(windows, clock, asked, end):
    connection = Connection(windows)
    connection.window_seen(0)
    if end == "stop":
        windows.stop()
    elif end == "both fins":
        connection.guest(tcp.FIN | tcp.ACK)
        connection.server(tcp.FIN | tcp.ACK)
    elif end == "rst of the guest":
        connection.guest(tcp.RST)
    else:
        connection.server(tcp.RST)
    clock.run(10)
    assert asked == []


def test_two_acknowledgements_alike_become_four_once(windows):
    connection = Connection(windows)

    def given(count, **more):
        made = [segment(4, SERVER[4], GUEST[4], (80, 1000), tcp.ACK, **more) for _ in range(count)]
        return len(windows.from_passt([(HEADER, memoryview(frame)) for frame in made]))

    assert given(1, ack=50, window=100) == 1
    assert given(2, ack=50, window=200) == 4  # the first is news of the window
    assert given(2, ack=50, window=200) == 2
    assert given(1, ack=60, window=200) == 1
    assert given(1, ack=60, window=200) == 3
    assert given(2, ack=70, window=200, data=b"data") == 2
    assert windows.told == 2
    assert connection.window_seen(200) == 200


def test_what_is_remembered_has_an_end(windows, clock, asked):
    connections = [Connection(windows, port=port) for port in range(1, MAX_FLOWS + 10)]
    assert len(windows._flows) == MAX_FLOWS
    assert connections[0].window_seen(0xFFFF) == 0xFFFF  # the oldest is forgotten
    assert connections[-1].window_seen(0xFFFF) << SCALE == MAX_WINDOW
    for connection in connections:
        connection.window_seen(0)
    clock.run(0.006)
    assert len(asked) == MAX_CLOSED


def test_a_small_window_holds_a_guest_up_too(windows, clock, asked):
    connection = Connection(windows)
    connection.window_seen((CLOSED_WINDOW >> SCALE) - 1)
    clock.run(0.006)
    assert len(asked) == 1


def test_a_frame_in_many_views_counts_as_well(windows, clock, asked):
    connection = Connection(windows)
    frame = memoryview(segment(4, GUEST[4], SERVER[4], (1000, 80), tcp.ACK, ack=99, window=9))
    windows.from_guest([(memoryview(PLAIN), frame[:14], frame[14:30], frame[30:])])
    connection.window_seen(0)
    clock.run(0.006)
    assert bytes(asked[0][1])[42:46] == struct.pack(">I", 99)


frames = st.builds(
    lambda version, flags, cut, changes, options: damaged(
        segment(version, SERVER[version], GUEST[version], (80, 1000), flags, window=3, options=options),
        cut,
        changes,
    ),
    st.sampled_from([4, 6]),
    st.integers(0, 63),
    st.integers(0, 90),
    st.lists(st.tuples(st.integers(0, 89), st.integers(0, 255)), max_size=6),
    st.sampled_from(
        [b"", b"\x03\x03\x07\x00", b"\x01\x03\x00\xff", b"\x02\x00\x00\x00", b"\x03\xff\xff\xff"]
    ),
)


def damaged(frame, cut, changes):
    for at, value in changes:
        if at < len(frame):
            frame[at] = value
    return frame[: max(cut, 14)] if cut < len(frame) else frame


@given(st.lists(st.tuples(st.booleans(), frames), max_size=12))
def test_no_frame_of_either_side_raises(steps):
    clock = Clock()
    asked = []
    windows = TcpHelp(clock, asked.extend)
    for by_guest, frame in steps:
        (windows.from_guest if by_guest else windows.from_passt)([(HEADER, memoryview(bytearray(frame)))])
    clock.run(1)
    windows.stop()


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=40))
def test_the_checksum_follows_the_window(before, after, data):
    frame = segment(4, SERVER[4], GUEST[4], (80, 1000), tcp.ACK, window=before, data=data)
    tcp.set_window(memoryview(frame), 34, after)
    assert frame[48:50] == struct.pack(">H", after)
    assert checks_out(frame, 4)
