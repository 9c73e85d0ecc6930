"""Captures, read by tcpdump, which none of us wrote."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from hvkvm.errors import ConfigError
from hvkvm.net.capture import Capture
from tests.net import packets as p
from tests.net.conftest import connect, views
from tests.net.wires import TestWire

ENDS = ("192.0.2.1", "192.0.2.2")


def datagram(number, size=20):
    packet = p.udp(*ENDS, 1000 + number, 2000, bytes(size))
    return p.ethernet(p.OTHER, p.OURS, 0x800, p.ipv4(*ENDS, 17, packet))


def read(path, *options):
    found = subprocess.run(
        ["tcpdump", "-nvv", *options, "-r", path], capture_output=True, text=True, check=True
    )
    return found.stdout, found.stderr


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="no tcpdump; make setup installs it")
def test_tcpdump_reads_it_while_it_grows(loop, tmp_path):
    path = tmp_path / "wire.pcapng"
    below = TestWire(loop)
    wire = Capture(below, path, "test")
    nic = connect(loop, wire)
    assert read(path)[0] == ""
    sizes = [0, 1, 2, 3, 1400, 60000]
    loop.do(wire.send, views(*(datagram(n, size) for n, size in enumerate(sizes))))
    loop.do(below.arrive, views(datagram(77)))
    shown, complaints = read(path)
    assert "EN10MB" in complaints
    for number, size in enumerate(sizes):
        assert f"192.0.2.1.{1000 + number} > 192.0.2.2.2000: [udp sum ok] UDP, length {size}" in shown
    assert "192.0.2.1.1077 > 192.0.2.2.2000: [udp sum ok]" in shown
    assert shown.count("udp sum ok") == 7
    assert len(nic.got) == 1
    loop.do(wire.send, views(*(datagram(n) for n in range(2000))))
    loop.do(wire.close)
    assert read(path)[0].count("udp sum ok") == 2007
    assert oct(os.stat(path).st_mode & 0o777) == "0o600"


def test_only_what_was_taken_is_written_and_the_rest_once(loop, tmp_path):
    below = TestWire(loop, room=2)
    wire = Capture(below, tmp_path / "x", "test")
    nic = connect(loop, wire, room=1)
    frames = views(*(datagram(n) for n in range(3)))
    assert loop.do(wire.send, frames) == 2
    loop.do(below.arrive, frames)
    assert wire.frames_written == 3
    with nic.changed:
        nic.room = None
    loop.do(wire.resume)
    nic.wait(lambda n: len(n.got) == 3)
    assert loop.do(wire.inspect)["pcap_frames"] == 5
    loop.do(wire.close)


def test_a_full_disk_ends_the_capture_and_not_the_network(loop):
    below = TestWire(loop)
    wire = Capture(below, "/dev/full", "test")
    nic = connect(loop, wire)
    assert loop.do(wire.send, views(datagram(1))) == 1
    loop.do(below.arrive, views(datagram(2)))
    nic.wait(lambda n: len(n.got) == 1)
    assert "No space left" in loop.do(wire.inspect)["pcap_failure"]
    loop.do(wire.close)


def test_a_file_that_cannot_be_is_told(loop, tmp_path):
    with pytest.raises(ConfigError, match=r"--net pcap=.*; name a file that can be written"):
        Capture(TestWire(loop), tmp_path / "no" / "file", "test")
