"""A KVM without VMX or SVM underneath: `doctor` and the error say what it is and where to run instead."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hvkvm.cli.doctor_check import carrier
from hvkvm.hyperv.features import FeatureSet
from hvkvm.kvm.kind import KvmKind, probe
from hvkvm.kvm.system import Kvm
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.cpu import guest_cpuid
from hvkvm.machine.cpu_features import parse_cpu, shown
from hvkvm.machine.vcpus import create_vcpus

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]
JUMP = bytes.fromhex("b8000000d0 ffe0")  # mov eax, 0xd0000000; jmp eax
FSIN = bytes.fromhex("d9fe fa f4 ebfd")  # fsin, which no KVM emulates so far; cli; hlt


def test_doctor_tells_hardware_from_software() -> None:
    check = carrier(KvmKind(("kvm_pvm",), frozenset({"hypervisor"})))
    assert check.verdict == "WARN"
    assert "kvm_pvm" in check.detail
    assert "scripts/lab" in check.remedy
    check = carrier(KvmKind(("kvm_amd",), frozenset({"svm"})))
    assert (check.verdict, check.remedy) == ("PASS", "")


def test_only_svm_forgets_where_a_triple_fault_was() -> None:
    assert KvmKind(("kvm_amd",), frozenset({"svm"})).forgets_triple_faults
    assert not KvmKind(("kvm_intel",), frozenset({"vmx"})).forgets_triple_faults
    assert not KvmKind(("kvm_pvm",), frozenset({"svm"})).forgets_triple_faults
    assert not KvmKind(("kvm_amd",), None).forgets_triple_faults


@pytest.mark.kvm
def test_an_instruction_that_cannot_be_emulated_names_this_kvm(
    hvkvm: Hvkvm, guest: Callable[[bytes], Path]
) -> None:
    kind = probe()
    checks = {check["name"]: check for check in json.loads(hvkvm("doctor", "--json").stdout)}
    assert (checks["VMX or SVM"]["verdict"] == "WARN") is kind.in_software
    assert str(kind) in checks["VMX or SVM"]["detail"]
    if not kind.in_software:
        return  # the CPU itself runs it
    result = hvkvm("run", "--quiet", "--kernel", guest(FSIN), "--timeout", "3")
    if result.returncode == 124:
        return  # this one does emulate it
    assert result.returncode == 254, result
    *state, line = result.stderr.splitlines()
    assert state[0].startswith("vcpu0: ended; exits: ")
    assert any(" rip=0x" in one for one in state)
    assert line.startswith("hvkvm: KVM internal error: vcpu0: KVM_EXIT_INTERNAL_ERROR, ")
    for part in ("KVM_INTERNAL_ERROR_EMULATION", str(kind), "scripts/lab", "--cpu host,-NAME"):
        assert part in line, (part, line)


@pytest.mark.kvm
def test_a_jump_to_where_no_memory_is_is_not_put_down_to_an_instruction(
    hvkvm: Hvkvm, guest: Callable[[bytes], Path]
) -> None:
    result = hvkvm("run", "--kernel", guest(JUMP), "--timeout", "30")
    assert result.returncode == 254, result
    *state, line = result.stderr.splitlines()
    assert any(" rip=0xd0000000 " in one for one in state)
    assert "KVM_INTERNAL_ERROR_EMULATION" in line
    assert line.endswith(" at rip=0xd0000000; gpa 0xd0000000 has no memory, and so no code")


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["cx16", "sse4_2", "nx", "umip"])
def test_what_is_hidden_is_hidden_or_the_run_is_refused(
    hvkvm: Hvkvm, guest: Callable[[bytes], Path], name: str
) -> None:
    """Such a KVM may show a guest what the CPU shows: then hiding is no promise we could keep."""
    image = guest(FSIN)
    with Kvm() as kvm, kvm.create_vm() as vm:
        hidden = guest_cpuid(kvm.supported_cpuid(), parse_cpu(f"host,-{name}"), tsc_deadline=False)
        assert name not in shown(hidden)
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(hidden)
        kept = name in shown(vcpu.cpuid2())
    checks = {check["name"]: check for check in json.loads(hvkvm("doctor", "--json").stdout)}
    assert checks["guest CPUID"]["verdict"] == "WARN" or not kept, checks["guest CPUID"]
    if kept:
        result = hvkvm("run", "--kernel", image, "--cpu", f"host,-{name}")
        assert result.returncode == 77, result
        assert result.stderr.startswith(f"hvkvm: --cpu host,-{name}: ")
        assert "all the same" in result.stderr
        return
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        config = MachineConfig(image, cpu=f"host,-{name}", cpus=2)
        for vcpu in create_vcpus(kvm, vm, config, FeatureSet()):
            assert name not in shown(vcpu.cpuid2())
