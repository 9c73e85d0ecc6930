"""The Hyper-V interface in user space as a part of a machine.

Owner: as `hyperv` says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm.abi import board
from hvkvm.abi.kvm import KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR
from hvkvm.hyperv.usermode.interface import UserHyperv, UserHypervState
from hvkvm.machine.hyperv import Enlightenments, Handlers, Hyperv
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.platform import Platform


class UserModeHypervState(NamedTuple):
    """The enlightenments, and every register of the interface in user space."""

    features: str
    registers: UserHypervState


class UserModeHyperv(Hyperv):
    """The one in user space: MSR exits, and a hypercall page behind a port."""

    def __init__(
        self,
        platform: Platform,
        offered: Enlightenments,
        lifecycle: Lifecycle,
        ports: PortBus,
        stack: ExitStack,
    ) -> None:
        super().__init__(platform, offered)
        self.registers = UserHyperv(
            platform.vm,
            platform.memory,
            platform.io,
            platform.threads,
            with_synic="synic" in offered.features.names,
            on_crash=lifecycle.panicked,
            on_reset=lifecycle.request_reset,
            observer=platform.observer,
        )
        stack.callback(self.registers.close)
        self.registers.activate()
        page = self.registers.hypercall_page
        ports.add_exit(board.HYPERCALL_PORT, board.HYPERCALL_PORT_SIZE, page.handle_out)
        self._make_partition(stack, self.registers.synic)
        if self.partition is not None:
            page.call = self.partition.hypercalls.call

    def handlers(self) -> Handlers:
        """See `Hyperv.handlers`."""
        return {
            KVM_EXIT_X86_RDMSR: self.registers.handle_rdmsr,
            KVM_EXIT_X86_WRMSR: self.registers.handle_wrmsr,
        }

    def reference_time(self) -> int:
        """See `Hyperv.reference_time`."""
        return self.registers.clock.now()

    State = UserModeHypervState

    def start(self) -> None:
        """See `Part.start`: its timers go off again."""
        self.registers.go_on()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`."""
        self.registers.hold()
        done()

    def reset(self) -> None:
        """See `Part.reset`."""
        if self.partition is not None:
            self.partition.reset()
        self.registers.reset()

    def save(self) -> UserModeHypervState:
        """See `Part.save`."""
        return UserModeHypervState(str(self.offered.features), self.registers.save())

    def _load(self, state: UserModeHypervState) -> None:
        self.registers.load(state.registers)
