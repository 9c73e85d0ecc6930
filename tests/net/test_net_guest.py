"""A stock Linux guest on real wires: passt, and a tap in a network namespace. One boot serves all.

Random bytes cross both ways: the kernels at both ends verify the checksums of what NIC or wire has filled in.
A soak sends HVKVM_NET_PASST_MIB (1024) each way through passt, and has a NIC come and go 50 times.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any, NamedTuple

import pytest
from linux_guest import SECONDS, LinuxGuest, linux_guest
from linux_peer import Peer, echo
from linux_programs import ahead, program
from linux_shell import SHELL, Shell

from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.nics import Nics
from hvkvm.net.tap_make import NewTap, make_tap
from hvkvm.net.user import GATEWAY, GATEWAY6, GUEST
from tests.net.conftest import Netns, free_port, needs_taps

SOAK = bool(os.environ.get("HVKVM_SOAK"))
pytestmark = [
    pytest.mark.hyperv,
    pytest.mark.timeout(7200 if SOAK else 900),
    needs_taps,
    pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it"),
]
MODULES = ("hv_vmbus", "hv_utils", "hv_netvsc")
KIB = 1 << 10
ROUNDS = 50 if SOAK else 1
"""How often a NIC comes, on a bad wire, and goes."""
PIECE = 16
"""MiB of a stream of which there are many: the guest keeps what it sends."""
PASST_MIB = int(os.environ.get("HVKVM_NET_PASST_MIB", "1024" if SOAK else "0"))
UPLINK = "203.0.113.2"
HOST, TAP_GUEST = "10.98.0.1", "10.98.0.2"
HOST6, TAP_GUEST6 = "fd00:98::1", "fd00:98::2"

ahead("nic")


class Uplink(NamedTuple):
    """What this host has for passt: a route for IPv6; its own address, where passt may send pings."""

    six: bool
    address: str = ""


@contextmanager
def uplink() -> Iterator[Uplink]:
    """An interface with default routes, where this host has none: passt takes its own from it.

    Linux lets few send pings without privilege, and then passt may too.
    """
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        if ip.get_default_routes() or ip.get_default_routes(family=socket.AF_INET6):
            yield Uplink(bool(ip.get_default_routes(family=socket.AF_INET6)))
            return
        groups = Path("/proc/sys/net/ipv4/ping_group_range")
        before = groups.read_text()
        tap = make_tap(NewTap("uplink", addresses=(f"{UPLINK}/24", "2001:db8:1::2/64")))
        index = ip.link_lookup(ifname="uplink")[0]
        try:
            groups.write_text("0 2147483647")
            ip.route("add", dst="default", gateway="203.0.113.1", oif=index)
            ip.route("add", family=socket.AF_INET6, dst="default", oif=index)
            # passt wants the interface's link-local address, which Linux gives it soon.
            while not any(a.get_attr("IFA_ADDRESS").startswith("fe80:") for a in ip.get_addr(index=index)):
                select([], [], [], 0.05)
            yield Uplink(True, UPLINK)
        finally:
            groups.write_text(before)
            os.close(tap.fd)


class Way:
    """The guest, an address by which it reaches a host, and how a server comes to be there."""

    def __init__(self, shell: Shell, reach: str, peer: Callable[..., Peer]) -> None:
        self.shell = shell
        self.reach = reach
        self.peer = peer

    def ping(self, *options: str) -> None:
        """Some pings, every one of which is answered."""
        found = self.shell.check(f"ping -c 2 -i 0.2 -W 30 {' '.join(options)} {self.reach}")
        assert " 0% packet loss" in found, found

    def upload(self, size: int) -> None:
        """`size` random bytes over TCP from the guest."""

        def serve(sock: socket.socket) -> str:
            digest = hashlib.md5()
            sock.sendall(b"go on")  # passt of 2023 resets a connection whose server is silent for 24 s
            while data := sock.recv(1 << 18):
                digest.update(data)
            return digest.hexdigest()

        with self.peer(serve) as peer:
            sent = self.shell.check(
                f"dd if=/dev/urandom of=/tmp/sent bs=1k count={size >> 10} 2>/dev/null;"
                f" nc {self.reach} {peer.port} </tmp/sent >/dev/null && md5sum </tmp/sent"
            )
            assert peer.result() == sent.split()[0]

    def download(self, size: int) -> None:
        """`size` random bytes over TCP to the guest, as a page: passt of 2023 wants its half open."""
        data = os.urandom(size)

        def serve(sock: socket.socket) -> None:
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(1 << 16)
            sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)

        host = f"[{self.reach}]" if ":" in self.reach else self.reach
        with self.peer(serve) as peer:
            found = self.shell.check(f"wget -q -O - http://{host}:{peer.port}/ | md5sum")
            peer.result()
            assert found.split()[0] == hashlib.md5(data).hexdigest()


def see_passt(shell: Shell, nics: Nics, host: Uplink, forwards: tuple[int, int]) -> None:
    """DHCP, ping, TCP and UDP both ways, large packets, forwarded ports, IPv6."""
    wire = nics.nics["net0"].wire
    shell.check("udhcpc -q -n -t 100 -i eth0")
    assert f"inet {GUEST}/24" in shell.check("ip addr show eth0")
    assert f"default via {GATEWAY}" in shell.check("ip route")
    if host.address:
        Way(shell, host.address, Peer).ping()
    four = Way(shell, GATEWAY, lambda serve: Peer("127.0.0.1", serve))
    four.upload(256 * KIB)
    shell.check("ip link set eth0 mtu 65520")
    before = shell.guest.call(wire.inspect)
    four.download(512 * KIB)
    after = shell.guest.call(wire.inspect)
    frames, size = (int(after[k]) - int(before[k]) for k in ("received_frames", "received_bytes"))
    assert size / frames > 1600, "packets are as long as ever, with an MTU of 65520"
    for _ in range(PASST_MIB // PIECE):
        four.upload(PIECE * KIB * KIB)
        four.download(PIECE * KIB * KIB)

    # Forwarded: passt of 2023 makes the connection once the client has sent something.
    tcp, udp = forwards
    shell.check("mkfifo /tmp/open; exec 7<>/tmp/open; nc -l -p 22 <&7 >/tmp/came & listener=$!")
    shell.check("until netstat -ltn | grep -q :22; do usleep 10000; done; echo answer >&7")
    data = os.urandom(64 * KIB)
    with socket.create_connection(("127.0.0.1", tcp), timeout=SECONDS) as client:
        client.sendall(data)
        assert client.recv(100) == b"answer\n"
        client.shutdown(socket.SHUT_WR)
        shell.check("wait $listener; exec 7>&-")
    assert shell.check("md5sum </tmp/came").split()[0] == hashlib.md5(data).hexdigest()
    echo(("127.0.0.1", udp), [1, 100, 1400, 9000])

    if host.six:
        shell.check("until ip -6 addr show dev eth0 | grep fd68 | grep -vq tentative; do usleep 50000; done")
        shell.check("until ip -6 route show default | grep -q eth0; do usleep 50000; done")
        six = Way(shell, GATEWAY6, lambda serve: Peer("::1", serve))
        six.upload(64 * KIB)
        six.download(64 * KIB)
    assert shell.guest.call(wire.inspect)["sent_dropped"] == 0


def see_tap(shell: Shell, nics: Nics, netns: Netns) -> None:
    """Ping, TCP and UDP with packets of 9000 bytes, IPv4 and IPv6, and the cable pulled out."""
    wire = nics.nics["net1"].wire
    shell.check(
        f"ip link set eth1 mtu 9000; ip addr add {TAP_GUEST}/24 dev eth1;"
        f" echo 0 >/proc/sys/net/ipv6/conf/eth1/accept_dad; ip link set eth1 up;"
        f" ip -6 addr add {TAP_GUEST6}/64 dev eth1"
    )
    for host in (HOST, HOST6):
        way = Way(shell, host, lambda serve, host=host: netns.do(Peer, host, serve))
        way.ping("-s 8900")
        way.upload(256 * KIB)
        way.download(256 * KIB)
    with netns.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        echo((TAP_GUEST, 7007), [1, 1473, 8972, 20000], sock)
    assert shell.guest.call(wire.inspect)["sent_dropped"] == 0  # without a cable, what is sent is dropped
    for up in (False, True):
        shell.guest.call(wire.plug, up)
        shell.check(f"until [ $(cat /sys/class/net/eth1/carrier) = {int(up)} ]; do usleep 10000; done")
    Way(shell, HOST, Peer).ping()


def see_a_third(guest: LinuxGuest, shell: Shell, nics: Nics) -> None:
    """A NIC that comes later, whose wire loses, delays and doubles frames, and goes again."""
    lossy = NicSpec("create", ip=("10.97.0.1/24",), loss=0.05, delay=0.002, reorder=0.05, duplicate=0.05)
    wire = nics.open(lossy)
    name = guest.call(nics.add, lossy, wire).name
    shell.check("until ip link show eth2 >/dev/null 2>&1; do usleep 10000; done")
    shell.check("ip addr add 10.97.0.2/24 dev eth2; ip link set eth2 up")
    # Linux asks three times who has an address, and all of it may be lost: a connect has failed by then.
    shell.check("until ping -c 1 -W 1 10.97.0.1 >/dev/null 2>&1; do :; done")
    Way(shell, "10.97.0.1", lambda serve: Peer("10.97.0.1", serve)).upload(64 * KIB)
    gone = threading.Event()
    guest.call(nics.remove, name, gone.set)
    guest.wait_until(gone.is_set, "waiting for the NIC to go")
    shell.check("while ip link show eth2 >/dev/null 2>&1; do usleep 10000; done")


def test_a_guest_has_passt_and_a_tap(netns: Netns) -> None:
    forwards = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    nets = (
        NicSpec("user", forward=(f"{forwards[0]}-22", f"udp:{forwards[1]}-7007")),
        NicSpec("create", netns=netns.name, ip=(f"{HOST}/24", f"{HOST6}/64"), mtu=9000),
    )
    files = {"/bin/nic": program("nic")}
    with uplink() as host, linux_guest(SHELL, modules=MODULES, files=files, nets=nets) as guest:
        guest.start()
        nics: Any = guest.machine.nics
        passt = os.pidfd_open(guest.call(nics.nics["net0"].wire.inspect)["passt"])
        shell = Shell(guest).ready()
        shell.check("nic udp 7007 >/dev/null 2>&1 &")
        see_passt(shell, nics, host, forwards)
        see_tap(shell, nics, netns)
        fds = len(os.listdir("/proc/self/fd"))
        for _ in range(ROUNDS):
            see_a_third(guest, shell, nics)
        assert len(os.listdir("/proc/self/fd")) <= fds
        assert guest.bus.host.server.reports.counts == {}
    try:
        assert select([passt], [], [], 60)[0], "passt outlives its guest"
    finally:
        os.close(passt)
    assert netns.interfaces() == {"lo"}
    assert "hvkvm" not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
