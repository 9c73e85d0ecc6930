"""What a process holds is released by that process only: a forked child that unwinds changes nothing."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_machine import Guest
from open_files import newly_open, open_files

from hvkvm.backends.terminal import RawTerminal
from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime import unix_listener
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.socket_watch import SocketWatch

SECONDS = 60.0
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def in_a_child(function: Callable[[], object]) -> None:
    """Run `function` in a forked child, which must come to its end without an exception."""
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_childs_removal_leaves_the_parents_fd_watched(loop: IoLoop, pulse: EventFd) -> None:
    heard = threading.Event()
    handle = loop.add_reader(pulse.fd, heard.set, edge=True)
    in_a_child(handle.remove)
    pulse.signal()
    assert heard.wait(SECONDS)
    handle.remove()


def test_a_child_waits_for_no_thread_of_its_parents(loop: IoLoop, pulse: EventFd) -> None:
    """What ran at the fork, and what it had locked, stays so in the child for ever."""
    inside, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        with loop._lock, loop._timers._lock:
            inside.set()
            go_on.wait(SECONDS)

    handle = loop.add_reader(pulse.fd, busy, edge=True)
    timer = loop.call_later(SECONDS * 1000, busy)

    def undo() -> None:
        signal.alarm(int(SECONDS))
        timer.cancel()
        handle.remove()

    pulse.signal()
    assert inside.wait(SECONDS)
    try:
        in_a_child(undo)
    finally:
        go_on.set()
    handle.remove()
    timer.cancel()


def test_a_child_that_stops_the_loop_stops_nothing(loop: IoLoop) -> None:
    done = threading.Event()
    in_a_child(loop.stop)
    loop.call_soon(done.set)
    assert done.wait(SECONDS)


def test_a_childs_removal_leaves_the_parents_socket_watched(loop: IoLoop) -> None:
    ours, theirs = socket.socketpair()
    heard = threading.Event()
    with ours, theirs:
        watch = SocketWatch(loop)
        watched = watch.add(ours.fileno(), lambda _mask: heard.set())
        watched.arm(select.EPOLLIN)
        in_a_child(watched.remove)
        theirs.send(b"x")
        assert heard.wait(SECONDS)
        watch.close()


def test_a_child_takes_no_name_away(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    fd = unix_listener.listen_fd(path, 1)
    owned = unix_listener.identity(path)
    in_a_child(lambda: unix_listener.remove(path, owned))
    assert path.is_socket()
    unix_listener.remove(path, owned)
    assert not path.exists()
    os.close(fd)


def test_a_child_leaves_the_terminal_as_its_parent_has_it() -> None:
    """At its exit, too: what was registered for that in the parent is registered in the child."""
    ours, theirs = os.openpty()
    cooked = termios.tcgetattr(theirs)
    with RawTerminal(theirs) as terminal:
        raw = termios.tcgetattr(theirs)
        assert raw != cooked
        in_a_child(terminal.restore)
        assert termios.tcgetattr(theirs) == raw
    assert termios.tcgetattr(theirs) == cooked
    os.close(ours)
    os.close(theirs)


@pytest.mark.kvm
@pytest.mark.user_synic
def test_a_child_that_closes_its_copy_of_a_machine_leaves_the_machine_running(
    boot_agent: Callable[..., Guest], tmp_path: Path
) -> None:
    """As a fixture or a `with` does when an exception unwinds in a forked child."""
    before = open_files()  # what other tests hold for long
    control, vsock = tmp_path / "control", tmp_path / "vsock"
    guest = boot_agent(hv="passthrough", synic="user", vmbus="on", vsock=vsock, control=str(control))
    heard = threading.Event()
    assert guest.partition.connections.add_event(0x77, heard.set) == 0

    def unwind() -> None:
        guest.machine.request_reset("a child's")
        guest.machine.close()
        guest.machine.close()
        assert not [to for to in newly_open(before).values() if "kvm-vm" in to or "hvkvm-ram" in to]

    in_a_child(unwind)
    assert control.is_socket()
    assert vsock.is_socket()
    assert guest.partition.connections.signal(0x77) == 0
    assert heard.wait(SECONDS)
    guest.settle()
    assert guest.machine.outcome is None
    assert guest.machine.wait(0) is None
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(control))
        client.sendall(b'{"do": "nothing known"}\n')
        assert client.recv(1)
    guest.close()
    assert not control.exists()
    assert not vsock.exists()
