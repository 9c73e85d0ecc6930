"""The same guest, the same questions, to our machine and to QEMU on the same KVM.

What a guest can see must not depend on the VMM. Where QEMU is known to be wrong
the question is not asked here, but in the other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import pack

import guest_qemu
import pytest
from guest_agent import CHECK, DRAIN, EOM_PENDING, EVENTS, GP_FAULT, SCRATCH
from guest_machine import Guest

from hvkvm.abi.tlfs import (
    HV_X64_MSR_EOM,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SVERSION,
    HV_X64_MSR_VP_INDEX,
    HvStatus,
)

pytestmark = pytest.mark.hyperv

AnyGuest = Guest | guest_qemu.QemuGuest
TESTDEV = 0x3000
MSG_CONN_CREATE, MSG_CONN_DESTROY, EVT_CONN_CREATE, EVT_CONN_DESTROY = 4, 5, 6, 7
MSG_SINT, EVT_SINT = 8, 9
POST, SIGNAL, FAST = 0x5C, 0x5D, 1 << 16
INPUT = SCRATCH + 0x8000
PAYLOAD_SIZE = 232  # a message of 240 bytes, legal as it is, ends QEMU's testdev


@pytest.fixture(params=["hvkvm", pytest.param("qemu", marks=pytest.mark.kernel_synic)])
def guest(request: pytest.FixtureRequest, boot_agent: Callable[..., Guest]) -> Iterator[AnyGuest]:
    """Two vCPUs, all enlightenments, hyperv-testdev."""
    if request.param == "hvkvm":
        ours = boot_agent(cpus=2, devices=("hyperv-testdev",))
        ours.enlighten()
        yield ours
        return
    if guest_qemu.missing() is not None:
        pytest.skip(f"needs QEMU: {guest_qemu.missing()}")
    theirs = guest_qemu.QemuGuest(
        2, "-accel", "kvm", "-cpu", "host,hv-passthrough", "-device", "hyperv-testdev"
    )
    try:
        theirs.start()
        theirs.enlighten()
        yield theirs
    finally:
        theirs.close()


def request_of_testdev(guest: AnyGuest, command: int, conn: int, vp: int = 0, sint: int = 0) -> None:
    guest[0].do("OUT", TESTDEV, 4, conn << 24 | command << 16 | vp << 8 | sint)


def post_input(conn: int, size: int = 0) -> bytes:
    return pack("<IIII240s", conn, 0, 1, size, b"")


def set_up_echoes(guest: AnyGuest) -> None:
    """A message and an event connection for each vCPU, both pages on."""
    for cpu in guest.agent.cpus:
        page = SCRATCH + 0x2000 * cpu.index
        sints = {MSG_SINT: DRAIN | EOM_PENDING | CHECK, EVT_SINT: EVENTS}
        cpu.synic_on(simp=page, siefp=page + 0x1000, sints=sints)
        request_of_testdev(guest, MSG_CONN_CREATE, 0x10 + cpu.index, cpu.index, MSG_SINT)
        request_of_testdev(guest, EVT_CONN_CREATE, 0x20 + cpu.index, cpu.index, EVT_SINT)


def test_echoes_come_back_in_order(guest: AnyGuest) -> None:
    """Each vCPU posts 50 messages that come back in order, and signals 50 events; halting and spinning."""
    set_up_echoes(guest)
    for operation, base, sint in (("POST_ECHO", 0x10, MSG_SINT), ("SIGNAL_ECHO", 0x20, EVT_SINT)):
        for spin in (0, 1):
            for cpu in guest.agent.cpus:
                cpu.begin(operation, base + cpu.index, 50, sint, spin, PAYLOAD_SIZE)
            for cpu in guest.agent.cpus:
                reply = cpu.finish()
                assert reply.value == 50, f"{operation} on vcpu{cpu.index}: {reply}"
                cpu.set_next(sint, 0)
    for cpu in guest.agent.cpus:
        assert cpu.counter("MESSAGES", MSG_SINT) == 100
        assert cpu.counter("EVENTS", EVT_SINT) == 100
        assert cpu.seen_flags(EVT_SINT) == {0x20 + cpu.index}
        cpu.expect_clean()


def test_post_statuses(guest: AnyGuest) -> None:
    """S44-S46, with the testdev's connection as the one that exists."""
    set_up_echoes(guest)
    cpu, memory = guest[0], guest.memory if isinstance(guest, guest_qemu.QemuGuest) else guest.machine.memory

    def post(data: bytes, gpa: int = INPUT, control: int = POST) -> int:
        memory.write(gpa, data)
        return cpu.hypercall(control, gpa) & 0xFFFF

    assert post(post_input(0x99)) == HvStatus.INVALID_CONNECTION_ID
    assert post(post_input(0x10), control=POST | FAST) == HvStatus.INVALID_HYPERCALL_CODE
    assert cpu.hypercall(POST, INPUT + 1) == HvStatus.INVALID_ALIGNMENT
    assert cpu.hypercall(POST, INPUT + 2) == HvStatus.INVALID_ALIGNMENT
    assert post(post_input(0x10, size=241)) == HvStatus.INVALID_HYPERCALL_INPUT
    assert post(post_input(0x99), gpa=INPUT + 4) == HvStatus.INVALID_CONNECTION_ID
    assert post(post_input(0xAB00_0099)) == HvStatus.INVALID_CONNECTION_ID
    assert post(post_input(0x10), control=POST | 1 << 17) == HvStatus.INVALID_HYPERCALL_INPUT
    assert cpu.hypercall(0x4321) & 0xFFFF == HvStatus.INVALID_HYPERCALL_CODE


def test_signal_statuses(guest: AnyGuest) -> None:
    """S51, S53 by fast calls; after its removal the connection is unknown."""
    set_up_echoes(guest)
    cpu = guest[0]

    def signal(value: int) -> int:
        return cpu.hypercall(SIGNAL | FAST, value) & 0xFFFF

    assert signal(0x99) == HvStatus.INVALID_CONNECTION_ID
    assert signal(0x20 | 1 << 32) == HvStatus.INVALID_PORT_ID
    assert signal(0x20 | 1 << 24) == HvStatus.INVALID_HYPERCALL_INPUT
    assert signal(0x20 | 1 << 48) == HvStatus.INVALID_HYPERCALL_INPUT
    assert signal(0x20) == HvStatus.SUCCESS
    guest.agent.until(lambda: cpu.counter("EVENTS", EVT_SINT) == 1, "the event arrives")
    request_of_testdev(guest, EVT_CONN_DESTROY, 0x20)
    assert signal(0x20) == HvStatus.INVALID_CONNECTION_ID
    request_of_testdev(guest, MSG_CONN_DESTROY, 0x10)


def test_pages_keep_their_contents(guest: AnyGuest) -> None:
    """S4: by what the guest reads: zero at first, contents follow the page, RAM reappears."""
    cpu = guest[0]
    first, second = SCRATCH + 0x10000, SCRATCH + 0x20000
    for page in (first, second):
        cpu.do("WRITE", page, 8, 0x1111)
    cpu.simp(first)
    assert cpu.do("READ", first, 8).value == 0
    cpu.do("WRITE", first, 8, 0x2222)
    cpu.simp(second)
    assert cpu.do("READ", first, 8).value == 0x1111
    assert cpu.do("READ", second, 8).value == 0x2222
    cpu.simp(None)
    assert cpu.do("READ", second, 8).value == 0x1111
    cpu.simp(first)
    assert cpu.do("READ", first, 8).value == 0x2222


def test_power_on_values_and_read_only_registers(guest: AnyGuest) -> None:
    """The SynIC's MSRs as a guest finds them."""
    for cpu in guest.agent.cpus:
        values = {HV_X64_MSR_SCONTROL: 0, HV_X64_MSR_SVERSION: 1, HV_X64_MSR_SIEFP: 0, HV_X64_MSR_SIMP: 0}
        values |= {HV_X64_MSR_EOM: 0, HV_X64_MSR_VP_INDEX: cpu.index}
        values |= {HV_X64_MSR_SINT0 + sint: 1 << 16 for sint in range(16)}
        assert {msr: cpu.rdmsr(msr) for msr in values} == values
        for msr, value in ((HV_X64_MSR_SVERSION, 1), (HV_X64_MSR_SINT0, 15), (HV_X64_MSR_VP_INDEX, 3)):
            assert cpu.do("WRMSR", msr, value).fault == GP_FAULT
