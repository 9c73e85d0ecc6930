"""What carries KVM: hardware or software, from made-up facts and from this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvkvm.kvm.kind import KvmKind, hardware_apic, probe, why_emulation_failed


def machine(tmp_path: Path, modules: str, flags: str | None) -> KvmKind:
    sysfs, cpuinfo = tmp_path / "module", tmp_path / "cpuinfo"
    for name in modules.split():
        (sysfs / name).mkdir(parents=True)
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: X\nflags\t\t: {flags}\nbugs\t\t: vmx_made_up\n")
    return probe(sysfs, cpuinfo)


@pytest.mark.parametrize(
    ("modules", "flags", "software", "text"),
    [
        ("kvm kvm_intel ext4", "fpu vmx", False, "modules kvm_intel; a CPU with vmx"),
        ("kvm kvm_amd", "svm hypervisor", False, "modules kvm_amd; a virtual CPU with svm"),
        ("kvm kvm_pvm", "fpu hypervisor", True, "modules kvm_pvm; a virtual CPU without vmx and svm"),
        ("kvm kvm_pvm", "fpu vmx", True, "modules kvm_pvm; a CPU with vmx"),
        # Linked in, so listed, and of no use on this CPU.
        ("kvm kvm_amd kvm_intel kvm_pvm", "fpu", True, "without vmx and svm"),
        ("", "fpu hypervisor", True, "no vendor module listed; a virtual CPU without vmx and svm"),
        # Nothing that says it: nothing is said.
        ("", "fpu vmx", False, "no vendor module listed; a CPU with vmx"),
        ("kvm kvm_intel", None, False, "/proc/cpuinfo cannot be read"),
        ("", None, False, "/proc/cpuinfo cannot be read"),
    ],
)
def test_facts(tmp_path: Path, modules: str, flags: str | None, software: bool, text: str) -> None:
    kind = machine(tmp_path, modules, flags)
    assert kind.in_software is software
    assert text in str(kind)
    said = why_emulation_failed(kind)
    assert bool(said) is software
    if software:
        assert str(kind) in said
        assert "scripts/lab" in said
        assert "--cpu host,-NAME" in said
        assert "\n" not in said


def test_this_machine_can_be_looked_at() -> None:
    assert "\n" not in str(probe())


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ({"kvm_amd/parameters/avic": "N\n"}, False),
        ({"kvm_amd/parameters/avic": "0\n"}, False),
        ({"kvm_amd/parameters/avic": "Y\n"}, True),
        ({"kvm_intel/parameters/enable_apicv": "N\n"}, False),
        ({"kvm_intel/parameters/enable_apicv": "Y\n"}, True),
        # Both linked in: the one that is not in use says nothing about this machine.
        ({"kvm_intel/parameters/enable_apicv": "Y\n", "kvm_amd/parameters/avic": "N\n"}, True),
        ({}, True),
    ],
)
def test_whether_the_hardware_has_an_apic_for_guests(
    tmp_path: Path, said: dict[str, str], there: bool
) -> None:
    for name, text in said.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hardware_apic(tmp_path) is there
