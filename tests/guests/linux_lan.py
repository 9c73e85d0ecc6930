"""A Linux guest and this host on one wire: a tap interface made for the test, the host's kernel as the peer.

The host's kernel verifies every checksum that the guest leaves to its NIC, the guest's every one that reaches
it. Owner: the test's thread.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from linux_guest import SECONDS, LinuxGuest, linux_guest
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
DATAGRAM_TRIES = 20
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 263, 8, 1 << 4
"""linux/if_packet.h: what a raw socket tells beside a frame."""


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
        self.guest.wait_until(self._host_answers, "waiting for the host to answer")

    def _host_answers(self) -> bool:
        return "alive" in self.shell.check(f"ping -c 1 -W 5 {HOST} > /dev/null 2>&1 && echo alive; true")

    def ping(self, host: str = HOST, *options: str) -> None:
        """Some pings, every one of which is answered."""
        found = self.shell.check(f"ping -c 3 -i 0.2 -W 20 {' '.join(options)} {host}")
        assert " 0% packet loss" in found, found

    def from_guest(self, size: int, host: str = HOST) -> None:
        """`size` random bytes over TCP from the guest: what arrives is what was sent."""
        with Peer(host, _receive) as peer:
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

    def datagrams(self, sizes: list[int], port: int = 7007) -> None:
        """UDP there and back, with checksums, in these sizes."""
        echo((GUEST, port), sizes)


def echo(address: tuple[str, int], sizes: list[int], sock: socket.socket | None = None) -> None:
    """UDP there and back with checksums, in these sizes, to one who sends back all that comes."""
    with sock or socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        for size in sizes:
            data = os.urandom(size)
            for _ in range(DATAGRAM_TRIES):  # the guest's program may not be there yet
                sock.sendto(data, address)
                with suppress(TimeoutError):
                    if sock.recv(65536) == data:
                        break
            else:
                raise AssertionError(f"no echo of {size} bytes by UDP")


class Peer:
    """A TCP server on the host for one connection, which `serve(socket)` has."""

    def __init__(self, host: str, serve: Callable[[socket.socket], Any]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self._server.settimeout(SECONDS)
        self.port = self._server.getsockname()[1]
        self._results: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket], Any]) -> None:
        try:
            sock, _address = self._server.accept()
            with sock:
                sock.settimeout(SECONDS)
                self._results.append(serve(sock))
        except OSError as error:
            self._results.append(error)

    def result(self) -> Any:
        """What `serve` returned, when it has."""
        self._thread.join()
        found = self._results[0]
        if isinstance(found, OSError):
            raise found
        return found

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake who waits in accept.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        self._server.close()


def _receive(sock: socket.socket) -> str:
    digest = hashlib.md5()
    while data := sock.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()


class RawTap:
    """Hears the frames on the host's end of a wire, with their VLAN tags."""

    def __init__(self, wire: Wire) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._sock.bind((wire.inspect()["interface"], 3))
        self._sock.setblocking(False)

    def tags(self) -> set[int]:
        """The VLANs that were heard so far."""
        found = set()
        with suppress(BlockingIOError):
            while True:
                _data, control, _flags, _address = self._sock.recvmsg(65536, 256)
                for level, kind, data in control:
                    if level == SOL_PACKET and kind == PACKET_AUXDATA:
                        status, *_rest, tci, _tpid = struct.unpack("IIIHHHH", data[:20])
                        if status & TP_STATUS_VLAN_VALID:
                            found.add(tci & 0xFFF)
        return found

    def __enter__(self) -> RawTap:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


@contextmanager
def guest_lan(*, queues: int = 1, modules: tuple[str, ...] = MODULES, **options: Any) -> Iterator[Lan]:
    """A guest that runs, with an interface eth0 that is up, on a tap interface made for it."""
    files = {"/bin/nic": program("nic"), **options.pop("files", {})}
    addresses = (f"{HOST}/{BITS}", f"{HOST6}/64")
    nets = (NicSpec(backend="create", ip=addresses, mtu=MTU, queues=queues),)
    with linux_guest(SHELL, modules=modules, files=files, nets=nets, **options) as guest:
        lan = Lan(guest)
        guest.start()
        lan.shell.ready()
        lan.up()
        try:
            yield lan
        finally:
            lan.guest.machine.close()
