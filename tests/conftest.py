"""Fixtures that several folders of tests share: the agent guest on a machine of ours, a running I/O loop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# The guests' builder and their host-side driver are modules for tests, not part of the package.
sys.path.insert(0, str(Path(__file__).parent / "guests"))

if TYPE_CHECKING:
    from guest_machine import Guest
    from host_failures import HostFailures

    from hvkvm.runtime.io_loop import IoLoop


def _set_up_properties() -> None:
    """Properties are about what holds, not how fast: no deadline, no complaint of a slow machine.

    The suite tries much the same inputs each time, so that whether a change passes depends on that change:
    only the constants of whatever modules are loaded, which hypothesis draws from, differ. `make
    soak-properties` looks for new ones.
    """
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "hvkvm",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize="HVKVM_SOAK" not in os.environ,
    )
    settings.load_profile("hvkvm")


if (
    "HVKVM_IN_LAB" not in os.environ
):  # importing hypothesis takes seconds there, and few tests of that tier use it
    _set_up_properties()


def pytest_collection_finish() -> None:
    if "hypothesis" in sys.modules:
        _set_up_properties()


def pytest_configure(config: pytest.Config) -> None:
    from left_open import LeftOpen

    config.pluginmanager.register(LeftOpen())
    # Under nohup, or in a script's background, children would inherit that these are ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "kernel_synic: about KVM's own SynIC; HVKVM_SYNIC=user leaves it out")
    config.addinivalue_line("markers", "firmware: boots UEFI firmware; its lab has a newer kernel")
    config.addinivalue_line("markers", "user_synic: about the one in user space; HVKVM_SYNIC changes nothing")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """HVKVM_SYNIC=user: what boots the agent guest runs on the SynIC in user space, so on any KVM.

    Save what is about the kernel's own SynIC: that says `@pytest.mark.kernel_synic`.
    What chooses its SynIC itself says `@pytest.mark.user_synic`, and stays as it is.
    """
    if os.environ.get("HVKVM_SYNIC") != "user":
        return
    chosen = []
    for item in items:
        if "boot_agent" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("user_synic"):
            chosen.append(item)
        elif item.get_closest_marker("hyperv"):
            item.add_marker(pytest.mark.hyperv)  # its module may lose that below, for a neighbour's sake
    for item in chosen:
        if item.get_closest_marker("kernel_synic"):
            item.add_marker(pytest.mark.skip(reason="about the kernel's own SynIC"))
            continue
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if mark.name != "hyperv"]
        item.add_marker(pytest.mark.kvm)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """No test may leave the process in another folder: those behind it would write and look there."""
    yield
    before, now = item.config.invocation_params.dir, Path.cwd()
    if now != before:
        os.chdir(before)
        raise AssertionError(f"{item.nodeid} left the process in {now}")


@pytest.fixture
def io() -> Iterator[IoLoop]:
    """A running I/O loop; the test fails if one of its callbacks raised."""
    from hvkvm.runtime.io_loop import IoLoop

    faults: list[BaseException] = []
    loop = IoLoop(on_fault=faults.append)
    loop.start()
    yield loop
    loop.stop()
    assert faults == []


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> HostFailures:
    """The host's calls, of which one fails when it is to."""
    from host_failures import HostFailures

    return HostFailures(monkeypatch)


@pytest.fixture
def uncaught(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What no thread caught, and what was raised where nobody hears it."""
    found: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(repr(args.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", lambda args: found.append(repr(args.exc_value)))
    return found


@pytest.fixture
def tiny_switch_interval() -> Iterator[None]:
    """Threads change over as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def boot_agent() -> Iterator[Callable[..., Guest]]:
    """`boot_agent(cpus=1, hv="passthrough", ...)`: a running machine whose vCPUs all serve their mailbox.

    Afterwards the machine is closed, and no thread and no fd of it may be left.
    """
    from guest_machine import Guest
    from open_files import newly_open, open_files

    fds, threads = open_files(), set(threading.enumerate())
    guests: list[Guest] = []

    def boot(**config: Any) -> Guest:
        guest = Guest(**config)
        guests.append(guest)
        guest.start()
        return guest

    try:
        yield boot
    finally:
        for guest in guests:
            guest.close()
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not left, f"threads left behind: {left}"
    leaked = newly_open(fds)
    assert not leaked, f"fds left open: {leaked}"
