"""Real tap interfaces, in network namespaces of the tests' own."""

from __future__ import annotations

import _socket
import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from open_files import open_files

from hvkvm.abi import if_tun
from hvkvm.abi.virtio_net_hdr import VIRTIO_NET_HDR_F_NEEDS_CSUM, VnetHeader, parse
from hvkvm.errors import ConfigError, HostExhausted
from hvkvm.events import NULL_OBSERVER
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.nic_wires import open_wire
from hvkvm.net.port import ALL_OFFLOADS, NO_OFFLOADS
from hvkvm.net.segment import finish
from hvkvm.net.tap import TapPort
from hvkvm.net.tap_make import NewTap, host_mac, make_tap
from hvkvm.net.tap_open import open_tap, set_interface, take_fd
from tests.net import packets as p
from tests.net.conftest import connect, needs_taps, views
from tests.net.test_segment import V4, V6, tcp_frame

pytestmark = needs_taps

HOST, GUEST = "198.51.100.1", "198.51.100.2"


@pytest.fixture
def tap(loop, netns):
    port = TapPort(loop, make_tap(NewTap(netns=netns.name, addresses=(f"{HOST}/24", "2001:db8::1/64"))))
    yield port
    loop.do(port.close)


def learn(loop, port, nic, netns=None, interface="hvkvm0"):
    """Have Linux know the guest's MAC, and return Linux's own.

    In `netns` Linux knows it for good: it would else ask again after five seconds, and a test's NIC answers
    nothing.
    """
    if netns is not None:
        netns.run("ip", "neigh", "replace", GUEST, "lladdr", p.OURS.hex(":"), "dev", interface)
    loop.do(port.send, views(p.arp_request(p.OURS, GUEST, HOST)))
    return nic.frame(p.is_arp_reply)[6:12]


def udp_socket(netns, port=0):
    made = netns.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(30)
    made.bind((HOST, port))
    return made


def test_linux_answers_what_the_guest_asks(loop, tap):
    nic = connect(loop, tap)
    assert nic.links == [True]
    mac = learn(loop, tap, nic)
    reply = nic.frame(p.is_arp_reply)
    assert reply[28:32] == socket.inet_aton(HOST)
    echo = b"\x08\x00\xf7\xff" + bytes(4)
    loop.do(tap.send, views(p.ethernet(mac, p.OURS, 0x800, p.ipv4(GUEST, HOST, 1, echo))))
    nic.frame(lambda f: f[23:24] == b"\x01" and f[34:35] == b"\x00")
    shown = loop.do(tap.inspect)
    assert shown["sent_frames"] == 2
    assert shown["received_frames"] >= 2
    assert shown["kind"] == "tap"


def test_linux_sums_what_the_guest_left_to_it_and_leaves_to_the_guest_what_it_takes(loop, tap, netns):
    nic = connect(loop, tap)
    mac = learn(loop, tap, nic, netns)
    with udp_socket(netns, 7) as sock:
        packet = p.ethernet(
            mac, p.OURS, 0x800, p.ipv4(GUEST, HOST, 17, p.udp(GUEST, HOST, 9, 7, b"hello", partial=True))
        )
        header = VnetHeader(VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, 0, 0, 34, 6).pack()
        assert loop.do(tap.send, views(packet, header=header)) == 1
        assert sock.recvfrom(100) == (b"hello", (GUEST, 9))

        def answer(text):
            sock.sendto(text, (GUEST, 9))
            frame = nic.frame(lambda f: f.endswith(text))
            return nic.headers[nic.got.index(frame)], frame

        header, frame = answer(b"before")
        assert parse(header).flags & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
        assert frame[34:] == p.udp(HOST, GUEST, 7, 9, b"before")
        loop.do(tap.set_offloads, ALL_OFFLOADS)
        header, frame = answer(b"with")
        assert parse(header)._replace(hdr_len=0) == VnetHeader(VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, 0, 0, 34, 6)
        assert finish(parse(header), frame) == [frame[:34] + p.udp(HOST, GUEST, 7, 9, b"with")]
        loop.do(tap.set_offloads, NO_OFFLOADS)
        assert parse(answer(b"after")[0]).flags == 0


def test_a_lying_header_is_dropped_and_counted(loop, tap):
    nic = connect(loop, tap)
    lies = [
        VnetHeader(1, 0, 0, 0, 60000, 6),
        VnetHeader(1, 1, 54, 0, 34, 16),
        VnetHeader(1, 77, 54, 100, 34, 16),
    ]
    for lie in lies:
        assert loop.do(tap.send, views(bytes(60), header=lie.pack())) == 1
    assert tap.statistics.sent_dropped == 3
    assert loop.do(tap.send, views(b"short")) == 1
    assert tap.statistics.sent_dropped == 4
    learn(loop, tap, nic)


@pytest.mark.parametrize("ends", [V4, V6])
@pytest.mark.parametrize("size", [1001, 5500, 20001])
def test_linux_cuts_a_packet_as_we_do(loop, netns, ends, size):
    """Two taps on a bridge: one that takes packets uncut and one that wants them cut."""
    netns.run("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
    netns.run("ip", "link", "set", "br0", "up")
    one, two = (TapPort(loop, make_tap(NewTap(netns=netns.name, bridge="br0"))) for _ in range(2))
    try:
        assert netns.interfaces() >= {"hvkvm0", "hvkvm1"}
        nic = connect(loop, two)
        connect(loop, one)
        frame, header, _data = tcp_frame(ends, size, options=b"\1\1\1\0")
        wanted = finish(header, frame)
        assert loop.do(one.send, views(frame, header=header.pack())) == 1
        nic.wait(lambda n: sum(f[:12] == frame[:12] for f in n.got) >= len(wanted))
        assert [f for f in nic.got if f[:12] == frame[:12]][: len(wanted)] == wanted
    finally:
        loop.do(one.close)
        loop.do(two.close)
    assert netns.interfaces() == {"lo", "br0"}


def test_a_nic_without_room_gets_the_rest_later_in_order(loop, tap, netns):
    nic = connect(loop, tap)
    learn(loop, tap, nic, netns)
    nic.wait(lambda n: n.got)
    with nic.changed:
        nic.room = 3
        nic.got.clear()
    texts = [b"number %03d" % n for n in range(200)]
    with udp_socket(netns) as sock:
        for text in texts:
            sock.sendto(text, (GUEST, 9))
    nic.wait(lambda n: len(n.got) == 3)

    def has_all(nic):
        return any(frame.endswith(texts[-1]) for frame in nic.got)

    while not has_all(nic):
        with nic.changed:
            nic.room = 7
        loop.do(tap.resume)
        loop.do(tap.resume)
        nic.wait(lambda n: n.room == 0 or has_all(n))
    assert [f[42:] for f in nic.got if f[23:24] == b"\x11"] == texts
    assert tap.statistics.receive_waits > 10


def test_frames_that_come_alone_cost_few_reads_that_find_nothing(loop, tap, netns, monkeypatch):
    nic = connect(loop, tap)
    learn(loop, tap, nic, netns)
    readv, reads = os.readv, []

    def counted(fd, buffers):
        reads.append(fd)
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", counted)
    with udp_socket(netns) as sock:
        for n in range(100):
            sock.sendto(b"alone %03d" % n, (GUEST, 9))
            nic.frame(lambda f, n=n: f.endswith(b"alone %03d" % n))
        came = loop.do(lambda: tap.statistics.received_frames)
        assert came >= 100
        # One that finds nothing for each of the first few, and then for one in a few.
        assert len(reads) < came * 1.5
        for n in range(200):
            sock.sendto(b"together %03d" % n, (GUEST, 9))
        nic.frame(lambda f: f.endswith(b"together 199"))
    assert [f[-3:] for f in nic.got if b"together" in f] == [b"%03d" % n for n in range(200)]


def test_a_stopped_port_gives_nothing_and_goes_on_where_it_was(loop, tap, netns):
    nic = connect(loop, tap)
    learn(loop, tap, nic, netns)
    done = []
    loop.do(tap.stop, lambda: done.append(True))
    assert done == [True]
    before = len(nic.got)
    with udp_socket(netns) as sock:
        sock.sendto(b"while stopped", (GUEST, 9))
    loop.do(lambda: None)
    assert len(nic.got) == before
    loop.do(tap.start)
    nic.frame(lambda f: f.endswith(b"while stopped"))


def test_a_pulled_cable_carries_nothing(loop, tap, netns):
    nic = connect(loop, tap)
    mac = learn(loop, tap, nic, netns)
    with udp_socket(netns) as sock:
        loop.do(tap.plug, False)
        nic.wait(lambda n: n.links == [True, False])
        sock.sendto(b"lost", (GUEST, 9))
        assert loop.do(tap.send, views(bytes(60))) == 1
        assert tap.statistics.sent_dropped == 1
        loop.do(tap.plug, True)
        nic.wait(lambda n: n.links == [True, False, True])
        sock.sendto(b"found", (GUEST, 9))
        nic.frame(lambda f: f.endswith(b"found"))
        assert mac


def test_an_interface_that_is_taken_away_is_a_link_that_is_down(loop, tap, netns):
    nic = connect(loop, tap)
    netns.run("ip", "link", "del", "hvkvm0")
    nic.wait(lambda n: n.links == [True, False])
    assert loop.do(tap.inspect)["failure"] == "interface hvkvm0 is gone"
    assert loop.do(tap.send, views(bytes(60))) == 1


def test_what_was_made_goes_with_a_killed_process(netns):
    code = (
        "from hvkvm.net.tap_make import NewTap, make_tap\n"
        f"more = dict(netns={netns.name!r}, addresses=({HOST + '/24'!r},), queues=2)\n"
        "wanted = NewTap(name='mine', mtu=9000, **more)\n"
        "print(make_tap(wanted).mtu)\n"
        "import sys; sys.stdout.flush(); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "9000\n"
    assert netns.interfaces() == {"lo", "mine"}
    assert f"inet {HOST}/24" in netns.run("ip", "addr", "show", "mine")
    assert "mtu 9000" in netns.run("ip", "link", "show", "mine")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert netns.interfaces() == {"lo"}  # its last fd was closed before it could be waited for


@pytest.mark.parametrize("queues", [1, 3])
def test_a_persistent_interface_is_used_and_left(loop, netns, queues):
    netns.run("ip", "tuntap", "add", "dev", "kept", "mode", "tap", "multi_queue")
    netns.run("ip", "link", "set", "kept", "mtu", "1400", "up")
    port = TapPort(loop, netns.do(open_tap, "kept", None, queues))
    assert port.mtu == 1400
    assert loop.do(port.inspect)["queues"] == queues
    nic = connect(loop, port)
    nic.wait(lambda n: n.got)  # Linux's own first words on a link that comes up
    loop.do(port.close)
    assert netns.interfaces() == {"lo", "kept"}


def test_an_interface_for_one_queue_has_one(loop, netns):
    netns.run("ip", "tuntap", "add", "dev", "one", "mode", "tap")
    port = TapPort(loop, netns.do(open_tap, "one", None, 4))
    assert loop.do(port.inspect)["queues"] == 1
    loop.do(port.close)


class WatchedPort(TapPort):
    """Remembers by which queue, from 0, each frame came."""

    def __init__(self, *args):
        super().__init__(*args)
        self.came = []

    def _readable(self, fd):
        before = len(self._receiver.got)
        super()._readable(fd)
        self.came += [(self._fds.index(fd), frame) for frame in self._receiver.got[before:]]


def test_flows_keep_to_their_queues(loop, netns):
    port = WatchedPort(loop, make_tap(NewTap(netns=netns.name, addresses=(f"{HOST}/24",), queues=3)))
    try:
        nic = connect(loop, port)
        mac = learn(loop, port, nic, netns)
        with udp_socket(netns, 7) as sock:
            for flow in range(9):
                # A NIC may have more channels than the interface has queues.
                text = b"of flow %d" % flow
                packet = p.udp(GUEST, HOST, 1000 + flow, 7, text)
                frame = p.ethernet(mac, p.OURS, 0x800, p.ipv4(GUEST, HOST, 17, packet))
                assert loop.do(port.send, views(frame), flow) == 1
                assert sock.recvfrom(100) == (text, (GUEST, 1000 + flow))
                sock.sendto(b"back" + text, (GUEST, 1000 + flow))
                nic.frame(lambda f, text=text: f.endswith(b"back" + text))
        loop.do(lambda: None)  # the turn that brought it has ended
        back = [(queue, frame[-1] - ord("0")) for queue, frame in port.came if b"backof flow" in frame]
        assert back == [(flow % 3, flow) for flow in range(9)]
        assert port.statistics.sent_dropped == 0
    finally:
        loop.do(port.close)
    assert netns.interfaces() == {"lo"}


def test_what_a_killed_process_used_is_used_again_without_its_offloads(loop, netns):
    netns.run("ip", "tuntap", "add", "dev", "kept", "mode", "tap")
    netns.run("ip", "addr", "add", f"{HOST}/24", "dev", "kept")
    netns.run("ip", "link", "set", "kept", "up")
    code = (
        "import sys\n"
        "from fcntl import ioctl\n"
        "from hvkvm.abi.if_tun import TUNSETOFFLOAD\n"
        "from hvkvm.abi.virtio_net_hdr import TUN_F_CSUM, TUN_F_TSO4\n"
        "from hvkvm.net.tap_open import open_tap\n"
        "ioctl(open_tap('kept').fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)\n"
        "print('open'); sys.stdout.flush(); sys.stdin.read()"
    )
    process = subprocess.Popen(
        ["ip", "netns", "exec", netns.name, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    assert "another program has it" in netns.do(refused, open_tap, "kept")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    port = TapPort(loop, netns.do(open_tap, "kept"))
    try:
        nic = connect(loop, port)
        learn(loop, port, nic, netns, "kept")
        with udp_socket(netns, 7) as sock:
            sock.sendto(b"summed", (GUEST, 9))
            frame = nic.frame(lambda f: f.endswith(b"summed"))
        assert parse(nic.headers[nic.got.index(frame)]).flags & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
        assert frame[34:] == p.udp(HOST, GUEST, 7, 9, b"summed")
    finally:
        loop.do(port.close)


def test_a_namespace_whose_name_is_taken_away_lasts_as_long_as_its_interface(loop):
    name = f"hvkvm-gone-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        port = TapPort(loop, make_tap(NewTap(netns=name, addresses=(f"{HOST}/24",), queues=2)))
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
    try:
        learn(loop, port, connect(loop, port))
    finally:
        loop.do(port.close)


def plain_tap():
    """The fd of a tap without a vnet header; its caller's to close."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    set_interface(fd, "plain", if_tun.IFF_TAP | if_tun.IFF_NO_PI)
    return fd


def test_an_fd_without_vnet_header_carries_whole_frames(loop, netns):
    fd = netns.do(plain_tap)
    netns.run("ip", "addr", "add", f"{HOST}/24", "dev", "plain")
    netns.run("ip", "link", "set", "plain", "up")
    port = TapPort(loop, take_fd(fd))
    try:
        assert port.offloads == NO_OFFLOADS
        nic = connect(loop, port)
        learn(loop, port, nic, netns, "plain")
    finally:
        loop.do(port.close)
        os.close(fd)


def test_an_fd_stays_with_who_opened_it(loop, netns, tmp_path):
    """Also where the machine cannot be built: its caller may try again, and another file had its number."""
    fd = netns.do(plain_tap)
    spec = NicSpec(fd=fd, pcap=tmp_path / "no folder" / "x.pcap")
    before = open_files()
    with pytest.raises(ConfigError, match="no folder"):
        open_wire(loop, spec, NULL_OBSERVER)
    assert open_files() == before
    loop.do(open_wire(loop, spec._replace(pcap=None), NULL_OBSERVER).close)
    assert open_files() == before
    assert netns.interfaces() == {"lo", "plain"}
    os.close(fd)
    assert netns.interfaces() == {"lo"}


def refused(fn, *args):
    with pytest.raises(ConfigError) as caught:
        fn(*args)
    return str(caught.value)


def test_what_cannot_be_is_told_with_the_remedy(netns):
    assert "ip tuntap add dev nothere mode tap user root && ip link set nothere up" in refused(
        open_tap, "nothere"
    )
    assert "is no tap interface" in refused(open_tap, "lo")
    for name in ("a/b", os.fsdecode(b"a\xff")):
        assert "not an interface's name" in refused(open_tap, name)
    assert "ip netns add nowhere" in refused(make_tap, NewTap(netns="nowhere"))
    assert "ip link add br9 type bridge" in refused(make_tap, NewTap(netns=netns.name, bridge="br9"))
    assert "mtu" in refused(make_tap, NewTap(netns=netns.name, mtu=20))
    assert netns.interfaces() == {"lo"}
    held = make_tap(NewTap(netns=netns.name, name="held"))
    assert "tap=NAME" in refused(make_tap, NewTap(netns=netns.name, name="held"))
    os.close(held.fd)
    with open(os.devnull) as file:
        assert "is no tap interface" in refused(take_fd, file.fileno())
    assert "is not open" in refused(take_fd, 987)


@pytest.mark.parametrize("which", range(8))
def test_a_host_without_a_file_for_a_queue_leaves_no_interface(netns, monkeypatch, which):
    """It lives as long as one fd of it is open."""
    real, calls = os.open, itertools.count()

    def failing(path, *args, **options):
        if path == "/dev/net/tun" and next(calls) == which:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *args, **options)

    before = open_files()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing)
        with pytest.raises(HostExhausted, match=r"may open no more files; raise `ulimit -n`$"):
            make_tap(NewTap(netns=netns.name, queues=8))
    assert open_files() == before
    assert netns.interfaces() == {"lo"}


def test_a_host_without_a_file_is_not_said_to_lack_an_interface(monkeypatch):
    def failing(_name):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(_socket, "if_nametoindex", failing)
        with pytest.raises(HostExhausted, match=r"^--net tap=tap7: Too many open files; "):
            open_tap("tap7")


def test_a_host_without_a_thread_for_it_is_told(netns, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostExhausted, match="no thread for make-tap: can't start new thread; "):
            make_tap(NewTap(netns=netns.name))
    assert netns.interfaces() == {"lo"}


def test_who_may_not_make_one_is_told_what_an_administrator_runs():
    # All is imported before, for Python itself may lie where such a user cannot read.
    code = (
        "import os, pyroute2\n"
        "from hvkvm.net.tap_make import NewTap, make_tap\n"
        "from hvkvm.errors import ConfigError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: make_tap(NewTap())\n"
        "except ConfigError as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "\n" not in shown.strip()
    assert "/dev/net/tun" in shown or "CAP_NET_ADMIN" in shown
    assert "ip tuntap add" in shown or "chmod 0666 /dev/net/tun" in shown
    assert "--net user" in shown


def test_an_interface_that_is_made_has_the_mac_of_its_guest(loop, netns):
    """So a guest finds its neighbour where it was, when it is restored on another."""
    assert host_mac("FE:00:00:00:00:01") == "fa:00:00:00:00:01"
    for _ in range(2):
        port = TapPort(
            loop,
            make_tap(NewTap(netns=netns.name, addresses=(f"{HOST}/24",), mac=host_mac("02:00:00:0a:0b:0c"))),
        )
        assert learn(loop, port, connect(loop, port)) == bytes.fromhex("fe00000a0b0c")
        loop.do(port.close)
