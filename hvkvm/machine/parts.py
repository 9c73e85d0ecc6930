"""What a machine is made of: the platform everything stands on, and the parts that stand on it.

`Platform` is what KVM and the runtime give: it exists before any part and holds
no guest-visible state of its own. A `Part` has guest-visible state. `Parts` is
the whole, for who looks at a machine from outside: dumps, `inspect`, the control
socket. Only `machine.Machine` makes them; nobody below it takes a `Machine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from hvkvm.events import Observer
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.system import Kvm
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.machine.board import Board
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.memory.guest import GuestMemory
    from hvkvm.runtime.io_loop import IoLoop
    from hvkvm.runtime.vcpu_thread import VcpuThread
    from hvkvm.runtime.vcpus import VcpuGroup


class Part(Protocol):
    """Something with guest-visible state. `Lifecycle` calls it, on the I/O loop, with every vCPU paused.

    It is stopped when made: `start` comes before the vCPUs first run, without a
    loop yet. A stopped part may be started, reset and stopped again, in any order.
    """

    name: str
    """One word, for messages about it."""

    def start(self) -> None:
        """Go on from the state that it has."""

    def stop(self, done: Callable[[], object]) -> None:
        """Come to rest, then call `done()` once, now or later.

        From then on the part touches no guest memory and has no work in flight.
        A part that is stopped already answers at once.
        """

    def reset(self) -> None:
        """Take the power-on state. Only while stopped."""


class Platform(NamedTuple):
    """One VM on its host: KVM's handles, guest RAM, the threads, and who hears of events."""

    config: MachineConfig
    kvm: Kvm
    vm: Vm
    memory: GuestMemory
    vcpus: Sequence[Vcpu]
    """In VP order, as `threads`."""
    threads: Sequence[VcpuThread]
    group: VcpuGroup
    gsi: GsiTable
    io: IoLoop
    observer: Observer


class Parts(NamedTuple):
    """A whole machine, for looking at it and for asking things of its devices."""

    name: str
    """What `hvkvm ctl --vm` calls it."""
    platform: Platform
    lifecycle: Lifecycle
    hyperv: Hyperv
    board: Board
    bus: Bus | None

    def inspect(self) -> Mapping[str, object]:
        """Each part as plain values; stops nobody, each number right for its own moment. Any thread."""
        from hvkvm.machine.inspect import inspect

        return inspect(self)
