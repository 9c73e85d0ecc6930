"""KVM's own Hyper-V interface as a part of a machine.

Owner: as `hyperv` says.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi.kvm import KVM_EXIT_HYPERV
from hvkvm.hyperv import cpuid as hv_cpuid
from hvkvm.hyperv.synic.kernel import KernelVpState
from hvkvm.machine.hyperv import Enlightenments, Handlers, Hyperv

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.machine.platform import Platform


class KernelHypervState(NamedTuple):
    """The enlightenments, and what KVM keeps of them: with the SynIC's pages, or its MSRs alone."""

    features: str
    synic: tuple[KernelVpState, ...] | None
    msrs: tuple[dict[int, int], ...]


class KernelHyperv(Hyperv):
    """KVM's own. Its reference time is the VM's clock."""

    def __init__(self, platform: Platform, offered: Enlightenments, stack: ExitStack) -> None:
        super().__init__(platform, offered)
        self._make_partition(stack, None)
        partition = self.partition
        self._synic = None if partition is None else partition.kernel_synic

    def handlers(self) -> Handlers:
        """See `Hyperv.handlers`."""
        return {} if self.partition is None else {KVM_EXIT_HYPERV: self.partition.handle_hyperv_exit}

    def reset(self) -> None:
        """See `Part.reset`: KVM resets none of these registers by itself."""
        if self.partition is not None:
            self.partition.reset()
            return
        for vcpu in self._platform.vcpus:
            vcpu.set_msrs(hv_cpuid.reset_msrs(self.offered.features, vcpu.index))

    State = KernelHypervState

    def save(self) -> KernelHypervState:
        """See `Part.save`. KVM's timers may go off meanwhile: that shows when the vCPUs run again."""
        features = str(self.offered.features)
        if self._synic is not None:
            return KernelHypervState(features, self._synic.save(), ())
        msrs = (vcpu.msrs(sorted(self._msrs_of(vcpu))) for vcpu in self._platform.vcpus)
        return KernelHypervState(features, None, tuple(msrs))

    def _load(self, state: KernelHypervState) -> None:
        vcpus = self._platform.vcpus
        if (self._synic is None) != (state.synic is None) or (
            state.synic is None and len(state.msrs) != len(vcpus)
        ):
            raise ValueError("saved of another kind of machine")
        if self._synic is not None and state.synic is not None:
            self._synic.load(state.synic)
            return
        for vcpu, msrs in zip(vcpus, state.msrs, strict=True):
            if not set(msrs) <= self._msrs_of(vcpu):
                raise ValueError("it has an MSR that is none of these enlightenments")
            vcpu.set_msrs(hv_cpuid.restore_order(msrs))

    def _msrs_of(self, vcpu: Vcpu) -> set[int]:
        return {index for index, _value in hv_cpuid.reset_msrs(self.offered.features, vcpu.index)}
