"""A Linux guest and this host on one wire: a tap interface made for the test, the host's kernel as the peer.

The host's kernel verifies every checksum that the guest leaves to its NIC, the guest's every one that reaches
it. Owner: the test's thread.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from linux_guest import SECONDS, LinuxGuest, linux_guest
from linux_programs import program
from linux_shell import SHELL, Shell

from hvkvm.devices.synth.netvsp import Netvsp, address_of
from hvkvm.machine.machine import Machine
from hvkvm.net.tap import TapPort
from hvkvm.net.tap_make import NewTap, make_tap

HOST, GUEST, BITS = "10.99.0.1", "10.99.0.2", 24
HOST6, GUEST6 = "fd00:99::1", "fd00:99::2"
MODULES = ("hv_vmbus", "hv_utils", "hv_netvsc")
MTU = 9000
DATAGRAM_TRIES = 20


class Lan:
    """The guest, its shell, its NIC, and the tap behind it."""

    def __init__(self, guest: LinuxGuest, nic: Netvsp, port: TapPort) -> None:
        self.guest = guest
        self.nic = nic
        self.port = port
        self.shell = Shell(guest)

    def up(self) -> None:
        """Addresses in the guest, and its interface up; waits for the link."""
        self.shell.check(
            f"ip addr add {GUEST}/{BITS} dev eth0; echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad;"
            f" ip -6 addr add {GUEST6}/64 dev eth0; ip link set eth0 up"
        )
        self.guest.wait_until(lambda: self.nic.control_state.packet_filter, "waiting for the guest's filter")

    def ping(self, host: str = HOST, *options: str) -> None:
        """Some pings, every one of which is answered."""
        found = self.shell.check(f"ping -c 3 -i 0.2 -W 20 {' '.join(options)} {host}")
        assert " 0% packet loss" in found, found

    def from_guest(self, size: int, host: str = HOST) -> None:
        """`size` random bytes over TCP from the guest: what arrives is what was sent."""
        with Peer(host, _receive) as peer:
            sent = self.shell.check(
                f"dd if=/dev/urandom of=/tmp/sent bs=64k count={size >> 16} 2>/dev/null; "
                f"nc {host} {peer.port} < /tmp/sent; md5sum < /tmp/sent"
            )
            assert peer.result() == sent.split()[0], f"other bytes came than {sent}"

    def to_guest(self, size: int, host: str = HOST) -> None:
        """`size` random bytes over TCP to the guest."""
        data = os.urandom(size)
        with Peer(host, lambda sock: sock.sendall(data)) as peer:
            found = self.shell.check(f"nc {host} {peer.port} < /dev/null | md5sum")
            peer.result()
            assert found.split()[0] == hashlib.md5(data).hexdigest()

    def datagrams(self, sizes: list[int], port: int = 7007) -> None:
        """UDP there and back, with checksums, in these sizes."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            for size in sizes:
                data = os.urandom(size)
                for _ in range(DATAGRAM_TRIES):  # the guest's program may not be there yet
                    sock.sendto(data, (GUEST, port))
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
        self._server.close()
        self._thread.join(SECONDS)


def _receive(sock: socket.socket) -> str:
    digest = hashlib.md5()
    while data := sock.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()


def plug(machine: Machine, name: str = "net0", *, mtu: int = MTU, queues: int = 1) -> tuple[Netvsp, TapPort]:
    """A NIC on a tap of its own, for a machine that does not run yet; `port.start` is for the loop."""
    tap = make_tap(NewTap(mtu=mtu, addresses=(f"{HOST}/{BITS}", f"{HOST6}/64")))
    port = TapPort(machine.platform.io, tap)
    nic = Netvsp(machine.platform.memory, port, name=name, address=address_of("test", 0), queues=queues)
    port.attach(nic)
    assert machine.bus is not None
    machine.bus.add(name, nic)
    return nic, port


@contextmanager
def guest_lan(*, queues: int = 1, modules: tuple[str, ...] = MODULES, **options: Any) -> Iterator[Lan]:
    """A guest that runs, with an interface eth0 that is up."""
    files = {"/bin/nic": program("nic"), **options.pop("files", {})}
    with linux_guest(SHELL, modules=modules, files=files, **options) as guest:
        nic, port = plug(guest.machine, queues=queues)
        try:
            guest.start()
            guest.call(port.start)
            lan = Lan(guest, nic, port)
            lan.shell.ready()
            lan.up()
            yield lan
        finally:
            guest.machine.stop()
            port.close()
