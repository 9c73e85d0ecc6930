"""The agent guest itself on any KVM: boot, SMP, serial, faults, exits, resets. No hypercalls, no SynIC."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import guest_images
import pytest
from guest_agent import ABI, GP_FAULT, SCRATCH, GuestStuckError
from guest_machine import Guest

from hvkvm.machine.outcome import EXIT_MACHINE_FAULT, EXIT_TIMEOUT, Ending

pytestmark = pytest.mark.kvm

BootAgent = Callable[..., Guest]


@pytest.fixture
def boot(boot_agent: BootAgent) -> BootAgent:
    """Machines without enlightenments."""
    return lambda **config: boot_agent(hv="none", **config)


@pytest.mark.parametrize("cpus", [1, 2, 4, 16])
def test_every_vcpu_comes_online_and_answers(boot: BootAgent, cpus: int) -> None:
    """INIT and SIPI start the APs; APIC id = vCPU index = mailbox."""
    guest = boot(cpus=cpus)
    for cpu in guest.agent.cpus:
        cpu.begin("CPUID", 1, 0)
    for cpu in guest.agent.cpus:
        _, ebx, _, _ = cpu.finish().results
        assert ebx >> 24 == cpu.index
        assert cpu.counter("APIC_ID") == cpu.index
        cpu.expect_clean()


def test_memory_is_shared_with_the_host(boot: BootAgent) -> None:
    """Reads and writes of every size, both ways."""
    guest = boot()
    cpu, memory = guest[0], guest.machine.memory
    memory.write_u64(SCRATCH, 0x1122_3344_5566_7788)
    for size in (1, 2, 4, 8):
        value = cpu.do("READ", SCRATCH, size).value
        assert value == 0x1122_3344_5566_7788 & (1 << 8 * size) - 1
        cpu.do("WRITE", SCRATCH + 0x100, size, 0xFFEE_DDCC_BBAA_9988)
        assert memory.read(SCRATCH + 0x100, size) == (0xFFEE_DDCC_BBAA_9988).to_bytes(8, "little")[:size]


def test_idle_modes_and_doorbells(boot: BootAgent) -> None:
    """A halted vCPU wakes for a command; a spinning and a deaf one need no interrupt."""
    guest = boot(cpus=2)
    cpu = guest[1]
    for mode in ("HLT", "SPIN", "DEAF", "HLT"):
        cpu.idle(mode)
        for _ in range(20):
            assert cpu.do("NOP").fault is None
    cpu.await_halt()
    bells = cpu.counter("DOORBELLS")
    assert bells >= 1
    guest._wake(1)
    guest.until(lambda: cpu.counter("DOORBELLS") == bells + 1, "the doorbell is counted")


def test_waiting_ends_by_the_counter_or_by_cancelling(boot: BootAgent) -> None:
    guest = boot()
    cpu, memory = guest[0], guest.machine.memory
    for operation in ("WAIT_HLT", "WAIT_SPIN"):
        memory.write_u64(SCRATCH, 0)
        cpu.begin(operation, SCRATCH, 5)
        assert cpu.busy
        memory.write_u64(SCRATCH, 9)
        guest._wake(0)
        assert cpu.finish().value == 9
        cpu.begin(operation, SCRATCH, 10)
        assert cpu.cancel().value == 9


def test_exception_in_a_command_is_its_answer(boot: BootAgent) -> None:
    """#GP of an unknown MSR is caught, named, and the vCPU serves on."""
    cpu = boot()[0]
    for _ in range(3):
        reply = cpu.do("RDMSR", 0x1234_5678)
        assert reply.fault == GP_FAULT
        assert ABI["IMAGE_BASE"] <= reply.fault_rip < ABI["IMAGE_LIMIT"]
        assert cpu.do("CPUID", 0, 0).fault is None
    assert cpu.do("READ", 0x5000_0000_0000, 8).fault == 14, "#PF outside the map"


def test_hammer_sees_what_the_host_writes(boot: BootAgent) -> None:
    """The hole detector detects: values other than the two expected are counted."""
    guest = boot()
    cpu, memory = guest[0], guest.machine.memory
    memory.write_u64(SCRATCH, 1)
    cpu.begin("HAMMER", SCRATCH, 1, 2)
    for value in (1, 2, 3):
        memory.write_u64(SCRATCH, value)
        rounds = cpu.counter("HEARTBEAT")
        guest.until(lambda rounds=rounds: cpu.counter("HEARTBEAT") > rounds + 2, "the hammer goes on")
    one, two, other, last = cpu.cancel().results
    assert one > 0
    assert two > 0
    assert other > 0
    assert last == 3


def test_serial_output_reaches_the_console(boot: BootAgent) -> None:
    guest = boot()
    guest.machine.memory.write(SCRATCH, b"hello from the guest\r\n\0")
    guest[0].do("PRINT", SCRATCH)
    guest.until(lambda: "hello from the guest" in guest.machine.board.tail.lines(), "the line arrives")


@pytest.mark.parametrize("value", [0, 1, 21, 63])
def test_debug_exit_status(boot: BootAgent, value: int) -> None:
    """isa-debug-exit: status (value << 1) | 1, as QEMU."""
    guest = boot()
    guest[0].begin("OUT", ABI["DEBUG_EXIT"], 4, value)
    outcome = guest.machine.wait(60)
    assert outcome is not None
    assert (outcome.ending, outcome.status) == (Ending.DEBUG_EXIT, value << 1 | 1)


def test_triple_fault_is_254(boot: BootAgent) -> None:
    guest = boot(cpus=2)
    guest[1].begin("TRIPLE_FAULT")
    outcome = guest.machine.wait(60)
    assert outcome is not None
    assert (outcome.ending, outcome.status) == (Ending.TRIPLE_FAULT, EXIT_MACHINE_FAULT)
    assert "vcpu1" in outcome.detail


@pytest.mark.parametrize(("port", "value"), [(0xCF9, 0x06), (0x64, 0xFE)])
def test_reset_reboots_in_place(boot: BootAgent, port: int, value: int) -> None:
    """Again and again, from either vCPU, with the other one busy."""
    guest = boot(cpus=2)
    for boots in range(2, 5):
        guest[boots % 2 ^ 1].begin("WAIT_SPIN", SCRATCH + 0x8000, 1 << 62)
        guest[boots % 2].begin("OUT", port, 1, value)
        guest.agent.await_online(boots)
        assert guest.agent.boots == boots
        assert guest.machine.resets == boots - 1
        assert [cpu.do("NOP").fault for cpu in guest.agent.cpus] == [None, None]


def test_reset_ends_the_run_when_asked_to(boot: BootAgent) -> None:
    guest = boot(reboot=False)
    guest[0].begin("OUT", 0xCF9, 1, 6)
    outcome = guest.machine.wait(60)
    assert outcome is not None
    assert (outcome.ending, outcome.status) == (Ending.RESET, 0)


def test_guest_that_never_ends_times_out() -> None:
    """124, and every thread joined."""
    guest = Guest(hv="none", timeout=0.5)
    with guest.machine as machine:
        outcome = machine.run()
    assert (outcome.ending, outcome.status) == (Ending.TIMEOUT, EXIT_TIMEOUT)


def test_driver_names_what_did_not_come(boot: BootAgent) -> None:
    """A stuck guest fails its test with words, not by hanging it."""
    guest = boot()
    cpu = guest[0]
    cpu.begin("WAIT_SPIN", SCRATCH + 0x8000, 1 << 62)
    with pytest.raises(GuestStuckError, match="vcpu0 finishes"):
        cpu.finish(seconds=0.2)
    guest[0].cancel()
    cpu.begin("OUT", ABI["DEBUG_EXIT"], 4, 0)
    with pytest.raises(GuestStuckError, match="the machine ended"):
        cpu.finish()


def test_pause_stops_every_vcpu(boot: BootAgent) -> None:
    guest = boot(cpus=2)
    for cpu in guest.agent.cpus:
        cpu.idle("SPIN")
    for _ in range(5):
        with guest.machine.platform.group.paused():
            before = [cpu.counter("HEARTBEAT") for cpu in guest.agent.cpus]
            guest.io_barrier()
            assert [cpu.counter("HEARTBEAT") for cpu in guest.agent.cpus] == before
        for cpu, count in zip(guest.agent.cpus, before, strict=True):
            guest.until(lambda cpu=cpu, count=count: cpu.counter("HEARTBEAT") > count, "the vCPU goes on")


def test_image_is_a_32_bit_multiboot_elf() -> None:
    """What QEMU's -kernel takes too."""
    data = guest_images.image("agent").read_bytes()
    assert data[:6] == b"\x7fELF\x01\x01"
    assert (0x1BADB002).to_bytes(4, "little") in data[:8192]
    assert guest_images.image("agent") == guest_images.image("agent")


def test_broken_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(guest_images.PROGRAMS, "missing", ("no-such-source",))
    with pytest.raises((FileNotFoundError, guest_images.GuestBuildError), match="no-such-source"):
        guest_images.image("missing")
    assert subprocess.run(["as", "--version"], capture_output=True, check=False).returncode == 0
