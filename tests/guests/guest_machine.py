"""A Machine that runs the agent guest, and a device-like sender on one of its SINT routes.

Owner: the test's thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any

import guest_images
from guest_agent import ABI, CHECK, DRAIN, EOM_PENDING, SCRATCH, Agent, AgentCpu

from hvkvm.abi.kvm import KVM_EXIT_HYPERV, KVM_EXIT_IO, KVM_EXIT_X86_WRMSR
from hvkvm.abi.tlfs import HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_HYPERCALL

if TYPE_CHECKING:
    from hvkvm.hyperv.partition import Partition
    from hvkvm.hyperv.sint_route import SintRoute
    from hvkvm.hyperv.usermode.interface import UserHyperv
    from hvkvm.machine.machine import Machine

MIB = 1 << 20
MEMORY = 64 * MIB
GUEST_OS_ID = 0x8100_0000_0000_0000
"""An open-source system that is nobody else's."""

_checked = Struct("<Q224sQ").pack


def checked_payload(sequence: int) -> bytes:
    """240 bytes that POLICY_CHECK recognises as message number `sequence`."""
    return _checked(sequence, bytes([sequence & 0xFF]) * 224, ~sequence & (1 << 64) - 1)


class Guest:
    """The machine, and its agent once started."""

    def __init__(self, cpus: int = 1, hv: str = "passthrough", memory: int = MEMORY, **config: Any) -> None:
        from hvkvm.machine.config import MachineConfig
        from hvkvm.machine.machine import Machine

        observer = config.pop("observer", None)
        image = guest_images.image(config.pop("program", "agent"))
        if synic := os.environ.get("HVKVM_SYNIC"):
            config.setdefault("synic", synic)
        settings = MachineConfig(kernel=image, cpus=cpus, hv=hv, memory=memory, **config)
        self.machine: Machine = (
            Machine(settings) if observer is None else Machine(settings, observer=observer)
        )
        self.agent = Agent(
            self.machine.memory,
            cpus,
            self._wake,
            ended=lambda: self.machine.outcome,
            describe=self._describe,
        )

    def _describe(self) -> str:
        from hvkvm.machine.dump import describe

        return describe(self.machine.parts)

    def _wake(self, index: int) -> None:
        self.machine.platform.vm.signal_msi(0xFEE00000 | index << 12, ABI["DOORBELL_VECTOR"])

    def start(self) -> Guest:
        """Start the machine and wait for every vCPU."""
        self.machine.start()
        self.agent.await_online()
        return self

    def __getitem__(self, index: int) -> AgentCpu:
        return self.agent[index]

    @property
    def partition(self) -> Partition:
        """The SynIC component; AssertionError on a machine without."""
        assert self.machine.partition is not None
        return self.machine.partition

    @property
    def in_user_space(self) -> UserHyperv | None:
        """The Hyper-V interface in user space; None where it is KVM's, or none."""
        from hvkvm.machine.hyperv_user import UserModeHyperv

        interface = self.machine.hyperv
        return interface.registers if isinstance(interface, UserModeHyperv) else None

    @property
    def hypercall_exit(self) -> int:
        """The exit that a hypercall makes, by the SynIC that carries this guest."""
        return KVM_EXIT_HYPERV if self.in_user_space is None else KVM_EXIT_IO

    @property
    def register_exit(self) -> int:
        """The exit that a write to SCONTROL, SIMP or SIEFP makes."""
        return KVM_EXIT_HYPERV if self.in_user_space is None else KVM_EXIT_X86_WRMSR

    def enlighten(self) -> None:
        """GUEST_OS_ID and the hypercall page, which hypercalls need."""
        self[0].wrmsr(HV_X64_MSR_GUEST_OS_ID, GUEST_OS_ID)
        self[0].wrmsr(HV_X64_MSR_HYPERCALL, ABI["HYPERCALL_PAGE"] | 1)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Poll with the agent's deadline."""
        self.agent.until(done, what)

    def hold(self, index: int) -> Callable[[], None]:
        """Keep vCPU `index`'s thread busy outside KVM_RUN until the returned function is called."""
        held, go = threading.Event(), threading.Event()

        def wait() -> None:
            held.set()
            go.wait(self.agent.seconds)

        self.machine.platform.threads[index].submit(wait)
        assert held.wait(self.agent.seconds), f"vcpu{index}'s thread does not take work"
        return go.set

    def io_barrier(self) -> None:
        """Return when the I/O loop has run everything that was queued for it before."""
        done = threading.Event()
        self.machine.platform.io.call_soon(done.set)
        assert done.wait(self.agent.seconds), "the I/O loop is stuck"

    def settle(self, *indexes: int) -> None:
        """Return when interrupts raised before have been taken: every vCPU named has run a command since."""
        for _ in range(2):
            self.io_barrier()
            for index in indexes or range(len(self.agent.cpus)):
                self[index].do("NOP")

    def close(self) -> None:
        self.machine.close()


class Poster:
    """A route whose completions are recorded, in order, with the thread they came on."""

    def __init__(self, guest: Guest, vp: int, sint: int) -> None:
        self.guest = guest
        self.statuses: list[int] = []
        self.off_loop = 0
        self.on_complete: Callable[[int], None] | None = None
        self.route: SintRoute = guest.partition.open_route(vp, sint, self._complete)

    def _complete(self, status: int) -> None:
        if not self.guest.machine.platform.io.in_loop():
            self.off_loop += 1
        self.statuses.append(status)
        if self.on_complete is not None:
            self.on_complete(status)

    def post(self, payload: bytes = b"", message_type: int = 1) -> int:
        return self.route.post(message_type, payload)

    def await_completions(self, count: int) -> list[int]:
        """Wait until exactly `count` callbacks came; all their statuses."""
        self.guest.until(lambda: len(self.statuses) >= count, f"{count} completions come")
        self.guest.io_barrier()  # so that one too many would be seen
        assert len(self.statuses) == count, f"{len(self.statuses)} completions instead of {count}"
        assert not self.off_loop, "a completion came on another thread than the I/O loop"
        return self.statuses

    def close(self) -> None:
        self.route.close()


class Sender:
    """Sends numbered messages over one route as a device would: one at a time, the next on completion."""

    def __init__(self, guest: Guest, vp: int, sint: int) -> None:
        self.guest = guest
        self.vp, self.sint = vp, sint
        self.sent = 0
        self.due = 0
        self.failed: list[int] = []
        self.poster = Poster(guest, vp, sint)
        self.poster.on_complete = self._complete
        self._message = b""
        self._under_way = False  # the I/O loop's

    def send(self, count: int) -> None:
        """Send `count` more messages; numbers go on from the last."""
        self.due = self.sent + count
        self.guest.machine.platform.io.call_soon(self._next)

    def _next(self) -> None:
        if self.sent < self.due and not self._under_way:
            self._under_way = True
            self._message = checked_payload(self.sent)
            status = self.poster.route.post(1, self._message)
            if status:
                self.failed.append(status)

    def _complete(self, status: int) -> None:
        if status:
            self.failed.append(status)
            return
        self._under_way = False
        self.sent += 1
        self._next()  # the staging area is free behind the callback (S24)

    def await_sent(self, seconds: float | None = None) -> None:
        """Until everything was completed with 0, and the guest took it."""
        agent = self.guest.agent
        cpu = self.guest[self.vp]
        agent.until(
            lambda: self.sent == self.due or bool(self.failed), f"{self.due} messages are sent", seconds
        )
        assert not self.failed, f"the route answered {self.failed}"
        agent.until(
            lambda: cpu.counter("MESSAGES", self.sint) >= self.due,
            f"vcpu{self.vp} takes {self.due} messages (it took {cpu.counter('MESSAGES', self.sint)})",
            seconds,
        )
        statuses = self.poster.statuses
        assert statuses.count(0) == self.due, "one completion with 0 a message"
        assert len(statuses) == self.due


def run_traffic(guest: Guest, each: int, *, idle: str, sints: tuple[int, ...] = (2, 11)) -> None:
    """Send `each` numbered messages a vCPU, spread over a route for each of `sints`, all at once.

    Every vCPU checks that nothing was lost, doubled, reordered or torn.
    """
    policy = dict.fromkeys(sints, DRAIN | EOM_PENDING | CHECK)
    senders = []
    for cpu in guest.agent.cpus:
        cpu.synic_on(simp=SCRATCH + cpu.index * 0x1000, sints=policy)
        cpu.idle(idle)
        senders += [Sender(guest, cpu.index, sint) for sint in sints]
    for sender in senders:
        sender.send(each // len(sints))
    for sender in senders:
        sender.await_sent(seconds=max(guest.agent.seconds, each / 5))
    guest.settle()
    for sender in senders:
        cpu = guest[sender.vp]
        assert cpu.counter("MESSAGES", sender.sint) == each // len(sints)
        cpu.expect_clean()
        sender.poster.close()
