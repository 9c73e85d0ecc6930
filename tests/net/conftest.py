"""An I/O loop, a NIC that keeps what comes to it, and network namespaces that are gone afterwards."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from time import monotonic

import pytest

from hvkvm.abi.virtio_net_hdr import PLAIN
from hvkvm.runtime.io_loop import IoLoop

_numbers = itertools.count()
SECONDS = 30.0


class Loop(IoLoop):
    """The real loop, and a way to do something on it and have the result."""

    def __init__(self):
        self.faults = []
        super().__init__(on_fault=self.faults.append)

    def do(self, fn, *args):
        done, results = threading.Event(), []

        def work():
            try:
                results.append((fn(*args), None))
            except BaseException as error:
                results.append((None, error))
            done.set()

        self.call_soon(work)
        assert done.wait(SECONDS), self.state
        result, error = results[0]
        if error is not None:
            raise error
        return result


def free_port(kind: socket.SocketKind) -> int:
    """One that nobody has just now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nic:
    """A receiver that copies what it takes; `room` frames at most, without end where None."""

    def __init__(self, loop, room=None):
        self.loop = loop
        self.room = room
        self.got = []
        self.headers = []
        self.links = []
        self.writables = 0
        self.changed = threading.Condition()

    def frames(self, frames):
        with self.changed:
            taken = len(frames) if self.room is None else min(self.room, len(frames))
            for frame in frames[:taken]:
                assert len(frame[0]) == 12
                assert all(map(len, frame))
                self.headers.append(bytes(frame[0]))
                self.got.append(b"".join(frame[1:]))
            if self.room is not None:
                self.room -= taken
            self.changed.notify_all()
        return taken

    def writable(self):
        with self.changed:
            self.writables += 1
            self.changed.notify_all()

    def link(self, up):
        with self.changed:
            self.links.append(up)
            self.changed.notify_all()

    def __str__(self):
        return f"room {self.room}, links {self.links}, frames {[f[:64].hex() for f in self.got[-5:]]}"

    def wait(self, condition, what="what was waited for"):
        """Until `condition(self)`; the test's failure after SECONDS. What it gave."""
        end = monotonic() + SECONDS
        with self.changed:
            while not (found := condition(self)):
                assert self.changed.wait(end - monotonic()), f"{what} did not come: {self}"
            return found

    def frame(self, condition):
        """The first frame that came for which `condition(bytes)` holds."""
        return self.wait(lambda nic: next((f for f in nic.got if condition(f)), None), "a frame")


def connect(loop, port, room=None):
    """A NIC at `port`, which is started and has told its link."""
    nic = Nic(loop, room)
    port.attach(nic)
    loop.do(port.start)
    nic.wait(lambda n: n.links, "the link's state")
    return nic


def views(*frames, header=PLAIN):
    """Frames as a NIC gives them to `send`."""
    return [[memoryview(header), memoryview(frame)] for frame in frames]


@pytest.fixture
def loop():
    loop = Loop()
    loop.start()
    yield loop
    loop.stop()
    assert loop.faults == []


def may_make_taps():
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or shutil.which("ip") is None:
        return False
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    return bool(effective & 1 << 12 and effective & 1 << 21)  # CAP_NET_ADMIN, CAP_SYS_ADMIN


needs_taps = pytest.mark.skipif(
    not may_make_taps(), reason="no /dev/net/tun, ip, or right to make interfaces"
)


class Netns:
    """A network namespace with a name."""

    def __init__(self, name):
        self.name = name

    def run(self, *command, **options):
        """`command` in it; its output."""
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        ).stdout

    def do(self, fn, *args):
        """`fn(*args)` in it, such as making a socket."""
        from pyroute2.netns import setns

        results = []

        def work():
            setns(self.name)
            results.append(fn(*args))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return results[0]

    def interfaces(self):
        """The names of its interfaces."""
        shown = self.run("ip", "-o", "link")
        return {line.split(": ")[1].split("@")[0] for line in shown.splitlines()}


@contextmanager
def made_netns():
    """A network namespace that is gone afterwards."""
    space = Netns(f"hvkvm-test-{os.getpid()}-{next(_numbers)}")
    subprocess.run(["ip", "netns", "add", space.name], check=True)
    try:
        space.run("ip", "link", "set", "lo", "up")
        yield space
    finally:
        subprocess.run(["ip", "netns", "del", space.name], check=True)


@pytest.fixture
def netns():
    with made_netns() as space:
        yield space
