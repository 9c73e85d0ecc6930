"""The Hyper-V interface in user space under a real guest, on any KVM: MSRs, hypercall page, interrupts, time.

What both SynICs share is tested in tests/synic; HVKVM_SYNIC=user runs that on this one.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import unpack

import pytest
from guest_agent import (
    ABI,
    DRAIN,
    EOM_PENDING,
    GP_FAULT,
    HYPERCALL_PAGE,
    NO_EOI,
    SCRATCH,
    SINT_VECTOR,
    UD_FAULT,
)
from guest_machine import MEMORY, Guest

from hvkvm.abi import tlfs
from hvkvm.abi.board import HYPERCALL_PORT
from hvkvm.abi.kvm import KVM_EXIT_HYPERV
from hvkvm.abi.tlfs import HvStatus

pytestmark = [pytest.mark.kvm, pytest.mark.user_synic]

BootAgent = Callable[..., Guest]
SINT = 2
MASKED, AUTO_EOI, POLLING = 1 << 16, 1 << 17, 1 << 18
CODE = b"\xf3\x0f\x1e\xfa\xe7" + bytes((HYPERCALL_PORT, 0xC3))
MS = 10_000


@pytest.fixture
def boot(boot_agent: BootAgent) -> BootAgent:
    return lambda **config: boot_agent(**{"synic": "user", "hv": "passthrough", **config})


@pytest.fixture
def guest(boot: BootAgent) -> Guest:
    return boot()


def faults(guest: Guest, msr: int, *value: int) -> bool:
    fault = guest[0].do("WRMSR" if value else "RDMSR", msr, *value).fault
    assert fault in (None, GP_FAULT)
    return fault is not None


def test_kvm_sees_nothing_of_it(guest: Guest) -> None:
    """No exit of KVM's own Hyper-V code, whether this kernel has one or not."""
    guest.enlighten()
    guest[0].synic_on(simp=SCRATCH, siefp=SCRATCH + 0x1000, sints={SINT: DRAIN})
    assert guest[0].hypercall(0x5D | 1 << 16, 0x77) == HvStatus.INVALID_CONNECTION_ID
    assert KVM_EXIT_HYPERV not in guest.machine.platform.threads[0].exit_counts
    assert guest.machine.hyperv.offered.synic == "user"
    assert "avic" in guest.machine.hyperv.offered.features, "AutoEOI is declared deprecated"


def test_registers_that_are_not_there_fault(guest: Guest) -> None:
    for msr in (0x40000004, 0x40000070, tlfs.HV_X64_MSR_GUEST_IDLE, 0x400000F1, 0x400001FF):
        assert faults(guest, msr), f"reading {msr:#x}"
        assert faults(guest, msr, 0), f"writing {msr:#x}"
    for msr in (tlfs.HV_X64_MSR_VP_INDEX, tlfs.HV_X64_MSR_SVERSION, tlfs.HV_X64_MSR_TIME_REF_COUNT):
        assert faults(guest, msr, 1), f"writing {msr:#x}"
        assert not faults(guest, msr)
    assert not faults(guest, tlfs.HV_X64_MSR_EOM)


def test_registers_that_only_remember(guest: Guest) -> None:
    """As in KVM: TSC emulation status takes only 0 from a guest, TSC invariant control never goes back."""
    msr, value = tlfs.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 0x1_00EE
    assert not faults(guest, msr, value)
    assert guest[0].rdmsr(msr) == value
    assert faults(guest, tlfs.HV_X64_MSR_TSC_EMULATION_STATUS, 1)
    assert not faults(guest, tlfs.HV_X64_MSR_TSC_EMULATION_STATUS, 0)
    for value, wrong in ((2, True), (0, False), (1, False), (1, False), (0, True)):
        assert faults(guest, tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, value) == wrong
    assert guest[0].rdmsr(tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL) == 1


def test_sint_vectors_below_16_fault_unless_silent(guest: Guest) -> None:
    msr = tlfs.HV_X64_MSR_SINT0 + SINT
    assert guest[0].rdmsr(msr) == MASKED
    assert faults(guest, msr, 15)
    assert guest[0].rdmsr(msr) == MASKED
    for value in (15 | MASKED, POLLING, 16):
        assert not faults(guest, msr, value)
        assert guest[0].rdmsr(msr) == value


def test_without_synic_its_registers_are_not_there(boot: BootAgent) -> None:
    guest = boot(hv="relaxed,vpindex,time")
    assert guest.machine.partition is None
    for msr in (tlfs.HV_X64_MSR_SCONTROL, tlfs.HV_X64_MSR_EOM, tlfs.HV_X64_MSR_STIMER0_CONFIG):
        assert faults(guest, msr)
    guest.enlighten()
    assert guest[0].hypercall(0x5C) == HvStatus.INVALID_HYPERCALL_CODE


def test_hypercall_page_is_an_overlay(guest: Guest) -> None:
    memory, cpu = guest.machine.memory, guest[0]
    memory.write(HYPERCALL_PAGE, b"the RAM below")
    cpu.wrmsr(tlfs.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 1)
    assert cpu.rdmsr(tlfs.HV_X64_MSR_HYPERCALL) == 0, "no page without a guest OS id"
    guest.enlighten()
    assert memory.read(HYPERCALL_PAGE, len(CODE)) == CODE
    cpu.wrmsr(tlfs.HV_X64_MSR_GUEST_OS_ID, 0x8100 << 48 | 7)
    assert cpu.rdmsr(tlfs.HV_X64_MSR_HYPERCALL) == HYPERCALL_PAGE | 1, "another id, but one"
    memory.write(HYPERCALL_PAGE, b"scribbled")
    cpu.wrmsr(tlfs.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 1)
    assert memory.read(HYPERCALL_PAGE, len(CODE)) == CODE
    cpu.wrmsr(tlfs.HV_X64_MSR_GUEST_OS_ID, 0)
    assert cpu.rdmsr(tlfs.HV_X64_MSR_HYPERCALL) == HYPERCALL_PAGE
    assert memory.read(HYPERCALL_PAGE, 13) == b"the RAM below"


def test_a_refused_address_leaves_the_page_where_it_was(guest: Guest) -> None:
    guest.enlighten()
    nowhere = 1 << 63 | 1
    assert faults(guest, tlfs.HV_X64_MSR_HYPERCALL, nowhere)
    assert guest[0].rdmsr(tlfs.HV_X64_MSR_HYPERCALL) == HYPERCALL_PAGE | 1
    assert guest[0].hypercall(0x5D | 1 << 16, 0x77) == HvStatus.INVALID_CONNECTION_ID
    guest.machine.memory.write(SCRATCH, b"RAM")
    guest[0].wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH | 1)
    assert faults(guest, tlfs.HV_X64_MSR_REFERENCE_TSC, nowhere)
    assert guest[0].rdmsr(tlfs.HV_X64_MSR_REFERENCE_TSC) == SCRATCH | 1
    assert guest.machine.memory.read(SCRATCH, 3) != b"RAM"


def test_a_locked_hypercall_page_stays(guest: Guest) -> None:
    guest.enlighten()
    cpu = guest[0]
    cpu.wrmsr(tlfs.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 3)
    cpu.wrmsr(tlfs.HV_X64_MSR_HYPERCALL, 0)
    assert cpu.rdmsr(tlfs.HV_X64_MSR_HYPERCALL) == HYPERCALL_PAGE | 3
    assert cpu.hypercall(0x5D | 1 << 16, 0x77) == HvStatus.INVALID_CONNECTION_ID


def test_code_copied_out_of_the_page_is_no_hypercall(guest: Guest) -> None:
    """The port answers the page alone: from a copy, RAX comes back as it went in."""
    guest.enlighten()
    guest.machine.memory.write(HYPERCALL_PAGE, CODE)
    guest[0].wrmsr(tlfs.HV_X64_MSR_HYPERCALL, SCRATCH)  # off
    guest.machine.memory.write(HYPERCALL_PAGE, CODE)
    seen: list[int] = []
    assert guest.in_user_space is not None
    page = guest.in_user_space.hypercall_page
    page.call = lambda control, param: seen.append(control) or 0
    guest[0].do("HYPERCALL", 0x5C, 0)
    guest[0].wrmsr(tlfs.HV_X64_MSR_HYPERCALL, SCRATCH | 1)  # on, somewhere else
    guest[0].do("HYPERCALL", 0x5C, 0)
    assert seen == []
    guest[0].wrmsr(tlfs.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 1)
    guest[0].do("HYPERCALL", 0x5C, 0)
    assert seen == [0x5C]


def cpl_3_faults(guest: Guest) -> set[int]:
    """What hypercalls at CPL 3 with IOPL 3 end with; none is served, and the guest goes on."""
    guest.enlighten()
    cpu = guest[0]
    seen: list[int] = []
    assert guest.in_user_space is not None
    guest.in_user_space.hypercall_page.call = lambda control, param: seen.append(control) or 0
    faults = set()
    for _ in range(5):
        reply = cpu.do("USER_CALL", 0x5C, SCRATCH, HYPERCALL_PAGE)
        assert reply.fault_rip == HYPERCALL_PAGE + CODE.index(0xE7), "at the OUT"
        assert reply.fault is not None
        faults.add(reply.fault)
        assert cpu.do("HYPERCALL", 0x5D, 0).fault is None
    assert seen == [0x5D] * 5
    return faults


def test_a_hypercall_at_cpl_3_faults(guest: Guest) -> None:
    """S55. Not every KVM knows IOPL: kvm_pvm lets no program use ports, which is #GP."""
    assert cpl_3_faults(guest) in ({UD_FAULT}, {GP_FAULT})


@pytest.mark.hyperv
def test_a_hypercall_at_cpl_3_is_an_undefined_instruction(guest: Guest) -> None:
    """S55, where programs may use ports: #UD, while a port without device is no fault."""
    assert cpl_3_faults(guest) == {UD_FAULT}
    guest.machine.memory.write(SCRATCH, CODE)
    reply = guest[0].do("USER_CALL", 0x5C, 0, SCRATCH)
    assert (reply.fault, reply.results[0]) == (GP_FAULT, 0), "the HLT behind the call"
    assert reply.fault_rip > SCRATCH + len(CODE) or reply.fault_rip < SCRATCH


@pytest.mark.parametrize("idle", ["HLT", "SPIN"])
@pytest.mark.parametrize("bits", [0, AUTO_EOI], ids=["eoi", "auto-eoi"])
def test_every_pulse_interrupts(boot: BootAgent, idle: str, bits: int) -> None:
    """With AutoEOI the handler writes no EOI, and the next interrupt comes all the same."""
    guest = boot(cpus=2)
    for index in (0, 1):
        cpu = guest[index]
        cpu.synic_on(sints={SINT: NO_EOI if bits else 0})
        assert cpu.rdmsr(tlfs.HV_X64_MSR_SINT0 + SINT) == SINT_VECTOR + SINT | bits
        cpu.idle(idle)
        route = guest.partition.open_route(index, SINT)
        for count in range(1, 21):
            assert route.pulse() == 0
            guest.until(lambda count=count, cpu=cpu: cpu.irqs(SINT) == count, f"interrupt {count}")
        guest.settle(index)
        assert cpu.irqs(SINT) == 20
        route.close()


def test_auto_eoi_waits_for_interrupts_to_be_enabled(guest: Guest) -> None:
    cpu = guest[0]
    cpu.synic_on(sints={SINT: NO_EOI})
    cpu.idle("DEAF")
    cpu.do("NOP")
    cpu.await_round()  # behind its answer it hears for some instructions yet
    route = guest.partition.open_route(0, SINT)
    assert (route.pulse(), route.pulse()) == (0, 0)
    rounds = cpu.counter("HEARTBEAT")
    guest.until(lambda: cpu.counter("HEARTBEAT") > rounds + 1000, "the guest goes on")
    assert cpu.irqs(SINT) == 0
    cpu.idle("SPIN")
    guest.until(lambda: cpu.irqs(SINT) == 1, "the interrupt comes")
    guest.settle()
    assert cpu.irqs(SINT) == 1, "raised twice before it was taken, taken once"


@pytest.mark.parametrize("bits", [MASKED, POLLING])
def test_a_silent_sint_takes_messages_without_interrupt(guest: Guest, bits: int) -> None:
    from guest_machine import Poster

    cpu = guest[0]
    cpu.synic_on(simp=SCRATCH)
    cpu.wrmsr(tlfs.HV_X64_MSR_SINT0 + SINT, SINT_VECTOR + SINT | bits)
    poster = Poster(guest, 0, SINT)
    assert poster.post(b"quietly") == 0
    assert poster.await_completions(1) == [0]
    guest.settle()
    assert (cpu.irqs(SINT), guest.machine.memory.read(SCRATCH + 256 * SINT + 16, 7)) == (0, b"quietly")


def test_reference_counter_and_frequencies(guest: Guest) -> None:
    cpu = guest[0]
    values = [cpu.rdmsr(tlfs.HV_X64_MSR_TIME_REF_COUNT) for _ in range(5)]
    assert values == sorted(values)
    assert values[0] < values[-1]
    # On its thread: KVM holds the vCPU for as long as the guest halts.
    khz = guest.machine.platform.threads[0].call(guest.machine.platform.vcpus[0].tsc_khz, timeout=30)
    assert cpu.rdmsr(tlfs.HV_X64_MSR_TSC_FREQUENCY) == khz * 1000
    assert cpu.rdmsr(tlfs.HV_X64_MSR_APIC_FREQUENCY) == 1_000_000_000
    runtime = cpu.rdmsr(tlfs.HV_X64_MSR_VP_RUNTIME)
    cpu.idle("SPIN")
    guest.until(lambda: cpu.rdmsr(tlfs.HV_X64_MSR_VP_RUNTIME) > runtime, "run time grows")


def test_the_invariant_tsc_shows_once_the_guest_asked_for_it(guest: Guest) -> None:
    cpu = guest[0]
    if "tsc-invariant" not in guest.machine.hyperv.offered.features:
        assert not cpu.do("CPUID", 0x40000003, 0).results[0] & tlfs.HV_ACCESS_TSC_INVARIANT
        return
    assert cpu.rdmsr(tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL) == 0
    cpu.wrmsr(tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1)
    assert cpu.do("CPUID", 0x80000007, 0).results[3] & 1 << 8
    assert faults(guest, tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 2)
    assert faults(guest, tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0), "what was promised stays"


def test_reference_tsc_page_agrees_with_the_counter(guest: Guest) -> None:
    """Computed from the guest's TSC between two readings of the counter, it lies between them."""
    from hvkvm.hyperv.usermode.clock import host_counts_by_tsc

    cpu, memory, vcpu = guest[0], guest.machine.memory, guest.machine.platform.vcpus[0]
    assert guest.in_user_space is not None
    clock = guest.in_user_space.clock
    cpu.wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH | 1)
    sequence, scale, offset = unpack("<I4xQq", memory.read(SCRATCH, 24))
    if not host_counts_by_tsc():
        assert sequence == 0
        return
    assert sequence not in (0, 0xFFFFFFFF)

    def between() -> tuple[int, int, int]:
        before = clock.now()
        tsc = vcpu.msrs((0x10,))[0x10]
        return before, (tsc * scale >> 64) + offset, clock.now()

    slack = guest.in_user_space.tsc_page.uncertain + 1  # and the clock's own unit
    for _ in range(20):
        before, page, after = guest.machine.platform.threads[0].call(between, timeout=10)
        assert before - slack <= page <= after + slack
    cpu.wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH)
    assert memory.read(SCRATCH, 24) == bytes(24), "the RAM below is back"


def test_timers_of_every_kind(boot: BootAgent) -> None:
    guest = boot(cpus=2)
    for index in (0, 1):
        cpu = guest[index]
        cpu.synic_on(simp=SCRATCH + index * 0x1000, sints={SINT: DRAIN | EOM_PENDING})
        for timer in range(tlfs.HV_STIMER_COUNT):
            config = tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * timer
            cpu.wrmsr(config, 8 | 2 | SINT << 16)  # periodic, auto-enable
            cpu.wrmsr(config + 1, 2 * MS)
        guest.until(lambda cpu=cpu: cpu.counter("TIMERS", SINT) >= 20, "messages come")
        for timer in range(tlfs.HV_STIMER_COUNT):
            cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_COUNT + 2 * timer, 0)
        cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_CONFIG, 8 | 2 | 1 << 12 | 0x50 << 4)
        cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_COUNT, MS)
        guest.until(lambda cpu=cpu: cpu.counter("DIRECT") >= 10, "direct interrupts come")
        cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_CONFIG, 0)
        guest.settle()
        ticks = cpu.counter("DIRECT")
        cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_CONFIG, 0)
        assert cpu.counter("DIRECT") == ticks


def test_assist_page_lies_in_ram(guest: Guest) -> None:
    guest.machine.memory.write_u32(SCRATCH, 0xFFFFFFFF)
    guest[0].wrmsr(tlfs.HV_X64_MSR_VP_ASSIST_PAGE, SCRATCH | 1)
    assert guest[0].rdmsr(tlfs.HV_X64_MSR_VP_ASSIST_PAGE) == SCRATCH | 1
    assert guest.machine.memory.read_u32(SCRATCH) == 0
    assert faults(guest, tlfs.HV_X64_MSR_VP_ASSIST_PAGE, MEMORY + 0x1000 | 1)


def test_crash_report_ends_the_run(guest: Guest) -> None:
    cpu = guest[0]
    assert cpu.rdmsr(tlfs.HV_X64_MSR_CRASH_CTL) >> 62 == 3
    guest.machine.memory.write(SCRATCH, b"out of cheese")
    cpu.wrmsr(tlfs.HV_X64_MSR_CRASH_P0 + 3, SCRATCH)
    cpu.wrmsr(tlfs.HV_X64_MSR_CRASH_P4, 13)
    assert cpu.rdmsr(tlfs.HV_X64_MSR_CRASH_P4) == 13
    cpu.begin("WRMSR", tlfs.HV_X64_MSR_CRASH_CTL, 3 << 62)
    outcome = guest.machine.wait(30)
    assert outcome is not None
    assert (outcome.status, outcome.detail) == (255, "out of cheese")


def test_reset_msr_resets_everything(guest: Guest) -> None:
    cpu = guest[0]
    guest.enlighten()
    cpu.synic_on(simp=SCRATCH, siefp=SCRATCH + 0x1000, sints={SINT: DRAIN})
    cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_CONFIG, 8 | 2 | SINT << 16)
    cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_COUNT, MS)
    cpu.wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH + 0x2000 | 1)
    cpu.wrmsr(tlfs.HV_X64_MSR_VP_ASSIST_PAGE, SCRATCH + 0x3000 | 1)
    for msr in (tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, tlfs.HV_X64_MSR_CRASH_P0, tlfs.HV_X64_MSR_CRASH_P4):
        cpu.wrmsr(msr, 1)
    boots = guest.machine.memory.read_u64(ABI["HEADER"] + ABI["HEADER_BOOTS"])
    cpu.begin("WRMSR", tlfs.HV_X64_MSR_RESET, 1)
    guest.until(
        lambda: (
            guest.machine.memory.read_u64(ABI["HEADER"] + ABI["HEADER_BOOTS"]) == boots + 1
            and guest.machine.resets == 1
        ),
        "the guest boots again",
    )
    guest.agent.await_online()
    for msr in (
        tlfs.HV_X64_MSR_GUEST_OS_ID,
        tlfs.HV_X64_MSR_HYPERCALL,
        tlfs.HV_X64_MSR_SIMP,
        tlfs.HV_X64_MSR_SIEFP,
        tlfs.HV_X64_MSR_SCONTROL,
        tlfs.HV_X64_MSR_REFERENCE_TSC,
        tlfs.HV_X64_MSR_STIMER0_CONFIG,
        tlfs.HV_X64_MSR_STIMER0_COUNT,
        tlfs.HV_X64_MSR_VP_ASSIST_PAGE,
        tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL,
        tlfs.HV_X64_MSR_CRASH_P0,
        tlfs.HV_X64_MSR_CRASH_P4,
    ):
        assert cpu.rdmsr(msr) == 0, f"{msr:#x}"
    assert guest.machine.memory.read(HYPERCALL_PAGE, len(CODE)) != CODE, "the RAM below is back"
    assert cpu.rdmsr(tlfs.HV_X64_MSR_SINT0 + SINT) == MASKED
