"""Our guest images are plain multiboot kernels: another VMM, without KVM, runs them too."""

from __future__ import annotations

import guest_qemu
import pytest
from guest_agent import ABI, SCRATCH

pytestmark = pytest.mark.skipif(
    guest_qemu.missing() is not None, reason=f"needs QEMU: {guest_qemu.missing()}"
)


def test_agent_runs_under_emulation() -> None:
    """Boot, four vCPUs, commands, and the debug exit's status."""
    guest = guest_qemu.QemuGuest(
        4, "-accel", "tcg", "-device", f"isa-debug-exit,iobase={ABI['DEBUG_EXIT']},iosize=4"
    )
    try:
        guest.start()
        for cpu in guest.agent.cpus:
            assert cpu.do("CPUID", 1, 0).results[1] >> 24 == cpu.index
            guest.memory.write_u64(SCRATCH, 40 + cpu.index)
            assert cpu.do("READ", SCRATCH, 8).value == 40 + cpu.index
            cpu.expect_clean()
        guest[0].begin("OUT", ABI["DEBUG_EXIT"], 4, 21)
        assert guest.process.wait(guest.agent.seconds) == 43
    finally:
        guest.close()
