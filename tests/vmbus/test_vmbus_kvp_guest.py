"""A distribution's own hv_kvp_daemon and hv_vss_daemon in a real guest, on KVM with Hyper-V.

One boot a kernel.
"""

from __future__ import annotations

import pytest
from linux_daemons import DISK, WRITE, WRITTEN, ask, daemons
from linux_guest import LinuxGuest, linux_guest
from linux_shell import SHELL, Shell

from hvkvm.abi import ic, kvp
from hvkvm.abi.kvp import IpInfo

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800), pytest.mark.usefixtures("each_synic")]

ADDRESS = "10.20.30.40"
PREPARE = (
    "mkdir -p /var/lib",
    "hostname kvpguest",
    "echo 127.0.0.1 kvpguest.example kvpguest > /etc/hosts",
    f"ip addr add {ADDRESS}/24 dev dummy0 && ip link set dummy0 up",
    DISK,
)
DAEMONS = "hv_kvp_daemon -n 2>/dev/null & hv_vss_daemon -n 2>/dev/null & true"
# The guest's own pair, as its programs would leave it: 512 bytes of key, 2048 of value.
LEAVE_PAIR = (
    "(printf from-guest | dd bs=512 conv=sync; printf hello | dd bs=2048 conv=sync)"
    " > /var/lib/hyperv/.kvp_pool_1 2>/dev/null"
)


def see_facts(guest: LinuxGuest, shell: Shell) -> None:
    """What the daemon tells of itself is so."""
    told = ask(guest, guest.bus.kvp.enumerate, kvp.KVP_POOL_AUTO)
    assert told.ok, told
    facts = dict(told.pairs)
    release = shell.check("uname -r").strip()
    # The daemon cuts OSVersion at the first hyphen; the build number is the whole of it.
    assert facts["OSBuildNumber"] == release
    assert facts["OSVersion"] == release.partition("-")[0]
    assert facts["ProcessorArchitecture"] == "x86_64"
    assert facts["FullyQualifiedDomainName"] == "kvpguest.example"
    assert ADDRESS in str(facts["NetworkAddressIPv4"]).split(";")
    assert ADDRESS in ask(guest, guest.bus.kvp.ip_info, None).ip.ip_addr


def see_pairs(guest: LinuxGuest, shell: Shell) -> None:
    """Pairs cross in both directions."""
    device, pool = guest.bus.kvp, kvp.KVP_POOL_EXTERNAL
    assert ask(guest, device.get, pool, "colour").status == ic.HV_S_CONT
    for value in ("red", "grün"):
        assert ask(guest, device.set, pool, "colour", value).ok
        assert ask(guest, device.get, pool, "colour").value == value
        kept = shell.check("tr -d '\\0' < /var/lib/hyperv/.kvp_pool_0; echo").strip()
        assert kept.endswith(f"colour{value}")
    assert ask(guest, device.set, pool, "number", 4_000_000_000).ok
    assert ask(guest, device.set, pool, "k" * 254, "v" * 1022).ok  # the longest that Linux tells again
    pairs = dict(ask(guest, device.enumerate, pool).pairs)
    assert pairs == {"colour": "grün", "number": "4000000000", "k" * 254: "v" * 1022}
    # Why `get` enumerates: to KVP_OP_GET Linux finds the key and tells an empty value.
    direct = ask(guest, device.get_directly, pool, "number")
    assert (direct.ok, direct.value) == (True, "")
    assert ask(guest, device.get_directly, pool, "nothing").status == ic.HV_S_CONT
    assert ask(guest, device.delete, pool, "colour").ok
    assert ask(guest, device.get, pool, "colour").status == ic.HV_S_CONT
    assert ask(guest, device.delete, pool, "colour").status == ic.HV_S_CONT
    shell.check(LEAVE_PAIR)
    assert dict(ask(guest, device.enumerate, kvp.KVP_POOL_GUEST).pairs) == {"from-guest": "hello"}
    assert ask(guest, device.get, kvp.KVP_POOL_GUEST, "from-guest").value == "hello"


def see_adapter(guest: LinuxGuest, shell: Shell) -> None:
    """GET_IP_INFO goes by the MAC address, SET_IP_INFO by the device's instance."""
    mac = shell.check("cat /sys/class/net/dummy0/address").strip().upper()
    told = ask(guest, guest.bus.kvp.ip_info, mac)
    assert told.ok, told
    assert ADDRESS in told.ip.ip_addr
    assert "255.255.255.0" in told.ip.sub_net
    assert ask(guest, guest.bus.kvp.ip_info, "00:00:00:00:00:01").status == ic.HV_E_FAIL
    stranger = IpInfo("{00000000-0000-0000-0000-000000000001}", kvp.ADDR_FAMILY_IPV4, True)
    assert ask(guest, guest.bus.kvp.set_ip_info, stranger).status == ic.HV_GUID_NOTFOUND


def see_freeze(guest: LinuxGuest, shell: Shell) -> None:
    """A frozen file system takes no write; thawed it does."""
    device = guest.bus.vss
    for _ in range(2):
        assert ask(guest, device.freeze).ok
        assert device.frozen
        shell.check(WRITE)
        assert ask(guest, device.freeze).status == ic.HV_ERROR_BUSY
        assert ask(guest, device.thaw).ok
        assert (device.frozen, device.state) == (False, "thawed")
        assert shell.check(WRITTEN).strip() == "written"


def see_return(guest: LinuxGuest, shell: Shell) -> None:
    """What a driver and a daemon left frozen is thawed when they are back."""
    device = guest.bus.vss
    device.call_later = guest.machine.platform.io.call_later
    assert ask(guest, device.freeze).ok
    shell.check(WRITE)
    shell.check("kill -9 $(pidof hv_vss_daemon) $(pidof hv_kvp_daemon)")
    shell.check("until rmmod hv_utils; do sleep 0.1; done")
    guest.wait_until(lambda: not device.ready_for_requests, "the driver to leave")
    assert ask(guest, guest.bus.kvp.enumerate, 2).status == ic.HV_ERROR_DEVICE_NOT_CONNECTED
    shell.check("insmod /modules/*-hv_utils.ko")
    guest.wait_until(lambda: device.ready_for_requests, "the driver to be back")
    shell.check(DAEMONS)
    assert shell.check("wait $writer; cat /mnt/data/file").strip() == "written"
    guest.wait_until(lambda: guest.bus.kvp.ready_for_requests, "hv_kvp_daemon to register again")
    assert ask(guest, guest.bus.kvp.get, kvp.KVP_POOL_GUEST, "from-guest").value == "hello"


@pytest.mark.parametrize("kernel", ["stable", "newer"])
def test_the_stock_daemons_are_asked_and_freeze_a_file_system(kernel: str) -> None:
    modules = ("hv_vmbus", "hv_utils", "dummy", "brd")
    with linux_guest(SHELL, kernel=kernel, modules=modules, files=daemons()) as guest:
        guest.start()
        shell = Shell(guest).ready()
        for line in PREPARE:
            shell.check(line)
        # Without the daemons: KVP is not negotiated yet, VSS is and refuses.
        assert ask(guest, guest.bus.kvp.enumerate, 2).status == ic.HV_ERROR_DEVICE_NOT_CONNECTED
        guest.wait_until(lambda: guest.bus.vss.ready_for_requests, "VSS to be negotiated")
        assert ask(guest, guest.bus.vss.freeze).status == ic.HV_E_FAIL
        assert guest.bus.vss.state in ("thawing", "thawed")
        shell.check(DAEMONS)
        guest.wait_until(lambda: guest.bus.kvp.ready_for_requests, "hv_kvp_daemon to register")
        assert guest.bus.kvp.message_version == (4, 0)
        see_facts(guest, shell)
        see_pairs(guest, shell)
        see_adapter(guest, shell)
        guest.wait_until(lambda: ask(guest, guest.bus.vss.check).ok, "hv_vss_daemon to register")
        see_freeze(guest, shell)
        see_return(guest, shell)
        shell.send("exit 7")
        assert guest.finish().status == 7
        assert guest.bus.host.server.reports.total == 0, guest.report()
