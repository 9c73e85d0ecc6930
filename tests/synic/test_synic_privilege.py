"""What KVM refuses a guest before anybody asks us (S55): wrong privilege, what CPUID does not offer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guest_agent import GP_FAULT, HYPERCALL_PAGE, SCRATCH, UD_FAULT
from guest_machine import Guest

from hvkvm.abi import tlfs
from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.tlfs import HvStatus

pytestmark = [pytest.mark.hyperv, pytest.mark.kernel_synic]

BootAgent = Callable[..., Guest]
POST, SIGNAL_FAST, SEND_IPI, LONG_SPIN = 0x5C, 0x1005D, 0x1000B, 0x10008
CONNECTION = 0x1234


def count_posts(guest: Guest) -> list[int]:
    """A connection for HvPostMessage with input in SCRATCH; grows by one with every post."""
    got: list[int] = []

    def handler(message: hv_post_message_input) -> int:
        got.append(message.connection_id)
        return 0

    assert guest.partition.connections.add_message(CONNECTION, handler) == 0
    guest.machine.memory.write(SCRATCH, CONNECTION.to_bytes(4, "little") + bytes(252))
    return got


def test_s55_hypercalls_at_cpl_3_are_undefined_instructions(boot_agent: BootAgent) -> None:
    guest = boot_agent()
    guest.enlighten()
    got = count_posts(guest)
    cpu = guest[0]
    for control, value in ((POST, SCRATCH), (SIGNAL_FAST, CONNECTION), (0x7FFF, 0)):
        reply = cpu.do("USER_CALL", control, value, HYPERCALL_PAGE)
        assert (reply.fault, reply.fault_rip) == (UD_FAULT, HYPERCALL_PAGE), hex(control)
    assert got == []
    assert cpu.hypercall(POST, SCRATCH) == HvStatus.SUCCESS
    assert got == [CONNECTION]


def test_s55_enforced_cpuid_denies_what_it_does_not_offer(boot_agent: BootAgent) -> None:
    """With SynIC, its two calls are offered; IPIs, long spins and timers are not."""
    guest = boot_agent(hv="relaxed,vpindex,time,synic,enforce-cpuid")
    guest.enlighten()
    got = count_posts(guest)
    cpu = guest[0]
    assert cpu.hypercall(POST, SCRATCH) == HvStatus.SUCCESS
    assert cpu.hypercall(SIGNAL_FAST, 0x77) == HvStatus.INVALID_CONNECTION_ID
    assert got == [CONNECTION]
    for control in (SEND_IPI, LONG_SPIN):
        assert cpu.hypercall(control, 0x40) == HvStatus.ACCESS_DENIED, hex(control)
    assert cpu.do("RDMSR", tlfs.HV_X64_MSR_STIMER0_CONFIG).fault == GP_FAULT
    assert cpu.do("RDMSR", tlfs.HV_X64_MSR_SIMP).fault is None


def test_s55_without_synic_its_calls_are_denied_or_malformed(boot_agent: BootAgent) -> None:
    """ACCESS_DENIED where CPUID is enforced, else INVALID_HYPERCALL_INPUT; neither leaves the kernel."""
    for hv, status in (
        ("relaxed,vpindex,time,enforce-cpuid", HvStatus.ACCESS_DENIED),
        ("relaxed,vpindex,time", HvStatus.INVALID_HYPERCALL_INPUT),
    ):
        guest = boot_agent(hv=hv)
        guest.enlighten()
        for control in (POST, SIGNAL_FAST):
            assert guest[0].hypercall(control, SCRATCH) == status, f"{hv}: {control:#x}"
        assert guest.hypercall_exit not in guest.machine.platform.threads[0].exit_counts
        guest.close()
