"""What the parts of a machine stand on: what KVM and the runtime give.

It is there before any part, and has no guest-visible state but RAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.events import Observer
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.system import Kvm
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.machine.config import MachineConfig
    from hvkvm.memory.guest import GuestMemory
    from hvkvm.runtime.io_loop import IoLoop
    from hvkvm.runtime.vcpu_thread import VcpuThread
    from hvkvm.runtime.vcpus import VcpuGroup


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
