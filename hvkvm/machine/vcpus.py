"""The machine's vCPUs: each made with the CPUID that its guest sees.

Called by `Machine` on the thread that owns it, before any of them runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_CAP_TSC_DEADLINE_TIMER
from hvkvm.hyperv import cpuid as hv_cpuid
from hvkvm.machine.cpu import guest_cpuid, vcpu_cpuid
from hvkvm.machine.cpu_features import must_hide, parse_cpu, shown

if TYPE_CHECKING:
    from hvkvm.hyperv.features import FeatureSet
    from hvkvm.kvm.system import Kvm
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.machine.config import MachineConfig


def guest_features(kvm: Kvm, cpu: str = "host") -> frozenset[str]:
    """The CPU features that `--cpu` leaves a guest here. ConfigError, CapabilityMissing."""
    tsc_deadline = bool(kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
    entries = guest_cpuid(kvm.supported_cpuid(), parse_cpu(cpu), tsc_deadline=tsc_deadline)
    return frozenset(shown(entries))


def create_vcpus(kvm: Kvm, vm: Vm, config: MachineConfig, features: FeatureSet) -> list[Vcpu]:
    """Every vCPU fd, in VP order, each with its CPUID. They must all exist before any runs.

    Raises CapabilityMissing for a CPU feature that KVM cannot show as it was asked for, or not hide.
    """
    leaves = hv_cpuid.hyperv_leaves(features, config.cpus) if features else None
    tsc_deadline = bool(kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
    request = parse_cpu(config.cpu)
    cpuid = guest_cpuid(kvm.supported_cpuid(), request, tsc_deadline=tsc_deadline)
    vcpus = [vm.create_vcpu(index) for index in range(config.cpus)]
    for vcpu in vcpus:
        vcpu.set_cpuid2(vcpu_cpuid(cpuid, vcpu.index, config.cpus, leaves))
        hv_cpuid.prepare_vcpu(vcpu, features)
    if request.hide:
        # KVM without VMX or SVM underneath may let the guest see the CPU's own CPUID.
        must_hide(request, vcpus[0].cpuid2())
    return vcpus
