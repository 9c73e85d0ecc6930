"""A distribution kernel's own drivers on our bus, on KVM with Hyper-V: hv_vmbus and hv_utils."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import pytest
from guest_artifacts import artifact

from hvkvm.abi import vmbus
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(600)]
SECONDS = 240.0


@contextmanager
def guest(script: str) -> Iterator[tuple[Machine, bytearray]]:
    """A machine with a bus that runs `script` in its guest, and the console's output."""
    config = MachineConfig(
        kernel=artifact("HVKVM_GUEST_KERNEL"),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        modules_dir=artifact("HVKVM_GUEST_MODULES"),
        modules=("hv_vmbus", "hv_utils"),
        append="quiet",
        synic="kernel",
        vmbus="on",
        timeout=SECONDS,
        command=("sh", "-c", script),
    )
    output = bytearray()
    with Machine(config) as machine:
        machine.board.attach_sink(output.extend)
        yield machine, output


def test_the_drivers_connect_bind_and_negotiate() -> None:
    script = "dmesg; for d in /sys/bus/vmbus/devices/*; do echo bound $(readlink $d/driver); done"
    with guest(script) as (machine, output):
        outcome = machine.run()
        assert outcome.ending is Ending.COMMAND_EXITED, output.decode(errors="replace")
        text = output.decode(errors="replace")
        assert "hv_vmbus: Vmbus version:5.3" in text
        for line in ("Heartbeat IC version 3.0", "Shutdown IC version 3.2", "TimeSync IC version 4.0"):
            assert line in text
        bound = [line for line in text.splitlines() if line.startswith("bound ")]
        assert len(bound) == 4
        assert sum(line.rstrip().endswith("/hv_utils") for line in bound) == 3
        assert machine.bus is not None
        assert machine.bus.host.server.version == vmbus.VERSION_WIN10_V5_3
        assert machine.bus.host.server.reports.total == 0


def test_the_guest_answers_heartbeats_and_powers_off_when_asked() -> None:
    """Linux's orderly_poweroff runs /sbin/poweroff; the guest answers the request before that."""
    with guest("sleep 1000") as (machine, output):
        machine.start()
        bus = machine.bus
        assert bus is not None
        end = monotonic() + SECONDS
        while not (bus.heartbeat.alive and bus.shutdown.ready_for_requests):
            assert monotonic() < end, output.decode(errors="replace")
            assert machine.outcome is None, machine.outcome
            sleep(0.1)
        answered = threading.Event()
        statuses: list[int] = []

        def reply(status: int, _body: bytes) -> None:
            statuses.append(status)
            answered.set()

        machine.io.call_soon(bus.shutdown.request, "power-off", reply)
        assert answered.wait(SECONDS)
        assert statuses == [0]
        outcome = machine.wait(SECONDS)
        assert outcome is not None, output.decode(errors="replace")
        assert (outcome.ending, outcome.status) == (Ending.POWERED_OFF, 0)


def test_a_reboot_finds_the_bus_again() -> None:
    with guest("sleep 2; reboot -f") as (machine, output):
        machine.start()
        bus = machine.bus
        assert bus is not None
        end = monotonic() + 2 * SECONDS
        beating_after = set()
        while machine.resets < 2:
            assert monotonic() < end, output.decode(errors="replace")
            assert machine.outcome is None, machine.outcome
            if bus.heartbeat.alive:
                beating_after.add(machine.resets)
            sleep(0.02)
        assert {0, 1} <= beating_after
