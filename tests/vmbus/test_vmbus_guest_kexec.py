"""Real guests: a kernel that another one started, orderly or by its crash, finds its bus again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from guest_artifacts import artifact
from linux_guest import KERNELS, linux_guest
from linux_programs import ahead, program
from linux_shell import SHELL, Shell
from linux_vmbus import UTILITIES, channel_of, converse, see_no_complaints, version, wait_for_utilities

from hvkvm.boot import initramfs
from hvkvm.machine.outcome import Ending
from hvkvm.vmbus.server import BusState

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800), pytest.mark.usefixtures("each_synic")]
MODULES = ("hv_vmbus", "hv_utils")
CRASH_MEMORY = "192M"
HV = "host-model,-crash"
"""With hv-crash Linux reports the panic before it starts the crash kernel, and for us that ends the run."""

ahead("kexec")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kexecd_kernel_and_then_a_crash_kernel_connect(kernel: str, tmp_path: Path) -> None:
    image, modules = (artifact(name) for name in KERNELS[kernel])
    tools = {"/kexec/kernel": image, "/bin/kexec": program("kexec")}

    def archive(name: str, files: Mapping[str, Path]) -> Path:
        path = tmp_path / name
        busybox = artifact("HVKVM_GUEST_BUSYBOX")
        shell = ("sh", "-c", SHELL)
        path.write_bytes(
            initramfs.build(shell, busybox=busybox, modules=MODULES, kernel_modules_dir=modules, files=files)
        )
        return path

    second = archive("second", tools | {"/kexec/initrd": archive("third", {})})
    files = tools | {"/kexec/initrd": second}
    append = f"quiet crashkernel={CRASH_MEMORY}"
    with linux_guest(
        SHELL, kernel=kernel, files=files, modules=MODULES, append=append, hv=HV, memory=768 << 20, cpus=2
    ) as guest:
        guest.start()
        shell = Shell(guest).ready()
        server = guest.bus.host.server
        wait_for_utilities(guest)
        shell.check('kexec load /kexec/kernel /kexec/initrd "$(cat /proc/cmdline) life=second"')
        shell.send("kexec go")
        guest.wait_until(lambda: server.state is BusState.DISCONNECTED, "waiting for the old kernel's UNLOAD")

        shell.ready()
        assert "life=second" in shell.check("cat /proc/cmdline")
        wait_for_utilities(guest)
        assert version(shell) == "5.3"
        see_no_complaints(shell)
        assert shell.check("nproc") == "2"
        shell.check('kexec crash /kexec/kernel /kexec/initrd "$(cat /proc/cmdline) life=third nr_cpus=1"')
        # The crash kernel runs where the crash was, on VP 1, and wants messages and interrupts there.
        shell.send("taskset 2 sh -c 'echo c > /proc/sysrq-trigger'")
        guest.wait_until(
            lambda: server.state is BusState.DISCONNECTED, "waiting for the crashed one's UNLOAD"
        )

        shell.ready()
        assert "life=third" in shell.check("cat /proc/cmdline")
        wait_for_utilities(guest)
        assert version(shell) == "5.3"
        assert {channel_of(guest, name).target_vp for name in UTILITIES} == {1}
        assert set(converse(guest, 20)) == {0}
        assert server.reports.counts == {}
        assert guest.machine.resets == 0
        shell.send("exit 5")
        outcome = guest.finish()
        assert (outcome.ending, outcome.status) == (Ending.COMMAND_EXITED, 5)
