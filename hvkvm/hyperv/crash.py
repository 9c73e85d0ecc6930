"""A guest's own account of its crash, out of the Hyper-V crash MSRs.

A guest that panics fills HV_X64_MSR_CRASH_P0..P4 and writes HV_X64_MSR_CRASH_CTL,
in one of two forms: a message (P3 its gpa, P4 its length in bytes, P0-P2 zero)
or five register values. Called on the panicking vCPU's thread.
"""

from __future__ import annotations

from typing import Protocol

from hvkvm.abi import tlfs
from hvkvm.abi.tlfs import HV_CRASH_CTL_CRASH_NOTIFY_MSG
from hvkvm.errors import GuestMemoryError

MAX_TEXT = 4096
"""Bytes of message that are read: a guest has one page for it."""

CRASH_PARAMETERS = tuple(tlfs.HV_X64_MSR_CRASH_P0 + i for i in range(5))


class MsrReader(Protocol):
    """What is needed of a Vcpu."""

    def msrs(self, indices: tuple[int, ...]) -> dict[int, int]: ...


class TextReader(Protocol):
    """What is needed of GuestMemory; raises GuestMemoryError outside RAM."""

    def read(self, gpa: int, n: int) -> bytes: ...


def crash_text(vcpu: MsrReader, memory: TextReader) -> str:
    """What the guest says, for KVM_SYSTEM_EVENT_CRASH. KVM keeps P0..P4, but not what went into CRASH_CTL.

    Raises KvmIoctlError if KVM will not give the MSRs.
    """
    values = vcpu.msrs(CRASH_PARAMETERS)
    return panic_text([values[index] for index in CRASH_PARAMETERS], memory)


def panic_text(parameters: list[int], memory: TextReader, ctl: int | None = None) -> str:
    """The text for P0..P4. `ctl` is CRASH_CTL as written; None where nobody knows: the form is then guessed.

    Safe for a terminal: control characters do not survive.
    """
    p0, p1, p2, p3, p4 = parameters
    by_message = (
        not (p0 or p1 or p2) and bool(p4) if ctl is None else bool(ctl & HV_CRASH_CTL_CRASH_NOTIFY_MSG)
    )
    if by_message:
        if not p3 or not p4:
            return "the guest crashed and gave no message"
        try:
            text = _readable(memory.read(p3, min(p4, MAX_TEXT)))
        except GuestMemoryError:
            return f"the guest crashed; its message at gpa {p3:#x} is outside RAM"
        return text or "the guest crashed with an empty message"
    return (
        f"the guest crashed: error {p0:#x}, guest OS id {p1:#x}, rip {p2:#x}, rax {p3:#x}, rsp {p4:#x}"
        " (as Linux fills them)"
    )


def _readable(data: bytes) -> str:
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    return "".join(c if c == "\n" or c.isprintable() else " " for c in text).strip()
