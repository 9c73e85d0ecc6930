"""What a guest finds where a PC's BIOS begins: Linux's reboot=bios jumps there, in real mode."""

from __future__ import annotations

from pathlib import Path

import kernel_images as ki
import pytest

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending
from hvkvm.machine.processors import Processors

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("acpi", [True, False])
def test_a_jump_to_the_reset_vector_resets_the_machine(tmp_path: Path, acpi: bool) -> None:
    kernel = tmp_path / "k"
    kernel.write_bytes(ki.multiboot())
    config = MachineConfig(kernel=kernel, hv="none", memory=32 << 20, acpi=acpi, reboot=False, timeout=60)
    with Machine(config) as machine:
        vcpu = machine.platform.vcpus[0]
        (processors,) = (part for part in machine.lifecycle._parts if isinstance(part, Processors))
        processors._power_on.restore()  # real mode
        segments = vcpu.sregs()
        segments.cs.selector, segments.cs.base = 0xF000, 0xF0000
        vcpu.set_sregs(segments)
        registers = vcpu.regs()
        registers.rip = 0xFFF0
        vcpu.set_regs(registers)
        outcome = machine.run()
    assert outcome.ending is Ending.RESET, outcome
