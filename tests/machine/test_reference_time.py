"""One reference time: what the guest reads, by register and by page, and what the host's devices tell it."""

from __future__ import annotations

from collections.abc import Callable
from struct import unpack

import pytest
from guest_agent import ABI, SCRATCH
from guest_machine import Guest

from hvkvm.abi import tlfs

BootAgent = Callable[..., Guest]
MSR_TSC = 0x10
SLACK = 50
"""100 ns units. KVM computes its counter, its page and the VM's clock by three formulas."""

KINDS = [
    pytest.param("user", marks=pytest.mark.kvm),
    pytest.param("kernel", marks=[pytest.mark.hyperv, pytest.mark.kernel_synic]),
]


def read_page(guest: Guest) -> tuple[int, int, int]:
    """The reference TSC page's sequence, scale and offset."""
    sequence, scale, offset = unpack("<I4xQq", guest.machine.memory.read(SCRATCH, 24))
    return sequence, scale, offset


def expect_agreement(guest: Guest) -> None:
    """Register and page lie between two of the host's own readings, on every vCPU."""
    machine = guest.machine
    for cpu in guest.agent.cpus:
        before = machine.hyperv.reference_time()
        counter = cpu.rdmsr(tlfs.HV_X64_MSR_TIME_REF_COUNT)
        after = machine.hyperv.reference_time()
        assert before - SLACK <= counter <= after + SLACK
        sequence, scale, offset = read_page(guest)
        if not sequence:
            continue  # the host's clock is not the TSC: guests use the register

        def tsc_between(index: int = cpu.index) -> tuple[int, int, int]:
            before = machine.hyperv.reference_time()
            return (
                before,
                machine.platform.vcpus[index].msrs((MSR_TSC,))[MSR_TSC],
                machine.hyperv.reference_time(),
            )

        before, tsc, after = machine.platform.threads[cpu.index].call(tsc_between, timeout=30)
        assert before - SLACK <= (tsc * scale >> 64) + offset <= after + SLACK


@pytest.mark.parametrize("synic", KINDS)
def test_counter_page_and_host_agree_through_pause_and_reset(boot_agent: BootAgent, synic: str) -> None:
    guest = boot_agent(cpus=2, synic=synic)
    machine = guest.machine
    guest[1].wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH | 1)
    expect_agreement(guest)
    for _ in range(5):
        machine.pause()
        machine.resume()
        expect_agreement(guest)
    sequence = read_page(guest)[0]
    before = machine.hyperv.reference_time()
    boots = machine.memory.read_u64(ABI["HEADER"] + ABI["HEADER_BOOTS"])
    machine.request_reset("a test wants it")
    guest.until(
        lambda: machine.memory.read_u64(ABI["HEADER"] + ABI["HEADER_BOOTS"]) > boots and machine.resets == 1,
        "the guest boots again",
    )
    guest.agent.await_online()
    assert guest[0].rdmsr(tlfs.HV_X64_MSR_REFERENCE_TSC) == 0
    guest[0].wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH | 1)
    expect_agreement(guest)
    assert machine.hyperv.reference_time() > before, "a reset does not turn time back"
    assert bool(read_page(guest)[0]) == bool(sequence)
