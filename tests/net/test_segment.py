"""Checksums filled in and packets cut, against a sum written out, tcpdump's verdict and hostile headers."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.abi.virtio_net_hdr import VnetHeader
from hvkvm.net.checksum import checksum
from hvkvm.net.segment import MAX_SEGMENTS, finish
from tests.net import packets as p

V4, V6 = ("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")


def tcp_frame(ends, size, *, vlan=None, options=b"", ip_options=b"", flags=0x99, identity=7):
    data = random.Random(size).randbytes(size)
    body = p.tcp(*ends, 1000, 2000, 0xFFFFFF00, flags, data, partial=True, options=options)
    if ":" in ends[0]:
        ip, kind, gso = p.ipv6(*ends, 6, body), 0x86DD, 4
    else:
        ip, kind, gso = p.ipv4(*ends, 6, body, identity=identity, options=ip_options), 0x800, 1
    frame = p.ethernet(p.OTHER, p.OURS, kind, ip, vlan)
    start = len(frame) - len(body)
    return frame, VnetHeader(1, gso, start + 20 + len(options), 1000, start, 16), data


@given(st.lists(st.binary(max_size=64).map(lambda b: b[: len(b) & ~1]), max_size=3), st.binary(max_size=65))
def test_a_checksum_is_the_complement_of_the_sum_word_by_word(parts, last):
    whole = b"".join(parts) + last
    assert checksum(*parts, last) == 0xFFFF ^ p.word_sum(whole)


@pytest.mark.parametrize("ends", [V4, V6])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3500, 65000])
def test_a_packet_is_cut_into_whole_segments(ends, size):
    frame, header, data = tcp_frame(ends, size, vlan=5 if size == 3500 else None, options=b"\x01\x01\x01\x00")
    segments = finish(header, frame)
    start, body = header.csum_start, header.hdr_len
    assert [len(s) - body for s in segments] == [1000] * (size // 1000) + (
        [size % 1000] if size % 1000 or not size else []
    )
    assert b"".join(s[body:] for s in segments) == data
    for number, segment in enumerate(segments):
        first, last = number == 0, number == len(segments) - 1
        flags = 0x10 | (0x80 if first else 0) | (0x09 if last else 0)  # ACK; CWR; FIN and PSH
        assert segment[start + 13] == flags
        assert struct.unpack_from(">I", segment, start + 4)[0] == (0xFFFFFF00 + 1000 * number) % 2**32
        assert p.word_sum(p.pseudo(*p.addresses(*ends), 6, len(segment) - start) + segment[start:]) == 0xFFFF
        if ends is V4:
            ip = segment[start - 20 : start]
            assert p.word_sum(ip) == 0xFFFF
            assert struct.unpack_from(">HH", ip, 2) == (len(segment) - start + 20, 7 + number)
        else:
            assert struct.unpack_from(">H", segment, start - 36)[0] == len(segment) - start


@pytest.mark.parametrize("ends", [V4, V6])
def test_a_udp_checksum_is_filled_in_and_never_0(ends):
    for last in range(0x10000):  # one of these has the sum 0
        data = b"x" * 40 + struct.pack(">H", last)
        whole = p.udp(*ends, 1, 2, data)
        if whole[6:8] == b"\xff\xff":
            break
    else:
        pytest.fail("no packet has the sum 0")
    for each in (data, b"abc", b""):
        partial, whole = p.udp(*ends, 1, 2, each, partial=True), p.udp(*ends, 1, 2, each)
        front = bytes(34)
        assert finish(VnetHeader(1, 0, 0, 0, 34, 6), front + partial) == [front + whole]


@settings(max_examples=2000 if os.environ.get("HVKVM_SOAK") else 500)
@given(st.data())
def test_no_header_and_no_frame_raises_or_gives_more_than_was_there(data):
    frame, header, _payload = tcp_frame(data.draw(st.sampled_from([V4, V6])), data.draw(st.integers(0, 3000)))
    hostile = bytearray(frame[: data.draw(st.integers(0, len(frame)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if hostile:
            hostile[data.draw(st.integers(0, min(len(hostile), 80) - 1))] = data.draw(st.integers(0, 255))
    fields = [
        data.draw(st.just(field) | st.integers(0, 0xFF if n < 2 else 0xFFFF))
        for n, field in enumerate(header)
    ]
    made = finish(VnetHeader(*fields), bytes(hostile))
    assert len(made) <= MAX_SEGMENTS
    assert all(len(each) <= len(hostile) for each in made)


def test_a_size_that_would_make_thousands_of_segments_makes_none():
    frame, header, _data = tcp_frame(V4, 60000)
    assert finish(header._replace(gso_size=1), frame) == []
    assert finish(header._replace(gso_size=0), frame) == []


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="no tcpdump; make setup installs it")
@pytest.mark.parametrize("ends", [V4, V6])
def test_tcpdump_finds_every_checksum_correct(ends, tmp_path):
    frame, header, _data = tcp_frame(ends, 5500, options=bytes.fromhex("0101080a0000000100000002"))
    segments = finish(header, frame)
    path = tmp_path / "segments.pcap"
    records = (struct.pack("<IIII", n, 0, len(s), len(s)) + s for n, s in enumerate(segments))
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + b"".join(records))
    shown = subprocess.run(["tcpdump", "-nvv", "-r", path], capture_output=True, text=True, check=True).stdout
    assert shown.count("(correct)") == len(segments) == 6
    assert "incorrect" not in shown
    assert "bad cksum" not in shown
