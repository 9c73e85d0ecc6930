"""What tests ask of a Linux guest's VMBus: modules in and out, who is bound, how healthy it is.

By a `Shell` in the guest and the host's own view of the machine. Owner: the test's thread.
"""

from __future__ import annotations

import re

from linux_guest import LinuxGuest
from linux_shell import Shell

from hvkvm.abi import ic
from hvkvm.devices.synth.ic import IntegrationComponent
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.vmbus.offer import Channel, ChannelState

UTILITIES = ("heartbeat", "shutdown", "timesync")
"""The devices that hv_utils binds, and that need no daemon in the guest."""
VERSION = re.compile(r"Vmbus version:(\d+\.\d+)")


def device_of(guest: LinuxGuest, name: str) -> IntegrationComponent | Keyboard:
    """A device of the machine's bus, by the name of its attribute there."""
    device = getattr(guest.bus, name)
    assert isinstance(device, IntegrationComponent | Keyboard)
    return device


def channel_of(guest: LinuxGuest, name: str) -> Channel:
    """The channel on which a device is offered at present."""
    key = device_of(guest, name).offer.key
    return next(c for c in guest.bus.host.server.channels.all if c.offer.key == key and not c.withdrawn)


def cpu_file(guest: LinuxGuest, name: str) -> str:
    """Where the guest says which of its CPUs a device's channel interrupts; root may write there."""
    raw = device_of(guest, name).offer.instance
    fields = (raw[3::-1], raw[5:3:-1], raw[7:5:-1], raw[8:10], raw[10:])
    folder = "-".join(field.hex() for field in fields)
    return f"/sys/bus/vmbus/devices/{folder}/channels/{channel_of(guest, name).relid}/cpu"


def wait_for_utilities(guest: LinuxGuest) -> None:
    """Until every one is negotiated and the heart beats."""

    def well() -> bool:
        ready = all(device_of(guest, name).ready_for_requests for name in UTILITIES)
        return ready and guest.bus.heartbeat.alive

    guest.wait_until(well, "waiting for the utility devices")


def converse(guest: LinuxGuest, count: int) -> list[int]:
    """Ask the heartbeat `count` times, each when the last answer came: the guest's statuses."""
    heartbeat = guest.bus.heartbeat
    statuses: list[int] = []

    def ask() -> None:
        body = ic.heartbeat_msg_data.pack(len(statuses))
        if not heartbeat.ask(ic.ICMSGTYPE_HEARTBEAT, body, answered):
            statuses.append(ic.HV_E_FAIL)

    def answered(status: int, _body: bytes) -> None:
        statuses.append(status)
        if len(statuses) < count:
            ask()

    guest.call(ask)
    guest.wait_until(lambda: len(statuses) >= count, f"waiting for {count} heartbeats")
    return statuses


def version(shell: Shell) -> str:
    """The newest version line of the guest's hv_vmbus."""
    return VERSION.findall(shell.check("dmesg | grep 'Vmbus version'"))[-1]


def bound(shell: Shell) -> list[str]:
    """The devices that have a driver, by the driver's name."""
    drivers = "/sys/bus/vmbus/devices/*/driver"
    return sorted(shell.check(f"for d in {drivers}; do basename $(readlink $d); done").split())


def load(shell: Shell) -> None:
    """Put the modules of the initramfs in, in order."""
    shell.check("for m in /modules/*.ko; do insmod $m || break; done")


def unload(shell: Shell, *names: str) -> None:
    """Take modules out."""
    shell.check(f"rmmod {' '.join(names or ('hv_utils', 'hv_vmbus'))}")


def callbacks(shell: Shell) -> list[int]:
    """How many VMBus interrupts each CPU of the guest took so far."""
    line = shell.check("grep 'HYP:' /proc/interrupts")
    return [int(word) for word in line.split()[1:] if word.isdigit()]


def open_channels(guest: LinuxGuest) -> int:
    """How many channels are open, as the host sees it."""
    return sum(c.state is ChannelState.OPEN for c in guest.bus.host.server.channels.all)


def see_no_complaints(shell: Shell) -> None:
    """Nothing is wrong as the guest's kernel sees it; AssertionError with the lines of its log."""
    marks = "WARNING: CPU|BUG:|Oops|Call Trace|blocked for more than|unable to handle"
    found = shell.run(f"dmesg | grep -E -A 30 '{marks}'").output
    assert not found, found
