"""What a callback of the caller's raises ends the run, and is raised to the caller, once."""

from __future__ import annotations

import os
import signal as signals
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from hvkvm.abi import vmbus
from hvkvm.errors import HvkvmError, RouteError
from hvkvm.events import Event, Observer
from hvkvm.machine.dump_vcpu import describe
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending, is_mistake, of_fault
from hvkvm.runtime.guard import is_callers
from hvkvm.testing.guest import GuestFailure
from hvkvm.testing.micro import MicroGuest
from hvkvm.vmbus.offer import Offer

SECONDS = 100.0
SPIN = "\n1: jmp 1b"
WRITES = f"movw $0x700, %dx\noutb %al, %dx{SPIN}"
POSTS = f"""
    hyperv_on
    movl    $pages, %eax
    movl    $7, (%rax)
    movl    $1, 8(%rax)
    movl    $4, 12(%rax)
    hypercall $0x5c, $pages
{SPIN}"""
SIGNALS = f"""
    hyperv_on
    movl    $9, %edx
    hypercall $0x1005d, %rdx
{SPIN}"""
PORT = 0x700

Make = Callable[..., MicroGuest]


class Wrong(AssertionError):
    """What the callbacks here raise."""


def wrong(*_: object) -> int:
    raise Wrong("on purpose")


class Port:
    """A device of one port, whose writes are `fn`'s."""

    def __init__(self, fn: Callable[..., object] = wrong) -> None:
        self._fn = fn

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._fn()


class Told(Observer):
    def event(self, event: Event) -> None:
        wrong()


def message(guest: MicroGuest) -> None:
    guest.partition.connections.add_message(7, wrong)


def signal(guest: MicroGuest) -> None:
    guest.partition.connections.add_event(9, wrong)


def port(guest: MicroGuest) -> None:
    guest.machine.board.ports.add(PORT, 1, Port())


def sink(guest: MicroGuest) -> None:
    guest.machine.board.attach_sink(wrong)


def timer(guest: MicroGuest) -> None:
    guest.later(0, wrong)


@pytest.mark.parametrize(
    ("source", "hv", "listen"),
    [
        (POSTS, "passthrough", message),
        (SIGNALS, "passthrough", signal),
        (WRITES, "none", port),
        (f'print "hello"{SPIN}', "none", sink),
        (SPIN, "none", timer),
    ],
)
def test_it_is_raised_by_run_from_where_it_was(
    micro_guest: Make, source: str, hv: str, listen: Callable[[MicroGuest], None]
) -> None:
    """It was a status of 254, which nobody need look at."""
    guest = micro_guest(source, hv=hv)
    listen(guest)
    machine = guest.machine
    with pytest.raises(Wrong, match="on purpose") as caught:
        machine.run()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert (frames[0].name, frames[-1].name) == ("test_it_is_raised_by_run_from_where_it_was", "wrong")
    assert machine.lifecycle.phase.name == "ENDED"
    assert (machine.outcome and machine.outcome.ending) is Ending.HOST_ERROR
    machine.stop()
    machine.close()  # it is told once


def leave(machine: Machine, by: type[BaseException] | None = None) -> None:
    """Run it in a `with` block that ends `by` an error of its own."""
    with machine:
        machine.start()
        outcome = machine.wait(SECONDS)
        assert outcome is not None
        assert outcome.detail.startswith("vcpu0: Wrong: on purpose (test_callback_errors.py:")
        if by is not None:
            raise by


@pytest.mark.parametrize("how", ["stop", "close"])
def test_it_is_raised_by_who_only_waits_and_stops(micro_guest: Make, how: str) -> None:
    machine = micro_guest(WRITES).machine
    machine.board.ports.add(PORT, 1, Port())
    machine.start()
    machine.wait(SECONDS)
    with pytest.raises(Wrong):
        getattr(machine, how)()


@pytest.mark.parametrize("by", [None, LookupError])
def test_it_is_raised_by_a_with_block(micro_guest: Make, by: type[Exception] | None) -> None:
    machine = micro_guest(WRITES).machine
    machine.board.ports.add(PORT, 1, Port())
    with pytest.raises(Wrong) as caught:
        leave(machine, by)
    assert isinstance(caught.value.__context__, by or type(None))


@pytest.mark.parametrize("by", [KeyboardInterrupt, SystemExit])
def test_it_does_not_stand_for_ctrl_c(micro_guest: Make, by: type[BaseException]) -> None:
    machine = micro_guest(WRITES).machine
    machine.board.ports.add(PORT, 1, Port())
    with pytest.raises(by) as caught:
        leave(machine, by)
    (note,) = caught.value.__notes__
    assert note.startswith("before that a callback raised Wrong: on purpose (test_callback_errors.py:")


def test_a_forked_child_leaves_it_to_its_parent(micro_guest: Make) -> None:
    machine = micro_guest(WRITES).machine
    machine.board.ports.add(PORT, 1, Port())
    machine.start()
    machine.wait(SECONDS)
    child = os.fork()
    if not child:
        signals.signal(signals.SIGALRM, signals.SIG_DFL)
        signals.alarm(60)  # a lock that a thread of the parent's held stays held here
        heard = machine.lifecycle.take_error()
        with suppress(Wrong):
            machine.close()
            os._exit(heard is not None)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(Wrong):
        machine.close()


MISTAKEN = """
import sys
from hvkvm.cli import main
from hvkvm.devices.port.debug_exit import GuestExit

def write(*_):
    raise IndexError("on purpose")

GuestExit.write = write
sys.exit(main(["run", "--memory", "16M", "--hv", "none", "--control", "off", "--kernel", sys.argv[1]]))
"""


def test_the_command_tells_it_as_the_end_of_the_run(micro_guest: Make) -> None:
    image = micro_guest("exit 3").machine.config.kernel
    done = subprocess.run(
        [sys.executable, "-c", MISTAKEN, str(image)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 254
    assert done.stderr == "hvkvm: error in the host's code: vcpu0: IndexError: on purpose (<string>:7)\n"


class Device:
    """A VMBus device with a mistake in it."""

    offer = Offer(vmbus.guid("7d4b2f0e-6a0b-4c57-9d0e-4f2a6c1b8e35"), bytes(16), "ours")

    def opened(self, io: Any) -> None: ...
    def received(self, packet: Any) -> None: ...
    def ready(self) -> None: ...
    def close(self) -> None: ...  # the bus gives it a `done`


def test_a_device_of_the_callers_ends_more_than_itself(micro_guest: Make) -> None:
    """Its error was a warning that only an observer hears of; here the call itself does not fit."""
    guest = micro_guest(SPIN, hv="passthrough", vmbus="on")
    channel = guest.call(guest.host.add, Device())
    guest.start()
    devices = guest.host.devices
    guest.call(devices.fail, channel, TypeError("it takes 1 argument"))
    with pytest.raises(TypeError, match="it takes 1 argument"):
        guest.wait_until(lambda: False, "what never comes")
    assert list(devices.ended) == ["ours"]


def test_a_device_of_ours_ends_alone_unless_it_called_a_callers_code(micro_guest: Make) -> None:
    guest = micro_guest(SPIN, hv="passthrough", vmbus="on")
    heartbeat = guest.bus.devices["heartbeat"]
    guest.start()
    guest.call(guest.host.devices.fail, heartbeat.channel, ValueError("a mistake of ours"))
    assert guest.machine.outcome is None
    keyboard = guest.bus.devices["keyboard"]
    try:
        wrong()
    except Wrong as error:
        guest.call(guest.host.devices.fail, keyboard.channel, error)
    with pytest.raises(Wrong):
        guest.wait_for_end()


def test_an_observers_error_is_not_a_devices(micro_guest: Make) -> None:
    config = micro_guest("nop").machine.config._replace(hv="passthrough", vmbus="on")
    machine = Machine(config, observer=Told())
    bus = machine.bus
    assert bus is not None
    machine.platform.io.call_soon(bus.host.devices.fail, bus.devices["kvp"].channel, ValueError())
    with pytest.raises(Wrong):
        machine.run()
    machine.close()


def test_what_kvm_and_the_host_refuse_stays_an_end() -> None:
    refused = HvkvmError("KVM_RUN on the vcpu fd: no")
    assert not is_mistake(refused)
    assert of_fault(refused, "vcpu0").ending is Ending.KVM_ERROR
    assert of_fault(OSError(24, "no"), "vcpu0").ending is Ending.HOST_EXHAUSTED
    try:
        raise RouteError("SINT 99 of VP 0")  # in a callback
    except RouteError as error:
        assert is_callers(error)
        assert of_fault(error, "vcpu0").ending is Ending.HOST_ERROR
    assert of_fault(ValueError("a mistake of ours"), "vcpu0").ending is Ending.HOST_ERROR


def test_a_guest_that_ends_otherwise_is_a_guests_failure(micro_guest: Make) -> None:
    guest = micro_guest("exit 3")
    guest.start()
    with pytest.raises(GuestFailure, match=r"^the guest ended before 'never' on the console: command"):
        guest.wait_for("never")


def test_a_vcpu_that_was_not_started_is_described_at_once(micro_guest: Make) -> None:
    """A second was waited for each, and it was said not to answer."""
    thread = micro_guest("nop").machine.platform.threads[0]
    lines = describe(thread)
    assert lines[0] == "vcpu0: not started; exits: none"
    assert "rip=" in lines[1]
