"""Real guests: keyboard, KVP and VSS withdrawn while in use and offered again, vsock streams cut, many times.

One boot a kernel, in which each round has everything in use at a time and takes it
away. A distribution's daemons end with their device (what they read fails, and its
node is gone when they open it again), so the guest starts them anew when the node
is back, as service managers do.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from random import Random
from time import sleep
from typing import Any

import pytest
from linux_daemons import DISK, WRITE, WRITTEN, ask, daemons
from linux_guest import MAIN_KERNELS, LinuxGuest, linux_guest
from linux_programs import ahead, program
from linux_shell import SHELL, Shell
from linux_vmbus import (
    bound,
    channel_of,
    converse,
    device_of,
    open_channels,
    see_no_complaints,
    wait_for_utilities,
)

from hvkvm.abi import kvp
from hvkvm.machine.inspect import inspect

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]
ahead("vsock")

ROUNDS = 100 if os.environ.get("HVKVM_SOAK") else 20
DEVICES = ("keyboard", "kvp", "vss")
MODULES = ("hv_vmbus", "hv_utils", "hyperv_keyboard", "hv_sock", "brd")
# A daemon's node is there before its driver knows it by the pointer that the daemon's writes will follow.
# One that is quicker has Linux use what is freed (an oops of 6.1). A probe under way holds the device's lock,
# for which reading driver_override waits.
KEEP = (
    "keep() { while :; do [ -e /dev/vmbus/$1 ] && cat /sys/bus/vmbus/devices/*/driver_override;"
    " $1_daemon -n; sleep 0.05; done >/dev/null 2>&1; }; keep hv_kvp & keep hv_vss & true"
)
INPUT = "until grep -q 'AT Translated Set 2 keyboard' /proc/bus/input/devices; do sleep 0.1; done"
TYPED = "Quick brown foxes jump; 0123456789!\n" * 4
FINAL = "the guest is well"
READ_KEYS = f'(until [ "$line" = "{FINAL}" ]; do read -r line; done < /dev/tty1; echo > /read) & true'
SAW_FINAL = "until [ -e /read ]; do sleep 0.1; done"
GUEST_PORT, HOST_PORT = 2000, 1000
FLOW = "both 100000000000"
CONNECT = (
    f"(for n in $(seq {ROUNDS // 2}); do /vsock connect {HOST_PORT} {FLOW}; done; echo > /connected)"
    " >/dev/null 2>&1 & true"
)
LISTEN = (
    f"/vsock listen {GUEST_PORT} {ROUNDS // 2} {FLOW} >/listening 2>&1 &"
    " until grep -q listening /listening; do sleep 0.1; done"
)
PIECE = 1 << 16
SECONDS = 600.0


class Asked:
    """Requests each of which must be answered, and once, whatever becomes of the device."""

    def __init__(self) -> None:
        self.answers: list[list[Any]] = []

    def one(self) -> Callable[[Any], None]:
        """The `reply` of another request."""
        told: list[Any] = []
        self.answers.append(told)
        return told.append


class Streams:
    """Connections one after the other, each of which is full of data when the host cuts it."""

    def __init__(self, guest: LinuxGuest) -> None:
        self.guest = guest
        self.vsock = guest.bus.vsock
        self.vsock.connections.accept_seconds = SECONDS
        self.came: deque[socket.socket] = deque()
        self.live: socket.socket | None = None
        self.vsock.listen(HOST_PORT, self.came.append)

    def fill(self, ours: bool) -> None:
        """Have one of our connects, or of the guest's; data goes both ways, and more waits."""
        if ours:
            sock = self.vsock.connect(GUEST_PORT)
        else:
            self.guest.wait_until(lambda: self.came, "a connect of the guest")
            sock = self.came.popleft()
        sock.settimeout(SECONDS)
        sock.sendall(bytes(PIECE))
        self.live = sock
        self.take(PIECE)

    def take(self, size: int) -> None:
        """Read so much, which sets the guest going."""
        while self.live is not None and size > 0:
            piece = self.live.recv(size)
            assert piece, "the guest ended the stream"
            size -= len(piece)

    def cut(self) -> None:
        """End it in the middle of a stream. Idempotent."""
        self.take(PIECE)
        sock, self.live = self.live, None
        if sock is not None:
            sock.close()


def use(guest: LinuxGuest, number: int, asked: Asked) -> None:
    """Have every device in use. On the I/O loop."""
    bus = guest.bus
    # Every tenth time there is more than the ring takes.
    assert bus.keyboard.type(TYPED * (20 if number % 10 == 0 else 1), asked.one())
    bus.vss.freeze(asked.one())
    bus.kvp.set(kvp.KVP_POOL_EXTERNAL, "round", number, asked.one())
    bus.kvp.enumerate(kvp.KVP_POOL_AUTO, asked.one())
    bus.kvp.get(kvp.KVP_POOL_EXTERNAL, "round", asked.one())
    if number & 4:
        bus.vss.thaw(asked.one())


def swap(guest: LinuxGuest, name: str, times: int) -> None:
    """Withdraw a device and offer it again. On the I/O loop."""
    for _ in range(times):
        guest.bus.host.remove(channel_of(guest, name))
        guest.bus.host.add(device_of(guest, name))


def settle(guest: LinuxGuest) -> None:
    """Until the drivers have the devices, and the daemons have registered with them."""
    devices = [device_of(guest, name) for name in DEVICES]
    guest.wait_until(lambda: all(d.ready_for_requests for d in devices), "the drivers to be back")
    # Linux refuses until its daemon is there.
    guest.wait_until(lambda: ask(guest, guest.bus.vss.thaw).ok, "hv_vss_daemon to register")


def come_and_go(guest: LinuxGuest, streams: Streams) -> Asked:
    """Round by round; each withdraws at another point of what is under way."""
    asked, random = Asked(), Random(1)
    for number in range(ROUNDS):
        settle(guest)
        streams.fill(ours=number % 2 == 0)
        first = len(asked.answers)
        if number % 4 == 0:

            def at_once(number: int = number) -> None:
                use(guest, number, asked)
                for name in DEVICES:
                    swap(guest, name, 1)

            guest.call(at_once)
            streams.cut()
            continue
        guest.call(use, guest, number, asked)
        _, freeze, pair, *_ = asked.answers[first:]
        if number % 4 == 1:
            guest.wait_until(lambda freeze=freeze: freeze, "the freeze")
            assert freeze[0].ok, freeze
        elif number % 4 == 2:
            guest.wait_until(lambda pair=pair: pair, "the pair")
            assert pair[0].ok, pair
        else:
            sleep(random.uniform(0, 0.1))
        if number & 8:
            streams.cut()
        for name in random.sample(DEVICES, len(DEVICES)):
            guest.call(swap, guest, name, 1 + number % 2)
        streams.cut()
    settle(guest)
    return asked


def end_streams(guest: LinuxGuest, shell: Shell) -> None:
    """The guest's programs have ended, and no channel of theirs is left."""
    shell.check("until [ -e /connected ]; do sleep 0.1; done")

    def over() -> bool:
        return not any(c.offer.name.startswith("vsock") for c in guest.bus.host.server.channels.all)

    guest.wait_until(lambda: guest.call(over), "the streams' channels to go")
    assert f"0 connections of {ROUNDS} so far, 0 refused" in guest.bus.vsock.describe()[0]


def see_health(guest: LinuxGuest, shell: Shell) -> None:
    """Every device does what it is for."""
    bus = guest.bus
    shell.check(INPUT)
    assert guest.call(bus.keyboard.type, f"\n{FINAL}\n")
    shell.check(SAW_FINAL)
    assert ask(guest, bus.kvp.set, kvp.KVP_POOL_EXTERNAL, "colour", "red").ok
    assert ask(guest, bus.kvp.get, kvp.KVP_POOL_EXTERNAL, "colour").value == "red"
    facts = dict(ask(guest, bus.kvp.enumerate, kvp.KVP_POOL_AUTO).pairs)
    assert facts["OSBuildNumber"] == shell.check("uname -r").strip()
    assert ask(guest, bus.vss.freeze).ok
    shell.check(WRITE)
    assert ask(guest, bus.vss.thaw).ok
    assert shell.check(WRITTEN).strip() == "written"
    assert set(converse(guest, 20)) == {0}


def channels(guest: LinuxGuest) -> list[tuple[Any, ...]]:
    """What `inspect` shows of the channels, but for the relids and GPADLs' numbers, which go on."""
    found = guest.call(inspect, guest.machine)["vmbus"]["channels"]
    return sorted(
        (c["name"], c["state"], c["withdrawn"], c["open"] is not None, sorted(c["gpadls"].values()))
        for c in found
    )


@pytest.mark.parametrize("kernel", MAIN_KERNELS)
def test_devices_in_use_are_withdrawn_and_offered_again(kernel: str) -> None:
    files = {**daemons(), "/vsock": program("vsock")}
    with linux_guest(
        SHELL, kernel=kernel, modules=MODULES, files=files, memory=256 << 20, append="quiet log_buf_len=1M"
    ) as guest:
        guest.start()
        shell = Shell(guest).ready()
        # What drivers say of a channel that goes while they open it would be in the midst of our answers.
        shell.check("dmesg -n 1; mkdir -p /var/lib; stty -F /dev/tty1 -echo")
        for line in (DISK, KEEP, LISTEN, READ_KEYS):
            shell.check(line)
        settle(guest)
        wait_for_utilities(guest)
        expected, drivers, before = open_channels(guest), bound(shell), channels(guest)
        # We listen before the guest connects: one that is refused waits for its own time limit in Linux.
        streams = Streams(guest)
        shell.check(CONNECT)
        asked = come_and_go(guest, streams)
        end_streams(guest, shell)
        see_health(guest, shell)
        assert {len(told) for told in asked.answers} == {1}
        assert bound(shell) == drivers
        assert channels(guest) == before
        table = guest.bus.host.server.channels
        assert (open_channels(guest), len(table.gpadls), len(table.by_relid)) == (
            expected,
            expected,
            len(before),
        )
        see_no_complaints(shell)
        assert guest.bus.host.server.reports.counts == {}
        shell.send("exit 0")
        assert guest.finish().clean
