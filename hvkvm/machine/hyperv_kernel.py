"""KVM's own Hyper-V interface as a part of a machine.

Owner: as `hyperv` says.
"""

from __future__ import annotations

from contextlib import ExitStack
from time import thread_time_ns
from typing import TYPE_CHECKING

from hvkvm.abi import tlfs
from hvkvm.abi.kvm import KVM_EXIT_HYPERV
from hvkvm.hyperv import cpuid as hv_cpuid
from hvkvm.hyperv.synic.kernel import KernelVpState
from hvkvm.machine.hyperv import Enlightenments, Handlers, Hyperv
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.machine.platform import Platform


_TICK = 200_000
"""100 ns units: more than a tick of any kernel."""


class KernelHypervState(NamedTuple):
    """The enlightenments, and what KVM keeps of them: with the SynIC's pages, or its MSRs alone.

    `msrs` of each VP; beside a SynIC its run time alone.
    """

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
        self._ran_before = [0] * len(platform.vcpus)
        """Run time of each VP in the machines before this one, 100 ns units."""

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
        features, run_times = str(self.offered.features), self._run_times()
        if self._synic is not None:
            return KernelHypervState(features, self._synic.save(), tuple(run_times))
        msrs = (vcpu.msrs(sorted(self._msrs_of(vcpu))) for vcpu in self._platform.vcpus)
        both = tuple({**kept, **ran} for kept, ran in zip(msrs, run_times, strict=True))
        return KernelHypervState(features, None, both)

    def _run_times(self) -> list[dict[int, int]]:
        """HV_X64_MSR_VP_RUNTIME of each VP, if it has one. KVM would tell the run time of this thread."""
        threads = self._platform.threads
        if not self._has_run_time:
            return [{} for _ in threads]
        return [
            {tlfs.HV_X64_MSR_VP_RUNTIME: before + thread.cpu_time_ns() // 100}
            for before, thread in zip(self._ran_before, threads, strict=True)
        ]

    @property
    def _has_run_time(self) -> bool:
        return "runtime" in self.offered.features.names

    def _load(self, state: KernelHypervState) -> None:
        vcpus = self._platform.vcpus
        if (self._synic is None) != (state.synic is None) or len(state.msrs) != len(vcpus):
            raise ValueError("saved of another kind of machine")
        kept = [dict(msrs) for msrs in state.msrs]
        self._load_run_times([msrs.pop(tlfs.HV_X64_MSR_VP_RUNTIME, 0) for msrs in kept])
        if self._synic is not None and state.synic is not None:
            self._synic.load(state.synic)
            return
        for vcpu, msrs in zip(vcpus, kept, strict=True):
            if not set(msrs) <= self._msrs_of(vcpu):
                raise ValueError("it has an MSR that is none of these enlightenments")
            vcpu.set_msrs(hv_cpuid.restore_order(msrs))

    def _load_run_times(self, run_times: list[int]) -> None:
        if not all(0 <= time < 1 << 62 for time in run_times):
            raise ValueError("its run time is more than a machine can have run")
        if not self._has_run_time:
            return
        # KVM takes from what it is given the run time of the thread that gives it, which it knows as of the
        # last tick: so guests may read a little more than this, never less, and we count on from that.
        self._ran_before = [time + _TICK for time in run_times]
        for vcpu, time in zip(self._platform.vcpus, run_times, strict=True):
            vcpu.set_msrs(((tlfs.HV_X64_MSR_VP_RUNTIME, time + thread_time_ns() // 100),))

    def _msrs_of(self, vcpu: Vcpu) -> set[int]:
        return {index for index, _value in hv_cpuid.reset_msrs(self.offered.features, vcpu.index)}
