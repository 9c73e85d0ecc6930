"""Which SynIC a machine gets, and what the one in user space can back.

`choose` is asked before there is a VM: by `machine.hyperv`, and by the verbs that tell what a machine
would get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvkvm.abi import kvm as abi_kvm
from hvkvm.abi import tlfs
from hvkvm.errors import CapabilityMissing
from hvkvm.hyperv.features import FeatureSet, HostFeatures
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.system import Kvm

_KERNEL_NEEDS = ("KVM_CAP_HYPERV", "KVM_CAP_HYPERV_SYNIC2", "KVM_CAP_HYPERV_TIME")
_USER_NEEDS = ("KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER")
_COSTLY = frozenset({"stimer", "stimer-direct"})
"""Every shot of a synthetic timer is an exit to us; KVM serves the local APIC's timer itself."""

_INVARIANT_TSC_LEAF = 0x80000007
_INVARIANT_TSC = 1 << 8


class Choice(NamedTuple):
    """The SynIC taken, what can be backed with it, and why it was taken."""

    synic: Literal["kernel", "user"]
    host: HostFeatures
    why: str

    def for_cpu(self, cpu: frozenset[str]) -> Choice:
        """The same for guests that are shown these CPU features, by /proc/cpuinfo's names."""
        return self._replace(host=self.host._replace(cpu=cpu))


def choose(kvm: Kvm, wanted: Literal["auto", "kernel", "user"]) -> Choice:
    """KVM's SynIC or the one in user space. "auto" takes KVM's where it is complete.

    Where neither can be had, auto answers "kernel": then there are no
    enlightenments. Raises CapabilityMissing when "user" was asked for in vain.
    """
    host = HostFeatures.probe(kvm)
    if wanted == "kernel":
        return Choice("kernel", host, "--synic kernel")
    lacking = lacks_for_user(kvm)
    if wanted == "user":
        if lacking:
            raise CapabilityMissing(
                f"--synic user needs {lacking}, which this kernel's KVM lacks; use Linux 5.10 or newer"
            )
        return Choice("user", user_host(kvm), "--synic user")
    missing = _lacking(kvm, _KERNEL_NEEDS)
    if not missing:
        return Choice("kernel", host, "this kernel's KVM has all of it")
    if lacking:
        return Choice("kernel", host, f"the one in user space needs {lacking}")
    return Choice("user", user_host(kvm), f"this kernel's KVM lacks {missing}")


def lacks_for_user(kvm: Kvm) -> str:
    """The first capability that the SynIC in user space misses here, "" when it can be had."""
    return _lacking(kvm, _USER_NEEDS)


def _lacking(kvm: Kvm, names: tuple[str, ...]) -> str:
    for name in names:
        if not kvm.check_extension(getattr(abi_kvm, name)):
            return name
    return ""


def user_host(kvm: Kvm) -> HostFeatures:
    """What the SynIC in user space backs, in the form in which KVM reports its own."""
    features_eax = (
        tlfs.HV_MSR_VP_RUNTIME_AVAILABLE
        | tlfs.HV_MSR_TIME_REF_COUNT_AVAILABLE
        | tlfs.HV_MSR_SYNIC_AVAILABLE
        | tlfs.HV_MSR_SYNTIMER_AVAILABLE
        | tlfs.HV_MSR_HYPERCALL_AVAILABLE
        | tlfs.HV_MSR_VP_INDEX_AVAILABLE
        | tlfs.HV_MSR_RESET_AVAILABLE
        | tlfs.HV_MSR_REFERENCE_TSC_AVAILABLE
        | tlfs.HV_ACCESS_FREQUENCY_MSRS
    )
    if any(
        leaf.function == _INVARIANT_TSC_LEAF and leaf.edx & _INVARIANT_TSC for leaf in kvm.supported_cpuid()
    ):
        # Only where CPUID shows it from the start: KVM_SET_CPUID2 cannot uncover it later.
        features_eax |= tlfs.HV_ACCESS_TSC_INVARIANT
    leaves = {
        tlfs.HYPERV_CPUID_FEATURES: (
            features_eax,
            tlfs.HV_POST_MESSAGES | tlfs.HV_SIGNAL_EVENTS,
            0,
            tlfs.HV_FEATURE_FREQUENCY_MSRS_AVAILABLE
            | tlfs.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE
            | tlfs.HV_STIMER_DIRECT_MODE_AVAILABLE,
        ),
        tlfs.HYPERV_CPUID_ENLIGHTMENT_INFO: (
            tlfs.HV_X64_RELAXED_TIMING_RECOMMENDED | tlfs.HV_DEPRECATING_AEOI_RECOMMENDED,
            tlfs.HV_SPINLOCK_RETRY_NEVER,
            0,
            0,
        ),
    }
    return HostFeatures(
        dict.fromkeys(_KERNEL_NEEDS, 1),
        leaves,
        source="the SynIC in user space",
        remedy="use --synic kernel on a KVM that has it",
        on_demand=_COSTLY,
    )


def for_user_synic(features: FeatureSet) -> FeatureSet:
    """`features` with AutoEOI declared deprecated wherever there is a SynIC: `auto_eoi` says why."""
    if "synic" not in features.names or "avic" in features.names:
        return features
    return features._replace(names=(*features.names, "avic"))
