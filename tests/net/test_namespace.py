"""A network namespace in a guest's place: its kernel on a tap of ours, joined to the wire under test.

What a guest's kernel does (large packets, checksums left undone, DHCP, neighbour discovery) without a VM, so
it is quick, runs anywhere, and the kernels at both ends verify every checksum.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from time import sleep

import pytest

from hvkvm.boot import guest_scripts
from hvkvm.net.faults import Faults, FaultyWire
from hvkvm.net.port import ALL_OFFLOADS
from hvkvm.net.stream import StreamPort
from hvkvm.net.stream_peer import Answerer, Caller
from hvkvm.net.tap import TapPort
from hvkvm.net.tap_make import NewTap, make_tap
from hvkvm.net.user import GATEWAY, GATEWAY6, GUEST, Forward, start_user
from tests.net.conftest import needs_taps

pytestmark = [needs_taps, pytest.mark.timeout(300)]
MIB = 1 << 20
SECONDS = 120


class Joined:
    """A receiver that hands all on to another port: two of them join two wires."""

    def __init__(self, towards, back):
        self._towards = towards
        self._back = back

    def frames(self, frames):
        return self._towards.send(frames)

    def writable(self):
        self._back.resume()

    def link(self, up):
        pass


def join(loop, one, two):
    """What one gives goes to two, and the other way; each leaves to the other what that takes."""
    one.attach(Joined(two, two))
    two.attach(Joined(one, one))
    for port, other in ((one, two), (two, one)):
        loop.do(port.start)
        loop.do(port.set_offloads, ALL_OFFLOADS.within(other.offloads))


@contextmanager
def behind_passt(loop, netns, *addresses, forwards=()):
    """The namespace as a guest behind passt, with `addresses` of its own: passt's port."""
    tap = TapPort(loop, make_tap(NewTap(netns=netns.name, addresses=addresses)))
    user = start_user(loop, forwards=forwards)
    try:
        join(loop, tap, user)
        yield user
    finally:
        loop.do(tap.close)
        loop.do(user.close)


def serve(host, answer):
    """A TCP server for one connection, on a thread: its port, and how to get what `answer(socket)` gave."""
    server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.settimeout(SECONDS)
    results = []

    def work():
        with server, server.accept()[0] as sock:
            sock.settimeout(SECONDS)
            results.append(answer(sock))

    thread = threading.Thread(target=work)
    thread.start()

    def result():
        thread.join()
        return results[0]

    return server.getsockname()[1], result


def digest(sock):
    found = hashlib.md5()
    while data := sock.recv(1 << 18):
        found.update(data)
    return found.hexdigest()


def slow_digest(sock):
    """The same of a server that is busy with other things too, for 32 to 64 pauses a MiB."""
    found = hashlib.md5()
    while data := sock.recv(1 << 15):
        found.update(data)
        sleep(0.001)
    return found.hexdigest()


def upload(netns, file, reach, listen, answer=digest):
    port, result = serve(listen, answer)
    netns.run("sh", "-c", f"busybox nc {reach} {port} <{file}")
    assert result() == hashlib.md5(file.read_bytes()).hexdigest()


def download(netns, data, reach, listen):
    def page(sock):
        while b"\r\n\r\n" not in sock.recv(1 << 16):
            pass
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)

    port, result = serve(listen, page)
    host = f"[{reach}]" if ":" in reach else reach
    got = netns.run("sh", "-c", f"busybox wget -q -O - http://{host}:{port}/ | md5sum")
    result()
    assert got.split()[0] == hashlib.md5(data).hexdigest()


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it")
def test_passt_carries_tcp_and_udp_both_ways(loop, netns, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        forwarded = probe.getsockname()[1]
    forwards = tuple(Forward(kind, "127.0.0.1", forwarded, to) for kind, to in (("tcp", 22), ("udp", 53)))
    with behind_passt(loop, netns, forwards=forwards) as user:
        # Our guests' own script, but for the file that it would write over here.
        script = tmp_path / "script"
        script.write_text(guest_scripts.DHCP.replace("/etc/resolv.conf", str(tmp_path / "resolv.conf")))
        script.chmod(0o755)
        netns.run("busybox", "udhcpc", "-q", "-n", "-i", "hvkvm0", "-s", str(script))
        assert f"inet {GUEST}/24" in netns.run("ip", "addr", "show", "hvkvm0")
        assert f"default via {GATEWAY}" in netns.run("ip", "route")

        file = tmp_path / "data"
        file.write_bytes(os.urandom(8 * MIB))
        upload(netns, file, GATEWAY, "127.0.0.1")
        sent = loop.do(user.inspect)
        assert sent["sent_bytes"] / sent["sent_frames"] > 1600, "the large packets of the sender were cut"
        download(netns, os.urandom(4 * MIB), GATEWAY, "127.0.0.1")
        if sent6 := _has_address6(netns):
            upload(netns, file, GATEWAY6, "::1")
            download(netns, os.urandom(MIB), GATEWAY6, "::1")
        assert sent6 or not _host_has_route6()

        server = netns.do(socket.create_server, ("0.0.0.0", 22))
        with server, socket.create_connection(("127.0.0.1", forwarded), timeout=SECONDS) as client:
            client.sendall(b"to the guest")  # passt of 2023 acknowledges no connection before that
            server.settimeout(SECONDS)
            ours, _address = server.accept()
            ours.settimeout(SECONDS)
            with ours:
                assert ours.recv(100) == b"to the guest"
                ours.sendall(b"to the host")
                assert client.recv(100) == b"to the host"
        there = netns.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        with there, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
            there.settimeout(SECONDS)
            here.settimeout(SECONDS)
            there.bind(("0.0.0.0", 53))
            here.sendto(b"question", ("127.0.0.1", forwarded))
            text, address = there.recvfrom(100)
            there.sendto(text + b" and answer", address)
            assert here.recv(100) == b"question and answer"
        assert user.statistics.sent_dropped == 0


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it")
def test_passt_loses_nothing_of_an_upload_to_a_server_with_pauses(loop, netns, tmp_path):
    """passt drops what its socket has no room for, and does not tell of room: see net/tcp_help.py."""
    with behind_passt(loop, netns, f"{GUEST}/24") as user:
        file = tmp_path / "data"
        file.write_bytes(os.urandom(16 * MIB))
        upload(netns, file, GATEWAY, "127.0.0.1", slow_digest)
        shown = loop.do(user.inspect)
        assert shown["sent_bytes"] < 1.5 * 16 * MIB, "much was sent again"


@pytest.mark.skipif(not os.environ.get("HVKVM_SOAK"), reason="some minutes: HVKVM_SOAK=1, or make soak-nics")
@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it")
def test_passt_carries_a_gibibyte_each_way_unchanged(loop, netns, tmp_path):
    with behind_passt(loop, netns, f"{GUEST}/24") as user:
        file = tmp_path / "data"
        for _ in range(8):
            data = os.urandom(128 * MIB)
            file.write_bytes(data)
            upload(netns, file, GATEWAY, "127.0.0.1")
            download(netns, data, GATEWAY, "127.0.0.1")
        assert loop.do(user.inspect)["sent_bytes"] < 1.5 * 1024 * MIB, "much was sent again"
        assert user.statistics.sent_dropped == 0


def _host_has_route6():
    return bool(
        subprocess.run(["ip", "-6", "route", "show", "default"], capture_output=True, check=True).stdout
    )


def _has_address6(netns):
    """Whether the address of router advertisement comes, where the host has a route for it."""
    if not _host_has_route6():
        return False
    script = "until ip -6 addr show scope global -tentative | grep -q fd68:; do sleep 0.1; done"
    netns.run("sh", "-c", script)
    return True


@pytest.mark.parametrize(
    "faults", [None, Faults(loss=0.02, duplicate=0.02, reorder=0.02, corrupt=0.02, seed=3)]
)
def test_two_kernels_share_a_stream(loop, netns, tmp_path, faults):
    """One at each end, each behind a tap: with a bad wire in between too, what arrives is what was sent."""
    ends = []
    wire = tmp_path / "wire"
    try:
        for number in (1, 2):
            name = f"end{number}"
            addresses = (f"10.0.{number}.1/24", f"fd00:{number}::1/64")
            tap = TapPort(loop, make_tap(NewTap(name, netns=netns.name, addresses=addresses)))
            stream = StreamPort(loop, 1500)
            (Answerer if number == 1 else Caller)(loop, stream, wire)
            end = stream if faults is None or number == 1 else FaultyWire(loop, stream, faults)
            join(loop, tap, end)
            ends += [tap, end]
        # Both taps are in one namespace, so the second moves to one of its own.
        other = f"{netns.name}-2"
        subprocess.run(["ip", "netns", "add", other], check=True)
        try:
            netns.run("ip", "link", "set", "end2", "netns", other)
            for space, name, number in ((netns.name, "end1", 1), (other, "end2", 2)):
                for command in (
                    f"addr flush dev {name}",
                    f"addr add 10.0.9.{number}/24 dev {name}",
                    f"addr add fd00:9::{number}/64 dev {name} nodad",
                    f"link set {name} up",
                ):
                    subprocess.run(["ip", "-n", space, *command.split()], check=True)
            file = tmp_path / "data"
            file.write_bytes(os.urandom(MIB if faults is None else MIB // 4))
            for address in ("10.0.9.1", "fd00:9::1"):
                port, result = netns.do(serve, address, digest)
                subprocess.run(
                    ["ip", "netns", "exec", other, "sh", "-c", f"busybox nc {address} {port} <{file}"],
                    check=True, timeout=SECONDS,
                )  # fmt: skip
                assert result() == hashlib.md5(file.read_bytes()).hexdigest()
        finally:
            subprocess.run(["ip", "netns", "del", other], check=True)
    finally:
        for port in ends:
            loop.do(port.close)
