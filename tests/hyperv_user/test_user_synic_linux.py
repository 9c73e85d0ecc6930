"""The SynIC in user space on a KVM that has one of its own, which must stay asleep: agent and stock Linux."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

import pytest
from guest_agent import DRAIN, HYPERCALL_PAGE, SCRATCH
from guest_artifacts import artifact
from guest_machine import Guest
from linux_guest import LinuxGuest, linux_guest
from running_vm import command_line

from hvkvm.abi import tlfs
from hvkvm.abi.kvm import KVM_EXIT_HYPERV
from hvkvm.machine.hyperv_user import UserModeHyperv
from hvkvm.machine.machine import Machine

pytestmark = [pytest.mark.hyperv, pytest.mark.user_synic, pytest.mark.timeout(1800)]

BootAgent = Callable[..., Guest]
SINT = 2
AUTO_ENABLE_PERIODIC = 8 | 2
KVM_ENOSYS = 1000
KVMS_OWN = (
    tlfs.HV_X64_MSR_GUEST_OS_ID,
    tlfs.HV_X64_MSR_HYPERCALL,
    tlfs.HV_X64_MSR_REFERENCE_TSC,
    tlfs.HV_X64_MSR_VP_ASSIST_PAGE,
    tlfs.HV_X64_MSR_SCONTROL,
    tlfs.HV_X64_MSR_SIEFP,
    tlfs.HV_X64_MSR_SIMP,
    tlfs.HV_X64_MSR_SINT0 + SINT,
    tlfs.HV_X64_MSR_STIMER0_CONFIG,
    tlfs.HV_X64_MSR_STIMER0_COUNT,
    tlfs.HV_X64_MSR_CRASH_P0,
)


def kvms_own(machine: Machine) -> list[dict[int, int]]:
    """What KVM's own Hyper-V code holds in its registers, for every vCPU."""
    running = machine.lifecycle.started_at is not None
    return [
        thread.call(thread.vcpu.msrs, KVMS_OWN, timeout=60) if running else thread.vcpu.msrs(KVMS_OWN)
        for thread in machine.platform.threads
    ]


def test_kvms_own_registers_stay_at_power_on() -> None:
    """Every register that the guest writes is ours: the host would see the values in KVM, were they its."""
    guest = Guest(synic="user", hv="passthrough")
    try:
        untouched = kvms_own(guest.machine)
        guest.start()
        guest.enlighten()
        cpu = guest[0]
        cpu.synic_on(simp=SCRATCH, siefp=SCRATCH + 0x1000, sints={SINT: DRAIN})
        cpu.wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH + 0x2000 | 1)
        cpu.wrmsr(tlfs.HV_X64_MSR_VP_ASSIST_PAGE, SCRATCH + 0x3000 | 1)
        cpu.wrmsr(tlfs.HV_X64_MSR_CRASH_P0, 0x77)
        cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_CONFIG, AUTO_ENABLE_PERIODIC | SINT << 16)
        cpu.wrmsr(tlfs.HV_X64_MSR_STIMER0_COUNT, 100_000)
        guest.until(lambda: cpu.counter("TIMERS", SINT) >= 3, "our timer's messages come")
        seen = {msr: cpu.rdmsr(msr) for msr in KVMS_OWN}
        (hidden,) = kvms_own(guest.machine)
        assert hidden == untouched[0]
        for msr in KVMS_OWN:
            assert seen[msr] != hidden[msr], f"{msr:#x}"
        assert KVM_EXIT_HYPERV not in guest.machine.platform.threads[0].exit_counts
    finally:
        guest.close()


def test_vmcall_is_none_of_hypervs(boot_agent: BootAgent) -> None:
    """KVM takes it for a call of its own ABI, because no guest OS id ever reached it."""
    guest = boot_agent(synic="user", hv="passthrough")
    guest[0].wrmsr(tlfs.HV_X64_MSR_GUEST_OS_ID, 0x8100_0000_0000_0000)
    for code in (b"\x0f\x01\xd9\xc3", b"\x0f\x01\xc1\xc3"):
        guest.machine.memory.write(HYPERCALL_PAGE, code)
        assert guest[0].hypercall(0x5C, SCRATCH) == (1 << 64) - KVM_ENOSYS
    assert KVM_EXIT_HYPERV not in guest.machine.platform.threads[0].exit_counts


# Not the whole log: each character on the console is an exit, and while the serial port's interrupt handler
# sends what waits, nothing else runs on that CPU: on a busy host for so long that Linux complains of it.
SCRIPT = """
dmesg -r | grep -E '^<[0-4]>|Hypervisor detected'
echo current $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
grep -h '' /sys/devices/system/clockevents/clockevent*/current_device
sleep 1
grep -E 'HVS:|LOC:|HYP:' /proc/interrupts
for d in /sys/bus/vmbus/devices/*; do echo bound $(readlink $d/driver); done
echo looked
read line
exit 7
"""
COMPLAINT = re.compile(r"^<[0-4]>.*", re.MULTILINE)
EXPECTED = re.compile(
    r"PCI|Speculative Return Stack|amd_pstate|ACPI Error|Unknown kernel command line|interrupt took"
)
"""Lacks of the machine or the CPU, and a host's slowness: nothing of a hypervisor's interface."""


def interrupts(text: str, name: str) -> list[int]:
    """The counts of a row of /proc/interrupts, by CPU; empty when there is none."""
    row = re.search(rf"^ *{name}: +([\d ]+\d) ", text, re.MULTILINE)
    return [int(count) for count in row[1].split()] if row else []


def looked(guest: LinuxGuest) -> str:
    """Run to the end of SCRIPT's looking around; the console."""
    guest.start()
    text = guest.wait_for("looked\n")
    complaints = [line for line in COMPLAINT.findall(text) if not EXPECTED.search(line)]
    assert not complaints
    assert "Hypervisor detected: Microsoft Hyper-V" in text
    assert "current hyperv_clocksource_tsc_page" in text
    return text


@pytest.mark.parametrize(
    ("kernel", "cpus", "hv"),
    [("stable", 1, "host-model"), ("stable", 2, "host-model,stimer"), ("newer", 2, "passthrough")],
)
def test_linux(kernel: str, cpus: int, hv: str) -> None:
    """Its clock, timers and bus work; KVM's own Hyper-V code sees none of it."""
    with linux_guest(SCRIPT, synic="user", kernel=kernel, cpus=cpus, hv=hv) as guest:
        machine = guest.machine
        untouched = kvms_own(machine)
        text = looked(guest)
        timers, local = interrupts(text, "HVS"), interrupts(text, "LOC")
        if hv == "host-model":
            # KVM's own APIC timer: next to nothing is left to exit.
            assert not any(timers)
            assert all(local)
            assert "lapic" in text
            assert machine.exit_counts()["KVM_EXIT_X86_WRMSR"] < 100
        elif hv == "passthrough":
            assert all(timers), "timers in direct mode"
        else:
            assert "Hyper-V clockevent" in text
            assert all(interrupts(text, "HYP")), "timers' messages"
        assert len(re.findall("^bound .*/hv_", text, re.MULTILINE)) >= 3
        guest.wait_until(lambda: guest.bus.heartbeat.alive, "the heartbeat")
        assert kvms_own(machine) == untouched
        interface = machine.hyperv
        assert isinstance(interface, UserModeHyperv)
        assert interface.registers.synic is not None
        for vp in interface.registers.synic.vps:
            assert vp.simp & 1
            assert vp.scontrol & 1
        counts = machine.exit_counts()
        assert "KVM_EXIT_HYPERV" not in counts
        guest.type("")
        assert guest.finish().status == 7


def test_the_command_runs_a_program_on_it() -> None:
    """`hvkvm run --synic user`, where auto would take KVM's own."""
    options = (
        "--synic", "user", "--kernel", artifact("HVKVM_GUEST_KERNEL"),
        "--busybox", artifact("HVKVM_GUEST_BUSYBOX"), "--append", "quiet", "--json", "--timeout", "600",
    )  # fmt: skip
    result = subprocess.run(
        command_line("run", *options, "--", "sh", "-c", "uname -s; exit 9"),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=700, check=False,
    )  # fmt: skip
    assert result.returncode == 9, result
    assert "Linux" in result.stdout
    record = json.loads(result.stderr.splitlines()[-1])
    assert record["synic"] == "user"
    assert "hv-synic" in record["features"].split(",")
    assert "KVM_EXIT_HYPERV" not in record["exits"]
    assert 0 < record["exits"]["KVM_EXIT_X86_WRMSR"] < 100
