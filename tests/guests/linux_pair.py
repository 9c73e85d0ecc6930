"""Two Linux guests that talk to one another, over a stream or a bridge. Owner: the test's thread."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from linux_guest import SECONDS, LinuxGuest
from linux_shell import Shell

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec

if TYPE_CHECKING:
    from tests.net.conftest import Netns

PORT = 99
# busybox's nc ends when its peer has closed its half, so the one that receives keeps its own open.
OPEN = "[ -p /tmp/open ] || mkfifo /tmp/open; exec 7<>/tmp/open"


def see_ping(shell: Shell, address: str, options: str = "") -> None:
    """Some pings, every one of which is answered."""
    found = shell.check(f"ping -c 3 -i 0.2 -W 20 {options} {address}")
    assert " 0% packet loss" in found, found


def send(sender: Shell, receiver: Shell, reach: str, kib: int = 256) -> None:
    """Random bytes over TCP to `reach`, an address of the receiver."""
    receiver.check(f"{OPEN}; nc -l -p {PORT} <&7 >/tmp/came & listener=$!")
    receiver.check(f"until netstat -ltn | grep -q :{PORT}; do usleep 10000; done")
    sent = sender.check(
        f"dd if=/dev/urandom of=/tmp/sent bs=1k count={kib} 2>/dev/null; nc {reach} {PORT} </tmp/sent;"
        " md5sum </tmp/sent"
    )
    receiver.check("wait $listener")
    assert receiver.check("md5sum </tmp/came").split()[0] == sent.split()[0]


def see_two_on_a_bridge(saved: Path, space: Netns) -> None:
    """Two copies of a saved guest with one NIC, each on a tap of its own, in a bridge of `space`."""
    space.run("ip", "link", "add", "br0", "mtu", "9000", "type", "bridge")
    space.run("ip", "link", "set", "br0", "up")
    with ExitStack() as stack:
        shells = []
        for number in (1, 2):
            nets = (NicSpec("create", netns=space.name, bridge="br0", mtu=9000),)
            config = MachineConfig(kernel=saved, restore=saved, nets=nets, timeout=3 * SECONDS)
            guest = LinuxGuest(stack.enter_context(Machine(config)))
            guest.start()
            shell = Shell(guest)
            shell.check(
                "ip link set eth0 down; ip addr flush dev eth0;"
                f" ip link set eth0 address 02:00:00:00:00:0{number}; ip link set eth0 mtu 9000;"
                f" ip addr add 10.95.0.{number}/24 dev eth0; ip link set eth0 up"
            )
            shells.append(shell)
        one, two = shells
        assert space.interfaces() >= {"lo", "br0", "hvkvm0", "hvkvm1"}
        one.guest.wait_until(
            lambda: one.run("ping -c 1 -W 5 10.95.0.2").status == 0, "waiting for the other on the bridge"
        )
        see_ping(one, "10.95.0.2", "-s 8900")
        see_ping(two, "10.95.0.1", "-s 8900")
        send(one, two, "10.95.0.2")
        send(two, one, "10.95.0.1")
        for shell in shells:
            assert shell.guest.bus.host.server.reports.counts == {}
    assert space.interfaces() == {"lo", "br0"}
