"""Linux's own driver on our NIC, with the lab's kernel at the other end of the wire.

A soak pulls the cable HVKVM_NET_FLAPS times (100) and loads the driver anew HVKVM_NET_RELOADS times (50). Not
the suite: hv_netvsc takes one change of the link in two seconds (LINKCHANGE_INT), so 100 flaps are 400 s of
any guest.
"""

from __future__ import annotations

import itertools
import os

import pytest
from linux_guest import KERNELS
from linux_lan import GUEST, HOST, HOST6, guest_lan
from linux_programs import ahead
from linux_vmbus import see_no_complaints

from hvkvm.abi import nvsp

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]
MIB = 1 << 20
SOAK = bool(os.environ.get("HVKVM_SOAK"))
FLAPS = int(os.environ.get("HVKVM_NET_FLAPS", "100" if SOAK else "2"))
RELOADS = int(os.environ.get("HVKVM_NET_RELOADS", "50" if SOAK else "2"))

ahead("nic")


PAIRS = [("newer", "kernel"), ("stable", "user")]
"""Each kernel and each SynIC once; all four in a soak."""


@pytest.mark.parametrize(
    ("kernel", "synic"), itertools.product(KERNELS, ("kernel", "user")) if SOAK else PAIRS
)
def test_linux_has_a_network(kernel: str, synic: str) -> None:
    with guest_lan(kernel=kernel, synic=synic) as lan:
        shell, nic = lan.shell, lan.nic
        assert nic.inspect()["nvsp"] == f"{nvsp.NVSP_PROTOCOL_VERSION_61:#x}"
        lan.ping()
        lan.ping(HOST6)
        assert shell.check("cat /sys/class/net/eth0/speed /sys/class/net/eth0/carrier").split() == [
            "10000",
            "1",
        ]
        shell.check("nic udp 7007 > /dev/null 2>&1 &")
        lan.datagrams([1, 18, 1000, 1472])
        for host in (HOST, HOST6):
            lan.from_guest(2 * MIB, host)
            lan.to_guest(2 * MIB, host)
        assert nic.send.counters.large, "the guest leaves no segmentation to its NIC"
        assert nic.receive.counters.large, "nothing came in one piece that is longer than a segment"

        # What the NIC does by itself, off and on; the guest's own stack then does it.
        for setting in ("tso=0", "tx=0", "lro=0", "rx=0", "gro=0 sg=0", "rx=1 lro=1", "tx=1 sg=1 tso=1"):
            assert setting.split()[0] in shell.check(f"nic eth0 {setting}")
            lan.from_guest(MIB // 4)
            lan.to_guest(MIB // 4)
            lan.datagrams([1, 1400])

        for mtu in (576, 9000, 1500):
            shell.check(f"ip link set eth0 mtu {mtu}; ip link set eth0 up")
            lan.up()
            lan.ping(HOST, f"-s {mtu - 28}")
            lan.from_guest(MIB // 4)
            lan.to_guest(MIB // 4)

        # The link, and the driver under load.
        for plugged in (False, True) * FLAPS:
            lan.guest.call(lan.wire.plug, plugged)
            lan.carrier(plugged)
        lan.ping()
        for _ in range(RELOADS):
            with lan.load():
                shell.check("rmmod hv_netvsc; insmod /modules/*hv_netvsc.ko")
            lan.guest.wait_until(
                lambda: shell.run("ip link show eth0 > /dev/null 2>&1").status == 0, "waiting for eth0"
            )
            lan.up()
            lan.ping()
        assert lan.guest.bus.host.server.reports.counts == {}
        assert nic.send.counters.dropped == nic.receive.counters.malformed == 0
        see_no_complaints(shell)
        assert GUEST in shell.check("ip addr show eth0")
