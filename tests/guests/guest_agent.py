"""The host's half of the agent guest: commands to a running vCPU, and what its handlers saw.

A test holds an `Agent` and tells each vCPU what to do through a mailbox in
guest RAM (abi.inc, parsed here). Everything is polled with a deadline: the
host may be a software-emulated machine, so no test may depend on time. Owner:
the test's thread; one command per vCPU at a time.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvkvm.abi.tlfs import HV_X64_MSR_EOM, HV_X64_MSR_SCONTROL, HV_X64_MSR_SINT0

SINTS = 16


def _parse_abi() -> dict[str, int]:
    text = (Path(__file__).parent / "abi.inc").read_text()
    pairs = re.findall(r"^\.equ\s+(\w+)\s*,\s*(\w+)", text, re.MULTILINE)
    return {name: int(value, 0) for name, value in pairs}


ABI = _parse_abi()
HYPERCALL_PAGE = ABI["HYPERCALL_PAGE"]
SCRATCH = ABI["SCRATCH"]
SINT_VECTOR = ABI["SINT_VECTOR"]

DRAIN = ABI["POLICY_DRAIN"]
EOM_PENDING = ABI["POLICY_EOM_PENDING"]
EOM_ALWAYS = ABI["POLICY_EOM"]
EVENTS = ABI["POLICY_EVENTS"]
NO_EOI = ABI["POLICY_NO_EOI"]
CHECK = ABI["POLICY_CHECK"]

GP_FAULT = 13
UD_FAULT = 6


class Memory(Protocol):
    """What the agent needs of guest RAM; hvkvm's GuestMemory is one."""

    def read(self, gpa: int, size: int) -> bytes: ...
    def write(self, gpa: int, data: bytes) -> None: ...
    def read_u64(self, gpa: int) -> int: ...
    def write_u64(self, gpa: int, value: int) -> None: ...


class GuestStuckError(AssertionError):
    """Something that the guest owed did not come before the deadline."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A command's answer: four result words, and the exception that cut it short, if any."""

    results: tuple[int, int, int, int]
    fault: int | None
    fault_code: int
    fault_rip: int

    @property
    def value(self) -> int:
        """The first result; AssertionError if the command faulted."""
        assert self.fault is None, f"the guest's command took exception {self.fault}: {self}"
        return self.results[0]


@dataclass(frozen=True, slots=True)
class Message:
    """A message as the guest found it in its slot."""

    serial: int
    sint: int
    message_type: int
    payload_size: int
    flags: int
    reserved: int
    sender: int
    payload: bytes


class AgentCpu:
    """One vCPU's mailbox."""

    def __init__(self, agent: Agent, index: int) -> None:
        self.agent = agent
        self.index = index
        self.memory = agent.memory
        self.base = ABI["MAILBOX"] + index * ABI["MAILBOX_SIZE"]
        self._read_log = 0

    # --- commands ---------------------------------------------------------------------------

    def begin(self, operation: str, *arguments: int) -> None:
        """Give the vCPU a command ("RDMSR" is OP_RDMSR); returns at once."""
        memory, base = self.memory, self.base
        done = memory.read_u64(base + ABI["MB_DONE"])
        assert memory.read_u64(base + ABI["MB_COMMAND"]) == done, f"vcpu{self.index} is still busy"
        memory.write_u64(base + ABI["MB_CANCEL"], 0)
        memory.write_u64(base + ABI["MB_OPCODE"], ABI[f"OP_{operation}"])
        for position in range(6):
            value = arguments[position] if position < len(arguments) else 0
            memory.write_u64(base + ABI["MB_ARGUMENT"] + 8 * position, value & (1 << 64) - 1)
        memory.write_u64(base + ABI["MB_COMMAND"], done + 1)
        self.agent.wake(self.index)

    @property
    def busy(self) -> bool:
        """True while a command runs."""
        base = self.base
        return self.memory.read_u64(base + ABI["MB_COMMAND"]) != self.memory.read_u64(base + ABI["MB_DONE"])

    def finish(self, seconds: float | None = None) -> Reply:
        """Wait for the command's answer."""
        self.agent.until(lambda: not self.busy, f"vcpu{self.index} finishes its command", seconds)
        words = struct.unpack("<7Q", self.memory.read(self.base + ABI["MB_RESULT"], 56))
        fault = words[4] & 0xFF if words[4] & ABI["FAULT_TAKEN"] else None
        return Reply(words[0:4], fault, words[5], words[6])

    def do(self, operation: str, *arguments: int, seconds: float | None = None) -> Reply:
        """One command and its answer."""
        self.begin(operation, *arguments)
        return self.finish(seconds)

    def cancel(self) -> Reply:
        """End a waiting or looping command; its answer so far."""
        self.memory.write_u64(self.base + ABI["MB_CANCEL"], 1)
        self.agent.wake(self.index)
        return self.finish()

    def rdmsr(self, msr: int) -> int:
        return self.do("RDMSR", msr).value

    def wrmsr(self, msr: int, value: int) -> None:
        assert self.do("WRMSR", msr, value).fault is None

    def hypercall(self, control: int, value: int = 0, output: int = 0) -> int:
        """The hypercall's whole result word (status in the low 16 bits)."""
        return self.do("HYPERCALL", control, value, output).value

    def idle(self, mode: str) -> None:
        """What the vCPU does between commands: "HLT", "SPIN" or "DEAF"."""
        self._set("MB_IDLE", ABI[f"IDLE_{mode}"])
        self.agent.wake(self.index)

    def await_round(self) -> None:
        """Until the vCPU idles as it was told last, behind its answer to the last command."""
        rounds = self._get("MB_HEARTBEAT")
        self.agent.until(lambda: self._get("MB_HEARTBEAT") > rounds, f"vcpu{self.index} idles")

    def await_halt(self) -> None:
        """Until the vCPU is about to execute HLT, or in it, and stays there."""
        rounds = self._get("MB_HEARTBEAT")

        def settled() -> bool:
            nonlocal rounds
            before, rounds = rounds, self._get("MB_HEARTBEAT")
            return self._get("MB_HALTING") == 1 and before == rounds

        self.agent.until(settled, f"vcpu{self.index} halts")

    # --- SynIC ---------------------------------------------------------------------------------

    def synic_on(
        self, *, simp: int | None = None, siefp: int | None = None, sints: dict[int, int] | None = None
    ) -> None:
        """Program the SynIC: SINTs to their vectors with the given POLICY bits, pages, SCONTROL."""
        for sint, policy in (sints or {}).items():
            self.policy(sint, policy)
            auto_eoi = 1 << 17 if policy & NO_EOI else 0
            self.wrmsr(HV_X64_MSR_SINT0 + sint, (SINT_VECTOR + sint) | auto_eoi)
        if simp is not None:
            self.simp(simp)
        if siefp is not None:
            self.siefp(siefp)
        self.wrmsr(HV_X64_MSR_SCONTROL, 1)

    def simp(self, gpa: int | None) -> None:
        """Place the message page, or switch it off (None)."""
        assert self.do("SIMP", 0 if gpa is None else gpa | 1).fault is None

    def siefp(self, gpa: int | None) -> None:
        """Place the event flags page, or switch it off (None)."""
        assert self.do("SIEFP", 0 if gpa is None else gpa | 1).fault is None

    def policy(self, sint: int, bits: int) -> None:
        """What the interrupt handler does with SINT `sint`."""
        self._set("MB_POLICY", bits, sint)

    def eom(self) -> None:
        self.wrmsr(HV_X64_MSR_EOM, 0)

    # --- what the handlers saw --------------------------------------------------------------------

    def irqs(self, sint: int) -> int:
        """Interrupts taken at SINT_VECTOR + sint."""
        return self._get("MB_IRQS", sint)

    def counter(self, name: str, sint: int = 0) -> int:
        """Any counter of abi.inc: "MESSAGES", "WRONG", "EVENTS", "PENDING", "TIMERS", "EMPTY", "STRAY"..."""
        return self._get(f"MB_{name}", sint)

    def counter_gpa(self, name: str, sint: int = 0) -> int:
        """Where a counter lies, for OP_WAIT_*."""
        return self.base + ABI[f"MB_{name}"] + 8 * sint

    def messages(self) -> list[Message]:
        """Messages logged since the last call, oldest first; GuestStuckError if the ring overran."""
        head = self._get("MB_LOG_HEAD")
        if head - self._read_log > ABI["LOG_ENTRIES"]:
            raise GuestStuckError("the message log overran; read it more often or use CHECK")
        out = []
        for serial in range(self._read_log, head):
            gpa = ABI["LOG"] + self.index * ABI["LOG_SIZE"] + serial % ABI["LOG_ENTRIES"] * ABI["LOG_ENTRY"]
            raw = self.memory.read(gpa, 64 + 256)
            stamped, sint = struct.unpack_from("<QQ", raw)
            fields = struct.unpack_from("<IBBHQ", raw, 64)
            message = Message(stamped, sint, *fields, raw[80:320])
            assert stamped == serial, f"log entry {serial} is {message}"
            out.append(message)
        self._read_log = head
        return out

    def await_messages(self, count: int, seconds: float | None = None) -> list[Message]:
        """`count` messages from the log, waiting for them."""
        want = self._read_log + count
        self.agent.until(
            lambda: self._get("MB_LOG_HEAD") >= want, f"vcpu{self.index} logs {count} messages", seconds
        )
        return self.messages()

    def seen_flags(self, sint: int) -> set[int]:
        """Event flag numbers of `sint` that the handler cleared so far."""
        raw = self.memory.read(ABI["SEEN"] + self.index * 0x1000 + 256 * sint, 256)
        bits = int.from_bytes(raw, "little")
        return {number for number in range(2048) if bits >> number & 1}

    def set_next(self, sint: int, sequence: int) -> None:
        """CHECK: the sequence number due next."""
        self._set("MB_NEXT", sequence, sint)

    def expect_clean(self) -> None:
        """No interrupt at an unowned vector, no out-of-sequence message so far."""
        stray = self._get("MB_STRAY")
        assert not stray, (
            f"vcpu{self.index}: {stray} stray interrupts, last vector {self._get('MB_STRAY_VECTOR'):#x}"
        )
        for sint in range(SINTS):
            wrong = self._get("MB_WRONG", sint)
            got, due = self._get("MB_WRONG_GOT"), self._get("MB_WRONG_DUE")
            assert not wrong, (
                f"vcpu{self.index} SINT {sint}: {wrong} wrong messages, first {got:#x} for {due:#x}"
            )

    def state(self) -> str:
        """One line for a stuck test."""
        names = ("COMMAND", "DONE", "OPCODE", "IDLE", "HEARTBEAT", "HALTING", "IN_IRQ", "DOORBELLS", "STRAY")
        return f"vcpu{self.index}: " + " ".join(f"{name}={self._get(f'MB_{name}'):#x}" for name in names)

    def _get(self, name: str, index: int = 0) -> int:
        return self.memory.read_u64(self.base + ABI[name] + 8 * index)

    def _set(self, name: str, value: int, index: int = 0) -> None:
        self.memory.write_u64(self.base + ABI[name] + 8 * index, value)


class Agent:
    """The whole guest.

    `wake(index)` must send DOORBELL_VECTOR to a vCPU. `ended()` says how the machine
    ended, if it did; `describe()` what it does, for a stuck test's last words.
    """

    def __init__(
        self,
        memory: Memory,
        cpus: int,
        wake: Callable[[int], None],
        *,
        seconds: float = 100.0,
        ended: Callable[[], object | None] = lambda: None,
        describe: Callable[[], str] = lambda: "",
    ) -> None:
        self.memory = memory
        self.wake = wake
        self.seconds = seconds
        self.ended = ended
        self.describe = describe
        self.cpus = [AgentCpu(self, index) for index in range(cpus)]

    def __getitem__(self, index: int) -> AgentCpu:
        return self.cpus[index]

    @property
    def boots(self) -> int:
        """How often the boot CPU came through the entry point."""
        return self.memory.read_u64(ABI["HEADER"] + ABI["HEADER_BOOTS"]) & 0xFFFFFFFF

    def await_online(self, boots: int = 1) -> Agent:
        """Until every vCPU of boot number `boots` serves its mailbox; forgets what older boots logged."""
        header = ABI["HEADER"]

        def online() -> bool:
            return (
                self.boots >= boots
                and self.memory.read_u64(header + ABI["HEADER_MAGIC"]) == ABI["AGENT_MAGIC"]
                and self.memory.read_u64(header + ABI["HEADER_ONLINE"]) == len(self.cpus)
            )

        self.until(online, f"{len(self.cpus)} vCPUs come online in boot {boots}")
        for cpu in self.cpus:
            cpu._read_log = 0
        return self

    def until(self, done: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Poll `done` until true; GuestStuckError naming `what` at the deadline or when the machine ended."""
        deadline = time.monotonic() + (seconds or self.seconds)
        pause = 0.0002
        while not done():
            ended = self.ended()
            if ended is not None:
                raise GuestStuckError(f"the machine ended ({ended}) before {what}")
            if time.monotonic() > deadline:
                state = "\n".join(cpu.state() for cpu in self.cpus)
                raise GuestStuckError(
                    f"no {what} within {seconds or self.seconds:g} s\n{state}\n{self.describe()}"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.01)
