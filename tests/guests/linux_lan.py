"""A Linux guest and this host on one wire: a tap interface made for the test, the host's kernel as the peer.

The host's kernel verifies every checksum that the guest leaves to its NIC, the guest's every one that reaches
it. Owner: the test's thread.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from linux_guest import SECONDS, LinuxGuest, linux_guest
from linux_peer import Peer, echo, received
from linux_programs import program
from linux_shell import SHELL, Shell

from hvkvm.devices.synth.netvsp import Netvsp
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.nics import Nic
from hvkvm.net.wire import Wire

HOST, GUEST, BITS = "10.99.0.1", "10.99.0.2", 24
HOST6, GUEST6 = "fd00:99::1", "fd00:99::2"
MODULES = ("hv_vmbus", "hv_utils", "hv_netvsc")
MTU = 9000


class Lan:
    """The guest, its shell, its NIC, and the tap behind it."""

    def __init__(self, guest: LinuxGuest) -> None:
        self.guest = guest
        self.shell = Shell(guest)

    @property
    def nic(self) -> Netvsp:
        """The device, the machine's at present."""
        return self._nic.device

    @property
    def wire(self) -> Wire:
        """What it leads to."""
        return self._nic.wire

    @property
    def _nic(self) -> Nic:
        assert self.guest.machine.nics is not None
        return self.guest.machine.nics.nics["net0"]

    def swap(self, file: Path) -> None:
        """Save the machine and have another go on, on a tap of its own with the same addresses."""
        old = self.guest.machine
        old.save(file)
        old.close()
        machine = Machine(MachineConfig(kernel=file, restore=file, timeout=old.config.timeout))
        self.guest.machine = machine
        self.guest.attach()
        machine.start()

    def up(self) -> None:
        """Addresses in the guest, and its interface up; waits until the host answers.

        A carrier is seen some seconds after the interface is up, and whoever asks for a neighbour gives up
        after three: a slow guest would say "No route to host" to whom came too early.
        """
        self.shell.check(
            f"ip addr add {GUEST}/{BITS} dev eth0; echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad;"
            f" ip -6 addr add {GUEST6}/64 dev eth0; ip link set eth0 up"
        )
        self.guest.wait_until(lambda: self.nic.control_state.packet_filter, "waiting for the guest's filter")
        self.answered()

    def carrier(self, up: bool) -> None:
        """Wait until the guest sees its link come up, or go down."""
        self.guest.wait_until(
            lambda: self.shell.check("cat /sys/class/net/eth0/carrier") == str(int(up)),
            f"waiting for carrier {up}",
        )

    def answered(self) -> None:
        """Wait until the host answers."""
        self.guest.wait_until(self._host_answers, "waiting for the host to answer")

    def _host_answers(self) -> bool:
        return "alive" in self.shell.check(f"ping -c 1 -W 5 {HOST} > /dev/null 2>&1 && echo alive; true")

    def ping(self, host: str = HOST, *options: str) -> None:
        """Some pings, every one of which is answered."""
        found = self.shell.check(f"ping -c 3 -i 0.2 -W 20 {' '.join(options)} {host}")
        assert " 0% packet loss" in found, found

    def from_guest(self, size: int, host: str = HOST) -> None:
        """`size` random bytes over TCP from the guest: what arrives is what was sent."""
        with Peer(host, received) as peer:
            sent = self.shell.check(
                f"dd if=/dev/urandom of=/tmp/sent bs=64k count={size >> 16} 2>/dev/null; "
                f"nc {host} {peer.port} < /tmp/sent && md5sum < /tmp/sent"
            )
            assert peer.result() == sent.split()[0], f"other bytes came than {sent}"

    def to_guest(self, size: int, host: str = HOST) -> None:
        """`size` random bytes over TCP to the guest."""
        data = os.urandom(size)
        with Peer(host, lambda sock: sock.sendall(data)) as peer:
            found = self.shell.check(f"nc {host} {peer.port} < /dev/null > /tmp/came && md5sum < /tmp/came")
            peer.result()
            assert found.split()[0] == hashlib.md5(data).hexdigest()

    def stream_from_guest(self, size: int, host: str = HOST) -> None:
        """As `from_guest`, for sizes that neither end could keep."""
        with Peer(host, received) as peer:
            self.shell.check(
                "[ -p /tmp/copy ] || mkfifo /tmp/copy; md5sum < /tmp/copy > /tmp/sum & summer=$!"
            )
            self.shell.check(
                f"dd if=/dev/urandom bs=64k count={size >> 16} 2> /dev/null | tee /tmp/copy"
                f" | nc {host} {peer.port}",
                6 * SECONDS,
            )
            sent = self.shell.check("wait $summer; cat /tmp/sum")
            assert peer.result() == sent.split()[0], f"other bytes came than {sent}"

    def stream_to_guest(self, size: int, host: str = HOST) -> None:
        """As `to_guest`, for sizes that neither end could keep."""
        digest = hashlib.md5()

        def serve(sock: socket.socket) -> None:
            random, left = Random(size), size
            while left:
                data = random.randbytes(min(left, 1 << 20))
                digest.update(data)
                sock.sendall(data)
                left -= len(data)

        with Peer(host, serve) as peer:
            found = self.shell.check(f"nc {host} {peer.port} < /dev/null | md5sum", 6 * SECONDS)
            peer.result()
            assert found.split()[0] == digest.hexdigest()

    @contextmanager
    def toggling(self) -> Iterator[None]:
        """Meanwhile what the NIC does by itself goes off and on, some times a second."""
        settings = ("lro=0 rx=0", "rx=1 lro=1", "tso=0", "tx=0", "tx=1 sg=1 tso=1", "gro=0", "gro=1")
        steps = "; ".join(f"nic eth0 {one} > /dev/null || exit 1; usleep 150000" for one in settings)
        self.shell.check(f"while [ ! -e /tmp/enough ]; do {steps}; done & toggler=$!")
        yield
        self.shell.check("touch /tmp/enough; wait $toggler && rm /tmp/enough")
        settled = self.shell.check("nic eth0").split()
        assert {"lro=1", "tso=1"} <= set(settled), settled

    @contextmanager
    def load(self) -> Iterator[None]:
        """Datagrams that nobody waits for, some hundred a second each way, whether there is a NIC or not."""
        enough = threading.Event()

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                while not enough.wait(0.004):
                    with suppress(OSError):
                        sock.sendto(bytes(1400), (GUEST, 9))

        thread = threading.Thread(target=send)
        thread.start()
        try:
            self.shell.check(
                f"while usleep 10000; do ping -q -i 0.005 -s 1400 {HOST}; done > /dev/null 2>&1 & load=$!"
            )
            yield
            self.shell.check("kill $load; killall ping; true")
        finally:
            enough.set()
            thread.join()

    def datagrams(self, sizes: list[int], port: int = 7007) -> None:
        """UDP there and back, with checksums, in these sizes."""
        echo((GUEST, port), sizes)


@contextmanager
def guest_lan(
    *,
    queues: int = 1,
    modules: tuple[str, ...] = MODULES,
    faults: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Lan]:
    """A guest that runs, with an interface eth0 that is up, on a tap interface made for it.

    `faults` are those of the wire, by `NicSpec`'s names.
    """
    files = {"/bin/nic": program("nic"), **options.pop("files", {})}
    addresses = (f"{HOST}/{BITS}", f"{HOST6}/64")
    nets = (NicSpec(backend="create", ip=addresses, mtu=MTU, queues=queues, **(faults or {})),)
    with linux_guest(SHELL, modules=modules, files=files, nets=nets, **options) as guest:
        lan = Lan(guest)
        guest.start()
        lan.shell.ready()
        lan.up()
        try:
            yield lan
        finally:
            lan.guest.machine.close()
