"""The facade of a VM's SynIC: exits in, routes and connections out.

`machine` makes one `Partition` per VM and gives it KVM_EXIT_HYPERV; devices and
the VMBus host open routes and connections on it. It is given its SynIC
(`usermode.features.choose` says which) and makes KVM's own where it is given none;
who uses it does not know which one is below.

Threads: the main thread builds, activates and closes; exits come on vCPU
threads; `open_route` and `connections` may be used from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from hvkvm.errors import CapabilityMissing, HvkvmError
from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.hyperv.connections import Connections
from hvkvm.hyperv.cpuid import reset_msrs
from hvkvm.hyperv.hypercalls import Hypercalls
from hvkvm.hyperv.sint_route import RouteTable, SintRoute
from hvkvm.hyperv.synic.kernel import KernelSynic
from hvkvm.hyperv.synic.seam import SignalPath, Synic
from hvkvm.runtime.protocols import Deferrer, EdgeWatcher, VpThread

if TYPE_CHECKING:
    from hvkvm.hyperv.features import FeatureSet
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.memory.guest import GuestMemory

SignalChoice = Literal["auto", "kernel", "user"]


class SynicLoop(EdgeWatcher, Deferrer, Protocol):
    """What is needed of the I/O loop."""


class Partition:
    """The SynIC component of one VM.

    `threads` are the vCPUs' threads in VP order. `features` decide which MSRs a
    reset writes (None: those of the SynIC and its timers). `signal_path` chooses
    who answers HvSignalEvent (S42): "kernel" is KVM_HYPERV_EVENTFD, "user" a
    table here, "auto" the kernel where it can. `strict_alignment` makes
    HvPostMessage ask for the TLFS's 8 bytes instead of QEMU's 4 (S45). `synic`
    replaces KVM's own.

    Raises CapabilityMissing for a signal path that is not there, OSError when
    the host has no memory for the pages.
    """

    def __init__(
        self,
        vm: Vm,
        gsi: GsiTable,
        memory: GuestMemory,
        io: SynicLoop,
        threads: Sequence[VpThread],
        *,
        features: FeatureSet | None = None,
        observer: Observer = NULL_OBSERVER,
        signal_path: SignalChoice = "auto",
        strict_alignment: bool = False,
        synic: Synic | None = None,
    ) -> None:
        def msrs(vp_index: int) -> Iterable[tuple[int, int]]:
            return reset_msrs(features, vp_index)

        self.kernel_synic: KernelSynic | None = None
        """KVM's SynIC, where that is the one below."""
        if synic is None:
            synic = self.kernel_synic = KernelSynic(
                vm, gsi, memory, io, threads, reset_msrs=msrs, observer=observer
            )
        self.synic: Synic = synic
        try:
            path = self._choose_signal_path(signal_path)
        except BaseException:
            synic.close()
            raise
        slow = self._warn_slow_signals if self.kernel_synic is not None and signal_path == "auto" else None
        self._observer = observer
        self._vps = len(threads)
        self.connections = Connections(io, path, slow)
        self.hypercalls = Hypercalls(memory, self.connections, strict_alignment=strict_alignment)
        self.routes = RouteTable(synic, io, observer=observer)
        self._call = self.hypercalls.call

    def _choose_signal_path(self, choice: SignalChoice) -> SignalPath | None:
        path = None if choice == "user" else self.synic.signal_path
        if choice == "kernel" and path is None:
            raise CapabilityMissing(f"--signal-path kernel: {self.synic.signal_path_missing}")
        return path

    def _warn_slow_signals(self) -> None:
        """Once a partition, when its first event connection falls back to exits (S42)."""
        why = self.synic.signal_path_missing
        text = f"HvSignalEvent goes by exits to this process, which is slower: {why}"
        self._observer.event(Warned("signal-path", text))

    def activate(self) -> None:
        """Switch the SynIC on for every VP and write the power-on MSRs.

        Once, on the main thread, after KVM_SET_CPUID2 and before any vCPU runs.
        Routes may be opened before; their lines are bound now (S16). Raises
        CapabilityMissing, KvmIoctlError.
        """
        self.synic.activate()

    def handle_hyperv_exit(self, vcpu: Vcpu) -> None:
        """Handler of KVM_EXIT_HYPERV, on the vCPU's thread. HvkvmError for a kind nobody knows (S56)."""
        if self.kernel_synic is None:
            raise HvkvmError("KVM_EXIT_HYPERV on a machine whose SynIC is not KVM's")
        self.kernel_synic.handle_exit(vcpu, self._call)

    def open_route(
        self, vp_index: int, sint: int, on_complete: Callable[[int], None] | None = None
    ) -> SintRoute:
        """A route to (vp_index, sint); `on_complete(status)` runs once an accepted post, on the I/O loop.

        Raises RouteError: no such VP or SINT, no resources, or a second user of
        its completions. Both numbers may come straight from a guest (S10, S11).
        """
        return self.routes.open(vp_index, sint, on_complete)

    def reset(self) -> None:
        """Put the SynIC back to power-on, after the devices were reset (S7).

        Routes still open are closed with a warning, messages under way complete
        with -ECANCELED and never reach the guest's next life (S31). Connections
        stay. Every vCPU must be paused. Raises KvmIoctlError, OSError.
        """
        self.routes.close_all("at reset")
        self.synic.reset()

    def snapshot(self) -> dict[str, object]:
        """VPs whose SynIC is in use, routes and connections. Any thread."""
        vps = filter(None, (vp.snapshot() for vp in map(self.synic.vp, range(self._vps)) if vp is not None))
        return {
            "vps": list(vps),
            "routes": self.routes.snapshot(),
            "connections": self.connections.snapshot(),
        }

    def close(self) -> None:
        """Let go of everything: connections, routes, pages. Idempotent.

        vCPU threads have ended. The I/O loop may have too: completions that it
        did not run are dropped.
        """
        self.connections.close()
        self.routes.close()
        self.synic.close()
