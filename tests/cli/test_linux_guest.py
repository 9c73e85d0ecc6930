"""An unmodified distribution kernel under enlightenments, by the real command on KVM with Hyper-V."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest
from guest_artifacts import artifact
from running_vm import command_line

from hvkvm.hyperv.usermode.clock import host_counts_by_tsc

pytestmark = pytest.mark.hyperv

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]
Boot = Callable[..., "tuple[subprocess.CompletedProcess[str], dict[str, object]]"]
SECONDS = "600"
LOG = "dmesg | grep -iE 'hyper|vmbus|DMI|PCI|MTRR|clocksource|TLB'"
"""What is looked at: these streams are a serial port's, where each character is an exit."""


def kernel_options() -> tuple[object, ...]:
    return ("--kernel", artifact("HVKVM_GUEST_KERNEL"), "--busybox", artifact("HVKVM_GUEST_BUSYBOX"))


@pytest.fixture
def linux(hvkvm: Hvkvm) -> Boot:
    """linux(*options, append="", command=(...)) boots the kernel; returns the process and its JSON record."""

    def boot(
        *options: object, append: str = "", command: tuple[str, ...] = ()
    ) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
        arguments = [
            "run",
            "--kernel",
            artifact("HVKVM_GUEST_KERNEL"),
            "--busybox",
            artifact("HVKVM_GUEST_BUSYBOX"),
        ]
        # The console takes most of a noisy boot's time, and dmesg has it all.
        arguments += ["--timeout", SECONDS, "--json", "--append", f"quiet {append}", *options]
        result = hvkvm(*arguments, *(("--", *command) if command else ()), timeout=700)
        assert result.stderr, result
        record = json.loads(result.stderr.splitlines()[-1])
        return result, record

    return boot


def test_a_command_runs_under_all_enlightenments_and_returns_its_status(linux: Boot) -> None:
    script = f"{LOG}; echo kernel $(uname -r); grep -o hypervisor -m1 /proc/cpuinfo; exit 42"
    result, record = linux(command=("sh", "-c", script))
    assert (result.returncode, record["ending"]) == (42, "command exited"), result
    assert "Hypervisor detected: Microsoft Hyper-V" in result.stdout
    assert "Using hypercall for remote TLB flush" in result.stdout
    assert "DMI: hvkvm Virtual Machine" in result.stdout
    assert "PCI: Using configuration type 1" in result.stdout, "though nobody is there, and so"
    assert "PCI: Fatal" not in result.stdout
    assert "MTRRs disabled" not in result.stdout, "Linux 6.1 does without PAT then"
    if host_counts_by_tsc():
        assert "clocksource hyperv_clocksource_tsc_page" in result.stdout
    version = artifact("HVKVM_GUEST_KERNEL").name.removeprefix("vmlinuz-")
    assert f"kernel {version}" in result.stdout
    for name in ("relaxed", "vpindex", "synic", "stimer", "time", "tlbflush", "ipi", "crash", "frequencies"):
        assert f"hv-{name}" in str(record["features"])


def test_every_cpu_comes_up_and_their_ipis_and_timers_work(linux: Boot) -> None:
    script = "nproc; for i in 1 2 4 8; do taskset $i sleep 0.1 & done; wait; grep HVS: /proc/interrupts"
    result, _record = linux("--cpus", "4", command=("sh", "-c", script))
    assert result.returncode == 0, result
    lines = result.stdout.splitlines()
    assert "4" in lines
    counts = next(line for line in lines if "HVS:" in line).split()[1:5]
    assert all(int(count) > 0 for count in counts), counts


def test_the_kernels_hyperv_driver_finds_no_bus_where_there_is_none(linux: Boot) -> None:
    result, record = linux(
        "--modules-dir", artifact("HVKVM_GUEST_MODULES"), "--module", "hv_vmbus", "--vmbus", "off",
        command=("sh", "-c", LOG),
    )  # fmt: skip
    assert result.returncode == 0, result
    assert "Hypervisor detected: Microsoft Hyper-V" in result.stdout
    # The DSDT names no bus, so the driver sets up no SynIC and posts nothing, which nobody would answer.
    assert "Vmbus version" not in result.stdout
    exits = record["exits"]
    assert isinstance(exits, dict)
    assert "KVM_EXIT_HYPERV" not in exits


def test_a_panic_is_255_with_the_guests_own_words(linux: Boot) -> None:
    result, record = linux(command=("sh", "-c", "echo c > /proc/sysrq-trigger; sleep 100"))
    assert (result.returncode, record["ending"]) == (255, "guest panic"), result
    assert "sysrq triggered crash" in str(record["detail"])


def test_a_panic_is_told_from_its_form_where_no_register_tells_of_it(linux: Boot) -> None:
    script = "echo c > /proc/sysrq-trigger; sleep 100"
    result, record = linux("--hv", "none", command=("sh", "-c", script))
    assert (result.returncode, record["ending"]) == (255, "guest panic"), result
    assert record["detail"] == "Kernel panic - not syncing: sysrq triggered crash"


@pytest.mark.parametrize(
    ("append", "ending"),
    [("reboot=bios", "reset"), ("reboot=triple", "triple fault"), ("reboot=kbd", "reset")],
)
def test_ways_to_reboot_behind_words_about_a_panic(linux: Boot, append: str, ending: str) -> None:
    words = "(dmesg | tail; echo 'Kernel panic - not syncing: in a log') >/dev/console; dmesg -n 1"
    command = ("sh", "-c", f"{words}; exec reboot -f")
    result, record = linux("--no-reboot", append=append, command=command)
    assert record["ending"] == ending, result
    assert ("reboot=triple has Linux reset so" in str(record["detail"])) == (append == "reboot=triple")


def test_a_reboot_starts_the_guest_again() -> None:
    """It waits for an order each time: else it were off to another life before it is ended in the third."""
    options = (*kernel_options(), "--append", "quiet", "--json", "--timeout", SECONDS, "--console")
    with subprocess.Popen(
        command_line("run", *options, "--", "sh", "-c", "read -r order && exec reboot -f"),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        starts = 0
        for line in process.stderr:
            if line.startswith("hvkvm: init"):
                starts += 1
                if starts == 3:
                    process.terminate()
                    break
                process.stdin.write("again\n")
                process.stdin.flush()
        errors = process.stderr.read()  # with its input open: the command ends with that, too
    record = json.loads(errors.splitlines()[-1])
    # The signal ends the command, or the run where that has not begun yet.
    assert record["ending"] in ("command exited", "quit"), errors
    assert (process.returncode, record["resets"]) == (143, 2), errors


def test_no_reboot_ends_the_run(linux: Boot) -> None:
    result, record = linux("--no-reboot", command=("reboot", "-f"))
    assert (result.returncode, record["ending"]) == (0, "reset"), result


def test_a_few_enlightenments_only(linux: Boot) -> None:
    chosen = "relaxed,vpindex,time,synic,stimer"
    result, record = linux("--hv", chosen, command=("sh", "-c", LOG))
    assert result.returncode == 0, result
    assert record["features"] == "hv-relaxed,hv-vpindex,hv-time,hv-synic,hv-stimer"
    assert "Hypervisor detected: Microsoft Hyper-V" in result.stdout
    assert "remote TLB flush" not in result.stdout


def test_no_enlightenments_at_all(linux: Boot) -> None:
    result, record = linux("--hv", "none", command=("sh", "-c", LOG))
    assert result.returncode == 0, result
    assert record["features"] == "none"
    assert "Hypervisor detected: KVM" in result.stdout
