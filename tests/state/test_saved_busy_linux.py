"""A Linux saved while all of it is at work: timers, streams, requests to its daemons, on 1 and 4 vCPUs.

What must hold: it counts on without a gap and its clocks never go back; a stream is reset, cleanly, and the
next one works; the daemons answer again, and nothing stays frozen; its kernel complains of nothing.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest
from linux_daemons import DISK, ask, daemons
from linux_guest import LinuxGuest, linux_guest

from hvkvm.abi import kvp
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

SOAK = bool(os.environ.get("HVKVM_SOAK"))
pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(0 if SOAK else 900)]

ROUNDS = int(os.environ.get("HVKVM_SOAK_SAVES", "50")) if SOAK else 3
PORT = 5000
GUEST = rf"""
stty -echo
(read -r order; : >/tmp/stop) </dev/ttyS0 &
mkdir -p /var/lib; hostname busy; {DISK}
hv_kvp_daemon -n 2>/dev/null & hv_vss_daemon -n 2>/dev/null &
cat >/stream <<'END'
i=0
while echo $i; do i=$((i + 1)); usleep 2000; done 2>/dev/null
END
while :; do guest-vsock {PORT} 1 /bin/sh /stream; usleep 100000; done &
now=0 i=0
while [ ! -e /tmp/stop ]; do
	i=$((i + 1)); echo "line $i"; usleep 10000
	read -r up idle </proc/uptime
	up=${{up%.*}}${{up#*.}}
	[ $up -ge $now ] || echo "complaint: the clock went back from $now to $up"
	now=$up
done
(echo written >/mnt/data/file) & wait $!
echo "file $(cat /mnt/data/file)"
dmesg | grep -E 'WARNING: CPU|BUG:|Oops|stall|soft lockup|hung_task|Watchdog' | sed 's/^/complaint: /'
echo "lines $i"
exit 5
"""


class Streams:
    """Who reads the guest's streams: each must count from 0 without a gap, up to wherever it was reset."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.opened = self.read = 0

    def take(self, sock: socket.socket) -> None:
        """One connection, on the I/O loop: a thread reads it to its end."""
        self.opened += 1
        sock.setblocking(True)
        threading.Thread(target=self._read, args=(sock,), daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        wanted, rest = 0, b""
        with sock:
            while True:
                try:
                    data = sock.recv(65536)
                except OSError:
                    return
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line != b"%d" % wanted:
                        self.wrong.append(f"{line!r} where {wanted} was due")
                        return
                    wanted += 1
                self.read += len(lines)


def attach(machine: Machine, output: bytearray, streams: Streams) -> LinuxGuest:
    guest = LinuxGuest(machine, output)
    guest.bus.vsock.listen(PORT, streams.take)
    return guest


def disturb(guest: LinuxGuest, chance: random.Random) -> None:
    """Ask the guest's daemons for something and do not wait."""
    bus, soon = guest.bus, guest.machine.platform.io.call_soon
    ways: list[Callable[[], None]] = [
        lambda: soon(bus.kvp.enumerate, kvp.KVP_POOL_AUTO, lambda _told: None),
        lambda: soon(bus.kvp.set, kvp.KVP_POOL_EXTERNAL, "key", "value" * 100, lambda _told: None),
        lambda: soon(bus.vss.freeze, lambda _told: None),
        lambda: soon(bus.timesync.sync, lambda _told: None),
        lambda: None,
    ]
    for way in chance.sample(ways, 2):
        way()


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("synic", ["kernel", "user"])
def test_a_busy_linux_goes_on_wherever_it_was_saved(synic: str, cpus: int, tmp_path: Path) -> None:
    if not SOAK and (synic, cpus) not in (("kernel", 4), ("user", 1)):
        pytest.skip("one of each in the suite, all in a soak")
    chance, streams, file = random.Random(cpus), Streams(), tmp_path / "vm"
    modules = ("hv_vmbus", "hv_utils", "hv_sock", "brd")
    with linux_guest(
        GUEST, synic=synic, cpus=cpus, modules=modules, files=daemons(), append="quiet"
    ) as first:
        guest = attach(first.machine, first.output, streams)
        guest.start()
        guest.wait_until(lambda: guest.bus.kvp.ready_for_requests, "hv_kvp_daemon to register")
        guest.wait_until(lambda: streams.read, "the first stream")
        output, machine = first.output, first.machine
        try:
            for _ in range(ROUNDS):
                sleep(chance.random())
                disturb(guest, chance)
                sleep(chance.random() * 0.05)
                opened, read = streams.opened, streams.read
                machine.save(file, end=True)
                machine.close()
                machine = Machine(MachineConfig(kernel=file, restore=file, timeout=1800))
                guest = attach(machine, output, streams)
                guest.start()
                guest.wait_until(
                    lambda opened=opened, read=read: streams.opened > opened and streams.read > read,  # type: ignore[misc]
                    "another stream",
                )
            guest.wait_until(lambda: guest.bus.kvp.ready_for_requests, "KVP to be there")
            # Also by a thaw that the host still owes it, or that is under way: a freeze is refused meanwhile.
            guest.wait_until(lambda: not guest.bus.vss.save().frozen, "the guest to be thawed")
            told = ask(guest, guest.bus.kvp.enumerate, kvp.KVP_POOL_AUTO)
            assert dict(told.pairs)["ProcessorArchitecture"] == "x86_64"
            assert ask(guest, guest.bus.vss.freeze).ok
            assert ask(guest, guest.bus.vss.thaw).ok
            guest.type("stop")
            outcome = guest.finish()
        finally:
            machine.close()
        text = guest.text
        assert (outcome.ending, outcome.status) == (Ending.COMMAND_EXITED, 5), text[-3000:]
        counted = [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]
        assert counted == list(range(1, len(counted) + 1)), text[-3000:]
        assert f"lines {len(counted)}\n" in text
        assert "file written" in text
        assert "complaint" not in text, text[-3000:]
        assert streams.wrong == []
        assert streams.opened > ROUNDS
