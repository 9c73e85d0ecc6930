"""Real guests: channels that come and go while in use, and that move between CPUs."""

from __future__ import annotations

import os

import pytest
from linux_guest import KERNELS, LinuxGuest, linux_guest
from linux_shell import SHELL, Shell
from linux_vmbus import (
    UTILITIES,
    bound,
    callbacks,
    channel_of,
    converse,
    cpu_file,
    device_of,
    open_channels,
    see_no_complaints,
    wait_for_utilities,
)

from hvkvm.vmbus.offer import ChannelState

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800), pytest.mark.usefixtures("each_synic")]
ROUNDS = 100 if os.environ.get("HVKVM_SOAK") else 40
CAPS = {"stable": "5.2", "newer": "6.0"}
"""Up to 5.2 MODIFYCHANNEL has no answer and Linux only hopes, from 5.3 on it waits for one."""


@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_move_between_cpus_and_come_and_go(kernel: str) -> None:
    with linux_guest(SHELL, kernel=kernel, cpus=2, vmbus_max_version=CAPS[kernel]) as guest:
        guest.start()
        shell = Shell(guest).ready()
        wait_for_utilities(guest)
        # A driver whose channel goes while it opens says so on the console, in the midst of our answers.
        shell.check("dmesg -n 1")
        move_channels(guest, shell)
        come_and_go(guest, shell)
        see_no_complaints(shell)
        assert guest.bus.host.server.reports.counts == {}
        shell.send("exit 0")
        assert guest.finish().clean


def move(guest: LinuxGuest, shell: Shell, name: str, cpu: int) -> None:
    """Have a device's interrupts go to another CPU of the guest."""
    shell.check(f"echo {cpu} > {cpu_file(guest, name)}")
    guest.wait_until(lambda: channel_of(guest, name).target_vp == cpu, f"moving {name} to CPU {cpu}")


def move_channels(guest: LinuxGuest, shell: Shell) -> None:
    """To CPU 1, which then takes their interrupts, and back; then CPU 1 goes and comes."""
    for cpu in (1, 0, 1):
        for name in UTILITIES:
            move(guest, shell, name, cpu)
        before = callbacks(shell)
        assert set(converse(guest, 50)) == {0}
        after = callbacks(shell)
        # How many interrupt depends on the host: one that comes while the guest still reads is found there.
        assert after[cpu] - before[cpu] > after[1 - cpu] - before[1 - cpu]
    for name in UTILITIES:
        move(guest, shell, name, 0)
    for online in (0, 1):
        shell.check(f"echo {online} > /sys/devices/system/cpu/cpu1/online")
        assert shell.check("nproc") == str(1 + online)
        assert set(converse(guest, 10)) == {0}
    move(guest, shell, "heartbeat", 1)
    assert set(converse(guest, 10)) == {0}


def come_and_go(guest: LinuxGuest, shell: Shell) -> None:
    """Rescind and offer each device again and again, with a request of ours under way."""
    host = guest.bus.host
    expected, drivers = open_channels(guest), bound(shell)
    answers: list[int] = []

    def swap(name: str) -> None:
        device = device_of(guest, name)
        if name == "shutdown":
            guest.bus.shutdown.request("hibernate", lambda status, _body: answers.append(status))
        elif name == "timesync":
            guest.bus.timesync.sync()
        host.remove(channel_of(guest, name))
        host.add(device)

    for round_ in range(ROUNDS):
        for name in UTILITIES:
            guest.call(swap, name)
        # Every other time the next rescind meets a channel that the guest has hardly seen.
        if round_ % 2:
            wait_for_utilities(guest)
    wait_for_utilities(guest)
    guest.wait_until(lambda: open_channels(guest) == expected, "waiting for the channels to open")
    assert bound(shell) == drivers
    assert set(converse(guest, 20)) == {0}
    channels = host.server.channels
    assert len(channels.gpadls) == expected
    assert all(c.state in (ChannelState.OPEN, ChannelState.OFFERED) for c in channels.all)
    assert answers
