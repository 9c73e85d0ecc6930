"""The Hyper-V interface of a machine: KVM's own, the one in user space, or none.

One part with three implementations, so that nobody else asks which it is: here what
they share, which is also the one without enlightenments; `hyperv_kernel` and
`hyperv_user` are imported where they are used. `choose` says before there is a VM what a
machine will have; `create` makes it once there are vCPUs, and switches it on.

Threads: made and closed on the main thread; `partition` may be used from any
thread; the rest belongs to the I/O loop while the machine is at rest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hvkvm.errors import ConfigError, HvkvmError, StateError
from hvkvm.hyperv.features import FeatureSet, parse_features, resolve
from hvkvm.hyperv.partition import Partition
from hvkvm.hyperv.usermode.features import Choice, for_user_synic
from hvkvm.hyperv.usermode.features import choose as choose_synic
from hvkvm.machine.vcpus import guest_features
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.hyperv.synic.seam import Synic
    from hvkvm.kvm.system import Kvm
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.platform import Platform

Handlers = dict[int, Callable[["Vcpu"], None]]


class Enlightenments(NamedTuple):
    """What the guest is offered, and who carries it out."""

    features: FeatureSet
    """Empty for a machine without any."""
    choice: Choice

    @property
    def synic(self) -> str | None:
        """ "kernel" or "user"; None without enlightenments."""
        return self.choice.synic if self.features else None


def choose(kvm: Kvm, config: MachineConfig) -> Enlightenments:
    """What `config` asks for, on this host. ConfigError, CapabilityMissing."""
    choice = choose_synic(kvm, config.synic).for_cpu(guest_features(kvm, config.cpu))
    features = resolve(parse_features(config.hv), choice.host)
    return Enlightenments(for_user_synic(features) if choice.synic == "user" else features, choice)


class NoHypervState(NamedTuple):
    """Nothing to keep, but that there was nothing."""

    features: str


class Hyperv:
    """No interface at all, and what all three have in common. A `part.Part`."""

    name = "Hyper-V interface"
    State: type[Any] = NoHypervState

    def __init__(self, platform: Platform, offered: Enlightenments) -> None:
        self.offered = offered
        self.partition: Partition | None = None
        """The SynIC component; None where the enlightenments have no SynIC."""
        self._platform = platform

    def require_synic(self, flag: str, why: str) -> Partition:
        """The SynIC component, for the device that `flag` asks for. ConfigError without."""
        if self.partition is None:
            hv = self._platform.config.hv
            raise ConfigError(f"{flag}: {why} the SynIC, which --hv {hv} leaves out; add synic to --hv")
        return self.partition

    def handlers(self) -> Handlers:
        """The exits that are its own, each handled on the exiting vCPU's thread."""
        return {}

    def reference_time(self) -> int:
        """What the guest's HV_X64_MSR_TIME_REF_COUNT counts, in 100 ns units. Any thread."""
        return int(self._platform.vm.get_clock().clock) // 100

    def start(self) -> None:
        """See `Part.start`."""

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`. Its messages are written on vCPU threads, which are paused."""
        done()

    def reset(self) -> None:
        """See `Part.reset`. The devices have given their routes up (S7)."""

    def save(self) -> Any:
        """See `Part.save`."""
        return NoHypervState(str(self.offered.features))

    def load(self, state: Any) -> None:
        """See `Part.load`: behind the vCPUs' own state, whose TSC it counts by."""
        features = str(self.offered.features)
        if state.features != features:
            raise StateError(
                f"{self.name}: saved with --hv {state.features or 'none'}, and this machine has"
                f" {features or 'none'}"
            )
        try:
            self._load(state)
        except (ValueError, HvkvmError, OSError) as error:
            raise StateError(f"{self.name}: {error}") from None

    def _load(self, state: Any) -> None:
        """Take what there is beside the enlightenments' names."""

    def _make_partition(self, stack: ExitStack, synic: Synic | None) -> None:
        platform = self._platform
        if "synic" not in self.offered.features.names:
            return
        self.partition = Partition(
            platform.vm,
            platform.gsi,
            platform.memory,
            platform.io,
            platform.threads,
            features=self.offered.features,
            observer=platform.observer,
            signal_path=platform.config.signal_path,
            synic=synic,
        )
        stack.callback(self.partition.close)
        self.partition.activate()
