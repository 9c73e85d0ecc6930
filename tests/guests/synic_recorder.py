"""Runs a `synic_program` on a guest and writes down what the guest saw.

Each operation gives one line of text: its answer (value, fault, status), then
whatever changed by it in this guest's eyes: interrupts taken, message slots,
event flags, what the handlers took out. The same program on another SynIC must
give the same lines. Owner: the test's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

from guest_agent import ABI, EOM_PENDING, GP_FAULT, HYPERCALL_PAGE, NO_EOI, SCRATCH, SINTS, AgentCpu, Reply
from guest_machine import Guest
from synic_program import (
    INPUT,
    PAGE,
    SIEFP,
    SIMP,
    SINT,
    TAKEN_EVENT_CONNECTION,
    TAKEN_MESSAGE_CONNECTION,
    Op,
    Program,
    Step,
    named,
)
from synic_sender import Sender
from synic_view import View, changes, look

from hvkvm.abi import tlfs
from hvkvm.abi.hv_synic import HV_SYNIC_SINT_AUTO_EOI

_PENDING = 1
_ROUNDS = 50
_IDLE = ("HLT", "SPIN", "DEAF")


class Recorder:
    """Runs programs on `guest`, which runs the agent; every program begins at a machine reset."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._senders: dict[tuple[int, int], Sender] = {}
        self._before: View = {}
        self._heard = {"host messages": 0, "host signals": 0}
        self._verbs: dict[str, Callable[[AgentCpu, Op], str]] = {
            "rdmsr": lambda cpu, op: _answer(cpu.do("RDMSR", op.a)),
            "wrmsr": self._wrmsr,
            "read": lambda cpu, op: _answer(cpu.do("READ", op.a, op.b)),
            "write": lambda cpu, op: _done(cpu.do("WRITE", op.a, op.b, op.c)),
            "hypercall": self._hypercall,
            "post-input": self._post_input,
            "signal-input": self._signal_input,
            "drain": self._drain,
            "take": self._take,
            "policy": self._policy,
            "idle": self._idle,
            "pulse": lambda cpu, op: f"{self._sender(op).route.pulse()}",
            "flag": lambda cpu, op: f"{self._sender(op).route.set_event_flag(op.b)}",
            "send": self._send,
            "code": self._code,
            "tsc-page": self._tsc_page,
            "clock": self._clock,
            "ticks": self._ticks,
            "untaken": self._untaken,
            "reset": self._reset,
        }
        connections = guest.partition.connections
        assert connections.add_message(TAKEN_MESSAGE_CONNECTION, lambda _: self._hear("host messages")) == 0
        assert connections.add_event(TAKEN_EVENT_CONNECTION, lambda: self._hear("host signals")) == 0

    def run(self, program: Program) -> list[Step]:
        """The whole program, from power-on."""
        self._reset()
        steps = []
        for name, op in zip(named(program), program, strict=True):
            answer = self._verbs[op.verb](self.guest[op.vp], op)
            before, self._before = self._before, self._settle()
            steps.append(Step(name, "; ".join([answer, *changes(before, self._before)])))
        return steps

    def _hear(self, what: str) -> int:
        """The host's end of both connections; vCPU threads and I/O loop, but one operation at a time."""
        self._heard[what] += 1
        return 0

    # --- what the operations do ------------------------------------------------------------------

    def _wrmsr(self, cpu: AgentCpu, op: Op) -> str:
        index = op.a - SINT
        if 0 <= index < SINTS:
            self._auto_eoi(cpu, index, bool(op.b & HV_SYNIC_SINT_AUTO_EOI))
        if op.a in (SIMP, SIEFP):
            # The handlers learn of the page by this.
            return _done(cpu.do("SIMP" if op.a == SIMP else "SIEFP", op.b))
        return _done(cpu.do("WRMSR", op.a, op.b))

    @staticmethod
    def _auto_eoi(cpu: AgentCpu, sint: int, on: bool) -> None:
        old = cpu.counter("POLICY", sint)
        cpu.policy(sint, old | NO_EOI if on else old & ~NO_EOI)

    def _hypercall(self, cpu: AgentCpu, op: Op) -> str:
        page = cpu.rdmsr(tlfs.HV_X64_MSR_HYPERCALL)
        if page != HYPERCALL_PAGE | tlfs.HV_X64_MSR_HYPERCALL_ENABLE:
            return "no hypercall page"
        return _answer(cpu.do("HYPERCALL", op.a, op.b))

    def _post_input(self, cpu: AgentCpu, op: Op) -> str:
        self.guest.machine.memory.write(self._input(op), pack("<IIII", op.a, 0, op.b, op.c).ljust(256, b"i"))
        return "written"

    def _signal_input(self, cpu: AgentCpu, op: Op) -> str:
        self.guest.machine.memory.write(self._input(op), pack("<Q", op.a))
        return "written"

    @staticmethod
    def _input(op: Op) -> int:
        return INPUT + op.vp * PAGE

    def _drain(self, cpu: AgentCpu, op: Op) -> str:
        kind, flags, *_ = cpu.do("DRAIN", op.a).results
        return f"type {kind:#x} flags {flags:#x}"

    def _take(self, cpu: AgentCpu, op: Op) -> str:
        """As a guest should: the message out, and EOM where the slot said that another one waits."""
        kind, flags, *_ = cpu.do("DRAIN", op.a).results
        if flags & _PENDING and not cpu.counter("POLICY", op.a) & EOM_PENDING:
            cpu.eom()
        return f"type {kind:#x} flags {flags:#x}"

    def _policy(self, cpu: AgentCpu, op: Op) -> str:
        cpu.policy(op.a, op.b | cpu.counter("POLICY", op.a) & NO_EOI)
        return "set"

    def _idle(self, cpu: AgentCpu, op: Op) -> str:
        cpu.idle(_IDLE[op.a])
        self.guest.machine.memory.write_u64(cpu.base + ABI["MB_DEAF"], _IDLE[op.a] == "DEAF")
        cpu.do("NOP")
        return "set"

    def _sender(self, op: Op) -> Sender:
        key = (op.vp, op.a)
        if key not in self._senders:
            self._senders[key] = Sender(self.guest, *key)
        return self._senders[key]

    def _send(self, cpu: AgentCpu, op: Op) -> str:
        self._sender(op).send(0x100 + op.b, bytes([op.b]) * op.c)
        return "queued"

    def _code(self, cpu: AgentCpu, op: Op) -> str:
        code = self.guest.machine.memory.read(op.a, 8)
        return "zero" if not any(code) else "code" if 0xC3 in code else code.hex()

    def _tsc_page(self, cpu: AgentCpu, op: Op) -> str:
        sequence = self.guest.machine.memory.read_u32(op.a)
        return "valid" if sequence not in (0, 0xFFFFFFFF) else "invalid"

    def _clock(self, cpu: AgentCpu, op: Op) -> str:
        first, second = cpu.rdmsr(op.a), cpu.rdmsr(op.a)
        return "goes on" if second > first else "stands still" if second == first else "goes back"

    def _ticks(self, cpu: AgentCpu, op: Op) -> str:
        """Let timer `a` tick every 20 ms by CONFIG `b` until a few were taken, then stop it; at any speed."""
        config = tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * op.a
        sint = op.b >> 16 & 0xF
        name = "DIRECT" if op.b & tlfs.HV_STIMER_DIRECT_MODE else "TIMERS"
        due = cpu.counter(name, sint) + 3
        cpu.wrmsr(config, op.b)
        cpu.wrmsr(config + 1, 200_000)
        running = cpu.rdmsr(config)
        self.guest.until(lambda: cpu.counter(name, sint) >= due, f"{op}")
        cpu.wrmsr(config + 1, 0)
        self._before = self._settle()
        return f"ticks by CONFIG {running:#x}, then {cpu.rdmsr(config):#x}"

    def _untaken(self, cpu: AgentCpu, op: Op) -> str:
        """Timer `a` ticks every 5 ms by CONFIG `b` into a slot that nobody empties, but once, without EOM."""
        config = tlfs.HV_X64_MSR_STIMER0_CONFIG + 2 * op.a
        cpu.wrmsr(config, op.b)
        cpu.wrmsr(config + 1, 50_000)
        found = []
        for _ in range(2):
            end = cpu.rdmsr(tlfs.HV_X64_MSR_TIME_REF_COUNT) + 500_000
            self.guest.until(lambda end=end: cpu.rdmsr(tlfs.HV_X64_MSR_TIME_REF_COUNT) > end, "50 ms pass")
            kind, flags, *_ = cpu.do("DRAIN", op.b >> 16 & 0xF).results
            found.append(f"type {kind:#x} flags {flags:#x}")
        cpu.wrmsr(config + 1, 0)
        cpu.do("DRAIN", op.b >> 16 & 0xF)
        self._before = self._settle()
        return ", then ".join(found)

    def _reset(self, cpu: AgentCpu | None = None, op: Op | None = None) -> str:
        for sender in self._senders.values():
            sender.route.close()
        self._senders.clear()
        agent = self.guest.agent
        for each in agent.cpus:
            each.idle("HLT")
        boots = agent.boots
        self.guest[0].begin("WRMSR", tlfs.HV_X64_MSR_RESET, 1)
        agent.await_online(boots + 1)
        if op is None:
            memory = self.guest.machine.memory
            memory.write(SCRATCH, bytes(INPUT + len(agent.cpus) * PAGE - SCRATCH))
            memory.write(HYPERCALL_PAGE, bytes(PAGE))
            for vp in range(len(agent.cpus)):
                memory.write(ABI["SEEN"] + vp * PAGE, bytes(PAGE))
        self._before = self._look()
        return "power-on"

    def _settle(self) -> View:
        """What the guest sees when everything that the operation set off has happened, on whatever thread."""
        machine, agent = self.guest.machine, self.guest.agent
        seen: View = {}
        for round_number in range(_ROUNDS):
            for thread in machine.platform.threads:
                thread.call(_nothing, timeout=agent.seconds)
            self.guest.io_barrier()
            self._await_auto_eoi()
            for cpu in agent.cpus:
                self._ring(cpu)
            # One round may set off the next: a message taken out, another one let in.
            before, seen = seen, self._look()
            if round_number and seen == before:
                return seen
        raise AssertionError(f"the guest does not come to rest within {_ROUNDS} rounds")

    def _ring(self, cpu: AgentCpu) -> None:
        """Until the VP has taken every interrupt that it will: the doorbell's priority is below theirs."""
        if cpu.counter("DEAF"):
            cpu.do("NOP")
            return
        rings = cpu.counter("DOORBELLS")
        self.guest.agent.wake(cpu.index)
        self.guest.until(lambda: cpu.counter("DOORBELLS") > rings, f"vcpu{cpu.index} hears the doorbell")

    def _await_auto_eoi(self) -> None:
        """In user space these wait for a moment in which the CPU takes them; not for one that takes none."""
        user = self.guest.in_user_space
        if user is None or user.synic is None:
            return
        for vp, cpu in zip(user.synic.vps, self.guest.agent.cpus, strict=True):
            if vp.auto_eoi_waiting and not cpu.counter("DEAF"):
                self.guest.until(lambda vp=vp: not vp.auto_eoi_waiting, "the AutoEOI interrupts go out")

    def _look(self) -> View:
        """The guest's view, and what became of the host's messages."""
        seen = look(self.guest) | self._heard
        for (vp, sint), sender in self._senders.items():
            seen[f"vp{vp} sint{sint} sent"] = sender.sent
            if sender.failed:
                seen[f"vp{vp} sint{sint} refused"] = f"{sender.failed}"
        return seen


def _answer(reply: Reply) -> str:
    return _done(reply) if reply.fault is not None else f"{reply.results[0]:#x}"


def _done(reply: Reply) -> str:
    if reply.fault is None:
        return "ok"
    return "#GP" if reply.fault == GP_FAULT else f"exception {reply.fault}"


def _nothing() -> None:
    """What a thread runs to show that it ran everything before."""
