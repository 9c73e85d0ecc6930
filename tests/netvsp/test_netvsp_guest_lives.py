"""A guest with a channel a processor: tags, groups, saved with open connections, kexec with traffic."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from pathlib import Path

import pytest
from guest_artifacts import artifact
from linux_guest import KERNELS
from linux_lan import HOST, HOST6, MODULES, Lan, guest_lan
from linux_pair import see_two_on_a_bridge
from linux_peer import Peer, RawTap
from linux_programs import ahead, program
from linux_shell import SHELL
from linux_vmbus import see_no_complaints

from hvkvm.abi import rndis
from hvkvm.boot import initramfs
from tests.net.conftest import made_netns, needs_taps

SOAK = bool(os.environ.get("HVKVM_SOAK"))
LIFE = 7200 if SOAK else 1800
pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(LIFE), needs_taps]
MIB = 1 << 20
MANY = 1 << 30 if SOAK else 8 * MIB
EVERYTHING = rndis.NDIS_PACKET_TYPE_PROMISCUOUS

ahead("kexec")


def see_who_gets_frames_of_others(lan: Lan, raw: RawTap, promiscuous: bool) -> None:
    counters = lan.nic.receive.counters
    came, filtered = counters.frames, counters.filtered
    for _ in range(20):
        raw.send(bytes.fromhex("02000000bbbb02000000aaaa88b5") + bytes(60))
    if promiscuous:
        lan.guest.wait_until(lambda: counters.frames >= came + 20, "frames for somebody else")
        assert counters.filtered == filtered
    else:
        lan.guest.wait_until(lambda: counters.filtered >= filtered + 20, "frames for somebody else")


def drip(sock: socket.socket, enough: threading.Event) -> str:
    """Send until it is enough, some megabytes a second; the MD5 of it. A given size is soon through."""
    digest = hashlib.md5()
    while not enough.wait(0.02):
        data = os.urandom(64 << 10)
        digest.update(data)
        sock.sendall(data)
    return digest.hexdigest()


def test_a_guest_of_two_processors_is_saved_and_kexecs_with_traffic(tmp_path: Path) -> None:
    image, modules = artifact(KERNELS["stable"][0]), artifact(KERNELS["stable"][1])
    second = tmp_path / "second"
    tools = {"/bin/nic": program("nic")}
    second.write_bytes(
        initramfs.build(
            ("sh", "-c", SHELL),
            busybox=artifact("HVKVM_GUEST_BUSYBOX"),
            modules=MODULES,
            kernel_modules_dir=modules,
            files=tools,
        )
    )
    files = {"/kexec/kernel": image, "/kexec/initrd": second, "/bin/kexec": program("kexec")}
    settings = {"memory": 768 * MIB, "modules": (*MODULES, "8021q"), "timeout": LIFE}
    with guest_lan(cpus=2, queues=2, files=files, **settings) as lan:
        shell = lan.shell
        lan.guest.wait_until(lambda: lan.nic.inspect()["channels"] == 2, "waiting for a channel a processor")
        for host in (HOST, HOST6):
            lan.from_guest(MIB, host)
            lan.to_guest(MIB, host)
        shell.check("nic udp 7007 > /dev/null 2>&1 &")
        lan.datagrams([1, 1472] * 4)
        # A tag, a group, and everything; by the host's kernel, which needs no VLAN module to be asked.
        shell.check("ip link add link eth0 name eth0.5 type vlan id 5; ip link set eth0.5 up")
        with RawTap(lan.wire) as raw:
            shell.check("ip addr add 10.98.0.2/24 dev eth0.5; ping -c 1 -W 1 10.98.0.1 > /dev/null; true")
            assert 5 in {vlan for vlan, _frame in raw.heard()}

            def answered() -> bool:
                raw.ask(5, "10.98.0.2", of="10.98.0.1")
                return any(vlan == 5 and frame[20:22] == b"\0\2" for vlan, frame in raw.heard())

            lan.guest.wait_until(answered, "an answer in the VLAN to what was asked there")
            shell.check("ip link del eth0.5")  # as long as there is one, Linux leaves lro off
            for on in (True, False):
                shell.check(f"ip link set eth0 promisc {'on' if on else 'off'}")
                lan.guest.wait_until(
                    lambda on=on: bool(lan.nic.control_state.packet_filter & EVERYTHING) == on, "promisc"
                )
                see_who_gets_frames_of_others(lan, raw, on)
        shell.check("nic join eth0 239.1.2.3 7008 > /tmp/group &")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(HOST))

            def heard() -> bool:
                sock.sendto(b"to the group", ("239.1.2.3", 7008))
                return shell.check("cat /tmp/group") == "to the group"

            lan.guest.wait_until(heard, "waiting for the group")

        with lan.toggling():
            lan.stream_from_guest(MANY)
            lan.stream_to_guest(MANY)

        enough = threading.Event()
        with Peer(HOST, lambda sock: drip(sock, enough)) as peer:
            shell.check(f"nc {HOST} {peer.port} < /dev/null | md5sum > /tmp/sum & summer=$!")
            for round_ in range(3):
                have = lan.nic.receive.counters.bytes
                lan.guest.wait_until(lambda n=have: lan.nic.receive.counters.bytes > n + MIB // 2, "traffic")
                lan.swap(tmp_path / f"saved{round_}")
            enough.set()
            assert shell.check("wait $summer; cat /tmp/sum").split()[0] == peer.result()
        with made_netns() as space:
            see_two_on_a_bridge(tmp_path / "saved2", space)
        assert lan.nic.inspect()["channels"] == 2
        lan.ping()

        shell.check('kexec load /kexec/kernel /kexec/initrd "$(cat /proc/cmdline) life=second"')
        shell.check(f"ping -q -i 0.01 {HOST} > /dev/null 2>&1 &")
        shell.send("kexec go")
        shell.ready()
        assert "life=second" in shell.check("cat /proc/cmdline")
        lan.up()
        lan.guest.wait_until(lambda: lan.nic.inspect()["channels"] == 2, "waiting for a channel a processor")
        lan.from_guest(MIB // 4)
        lan.to_guest(MIB // 4)
        assert lan.guest.bus.host.server.reports.counts == {}
        see_no_complaints(shell)
