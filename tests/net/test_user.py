"""The user-mode network with the real passt; the guest is played by hand, down to its TCP."""

from __future__ import annotations

import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hvkvm.abi.virtio_net_hdr import VALID, VnetHeader
from hvkvm.errors import ConfigError
from hvkvm.net.user import GATEWAY, GATEWAY_MAC, GUEST, Forward, start_user
from hvkvm.runtime.io_loop import IoLoop
from tests.net import packets as p
from tests.net.conftest import connect, views

pytestmark = pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it")

HOST_MAC = bytes.fromhex(GATEWAY_MAC.replace(":", ""))


@pytest.fixture
def user(loop):
    port = start_user(loop)
    yield port
    loop.do(port.close)


def ip(protocol, body):
    return p.ethernet(HOST_MAC, p.OURS, 0x800, p.ipv4(GUEST, GATEWAY, protocol, body))


def discover():
    """A DHCPDISCOVER."""
    body = struct.pack(">BBBBIHH16s", 1, 1, 6, 0, 0x1234, 0, 0, bytes(16)) + p.OURS + bytes(10 + 64 + 128)
    body += bytes.fromhex("63825363350101ff") + bytes(60)
    packet = p.ipv4("0.0.0.0", "255.255.255.255", 17, p.udp("0.0.0.0", "255.255.255.255", 68, 67, body))
    return p.ethernet(p.BROADCAST, p.OURS, 0x800, packet)


def is_udp_from(port):
    return lambda f: f[12:14] == b"\x08\x00" and f[23] == 17 and f[34:36] == port.to_bytes(2, "big")


def test_dhcp_gives_the_address_that_every_guest_has(loop, user):
    nic = connect(loop, user)
    assert nic.links == [True] or nic.wait(lambda n: n.links[-1])
    loop.do(user.send, views(discover()))
    offer = nic.frame(is_udp_from(67))
    assert offer[42 + 16 : 42 + 20] == socket.inet_aton(GUEST)
    options = offer[42 + 240 :]
    assert b"\x03\x04" + socket.inet_aton(GATEWAY) in options
    assert b"\x1a\x02" + (65520).to_bytes(2, "big") in options  # the MTU
    assert nic.headers[0] == VALID


def test_udp_whose_checksum_is_left_undone_reaches_the_host_and_its_answer_comes(loop, user):
    nic = connect(loop, user)
    nic.wait(lambda n: n.links[-1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.settimeout(30)
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        header = VnetHeader(1, 0, 0, 0, 34, 6).pack()
        loop.do(
            user.send, views(ip(17, p.udp(GUEST, GATEWAY, 9990, port, b"ask", partial=True)), header=header)
        )
        text, address = server.recvfrom(100)
        assert text == b"ask"
        server.sendto(b"answer", address)
        answer = nic.frame(is_udp_from(port))
        whole = p.udp(GATEWAY, GUEST, port, 9990, b"answer")
        found = answer[34 : 34 + len(whole)]  # a newer passt fills the frame up to Ethernet's least
        assert found in (whole, whole[:6] + b"\0\0" + whole[8:])  # UDP over IPv4 needs no checksum


def test_a_tcp_packet_that_is_not_cut_reaches_the_host_whole(loop, user):
    nic = connect(loop, user)
    nic.wait(lambda n: n.links[-1])
    data = random.Random(5).randbytes(60000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        port = server.getsockname()[1]

        def send(sequence, flags, data=b"", acknowledged=0, size=0):
            made = bytearray(p.tcp(GUEST, GATEWAY, 999, port, sequence, flags, data, partial=True))
            struct.pack_into(">IBBH", made, 8, acknowledged, 0x50, flags, 0xFFFF)
            header = VnetHeader(1, 1 if size else 0, 54, size, 34, 16)
            loop.do(user.send, views(ip(6, bytes(made)), header=header.pack()))

        send(1000, 0x02)
        answer = nic.frame(lambda f: f[12:14] == b"\x08\x00" and f[23] == 6 and f[47] & 0x12 == 0x12)
        theirs = struct.unpack_from(">I", answer, 38)[0] + 1
        send(1001, 0x10, acknowledged=theirs)
        connection, _address = server.accept()
        connection.settimeout(30)
        with connection:
            send(1001, 0x18, data, theirs, 1460)
            got = b""
            while len(got) < len(data):
                got += connection.recv(1 << 20)
            assert got == data


def test_a_forwarded_port_reaches_the_guest(loop):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    user = start_user(
        loop, forwards=(Forward("tcp", "127.0.0.1", port, 22), Forward("udp", "127.0.0.1", port, 53))
    )
    try:
        nic = connect(loop, user)
        nic.wait(lambda n: n.links[-1])
        loop.do(user.send, views(p.arp_request(p.OURS, GUEST, GATEWAY)))
        nic.frame(p.is_arp_reply)
        with socket.socket() as client:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            nic.frame(lambda f: f[12:14] == b"\x08\x00" and f[23] == 6 and f[36:38] == b"\0\x16")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"question", ("127.0.0.1", port))
            nic.frame(lambda f: b"question" in f and f[36:38] == b"\0\x35")
    finally:
        loop.do(user.close)


@pytest.mark.parametrize("where", ["on the loop", "when it has ended"])
def test_what_is_told_to_be_closed_has_left_its_ports(loop, where):
    """passt is killed, and has them for a moment longer: the next NIC with that forward was refused."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(5):
        io = loop if where == "on the loop" else IoLoop()
        user = start_user(io, forwards=(Forward("tcp", "127.0.0.1", port, 22),))
        if io is loop:
            closed = threading.Event()
            loop.do(lambda user=user, closed=closed: (user.close(), user.when_closed(closed.set)))
            assert closed.wait(100)
        else:
            io.stop()
            user.close()
        assert not Path(f"/proc/{user.process.pid}/fd").exists()
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_is_taken_is_told(loop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ConfigError, match=r"--net user: passt: .*; another program has a port"):
            start_user(loop, forwards=(Forward("tcp", "127.0.0.1", server.getsockname()[1], 22),))


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo '-f, --foreground Do not'", "this passt is older than 2023"),
        ("echo 'no /proc here' >&2; exit 1", r"passt: no /proc here; try .*passt --help by hand$"),
        ("exit 3", "exit status 3; try"),
    ],
)
def test_a_passt_that_is_of_no_use_is_told_from_none(loop, does, said, tmp_path):
    with pytest.raises(ConfigError, match="apt-get install passt"):
        start_user(loop, program="no-such-passt")
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=said):
        start_user(loop, program=str(program))


@pytest.mark.parametrize(
    ("words", "said"), [("", "closed its socket and did not end; try"), ("no room", "no room; try")]
)
def test_a_passt_that_closes_its_socket_and_stays_is_killed_and_told(
    loop, tmp_path, monkeypatch, words, said
):
    """One that does not end was a traceback. The sleep that it starts has its standard error for longer."""
    monkeypatch.setattr("hvkvm.net.user.END_SECONDS", 1.0)
    program = tmp_path / "passt"
    program.write_text(
        f"""#!{sys.executable}
import os, subprocess, sys, time
if "--help" in sys.argv:
    sys.exit("--foreground --fd --stderr")
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
print({words!r}, file=sys.stderr, flush=True)
subprocess.Popen(["sleep", "20"])
os.close(int(sys.argv[sys.argv.index("--fd") + 1]))
time.sleep(1000)
"""
    )
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=f"^--net user: passt: {said} passt --foreground by hand$"):
        start_user(loop, program=str(program))
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_passt_that_dies_is_a_link_that_is_down(loop, user):
    nic = connect(loop, user)
    nic.wait(lambda n: n.links[-1])
    user.process.kill()
    nic.wait(lambda n: n.links == [True, False] or n.links == [False, True, False])
    assert loop.do(user.inspect)["failure"].startswith("passt has ended")
    assert loop.do(user.send, views(bytes(60))) == 1


@pytest.mark.parametrize("how", ["close", "kill", "exit"])
def test_passt_ends_with_us(how):
    code = (
        "import sys, os, signal\n"
        "from hvkvm.runtime.io_loop import IoLoop\n"
        "from hvkvm.net.user import start_user\n"
        "loop = IoLoop(); loop.start()\n"
        "port = start_user(loop)\n"
        "print(port.process.pid, flush=True)\n"
        "sys.stdin.readline()\n"
        f"how = {how!r}\n"
        "if how == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if how == 'close': loop.stop(); port.close()\n"
        "os._exit(0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    fd = os.pidfd_open(pid)
    process.communicate("go\n")
    import select

    readable, _w, _x = select.select([fd], [], [], 30)
    os.close(fd)
    assert readable, Path(f"/proc/{pid}/status").read_text()
