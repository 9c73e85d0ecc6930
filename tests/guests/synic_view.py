"""What a guest that runs the agent has seen so far, as values to compare: interrupts, slots, flags.

Used by `synic_recorder`. Time appears nowhere in it. Any thread, while no vCPU is busy.
"""

from __future__ import annotations

from struct import unpack_from

from guest_agent import ABI, SINTS
from guest_machine import Guest
from synic_program import PAGE

from hvkvm.abi.hv_synic import HVMSG_TIMER_EXPIRED

View = dict[str, object]
_COUNTERS = (("MB_IRQS", "interrupts"), ("MB_MESSAGES", "messages"), ("MB_TIMERS", "timer messages"))


def look(guest: Guest) -> View:
    """Counters of every VP's handlers, and its two pages wherever it has placed them."""
    seen: View = {}
    memory = guest.machine.memory
    for cpu in guest.agent.cpus:
        name = f"vp{cpu.index}"
        # One copy of the mailbox: reading counter by counter costs more than the operation.
        mailbox = memory.read(cpu.base, ABI["MB_LOG_HEAD"])
        for counter, text in _COUNTERS:
            for sint, value in enumerate(unpack_from("<16Q", mailbox, ABI[counter])):
                seen[f"{name} sint{sint} {text}"] = value
        for counter, text in (("DIRECT", "direct interrupts"), ("STRAY", "stray interrupts")):
            seen[f"{name} {text}"] = cpu.counter(counter)
        for register, shown in (("MB_SIMP", _slots), ("MB_SIEFP", _flags)):
            gpa = memory.read_u64(cpu.base + ABI[register])
            if gpa and memory.contains(gpa, PAGE):
                seen |= {f"{name} {key}": value for key, value in shown(memory.read(gpa, PAGE)).items()}
    return seen


def changes(before: View, now: View) -> list[str]:
    """What is in `now` and was not in `before`; a page that is nowhere counts as empty."""
    out = []
    for key, value in now.items():
        if isinstance(value, int):
            old = before.get(key, 0)
            if value != old:
                out.append(f"{key} +{value - (old if isinstance(old, int) else 0)}")
        elif value != before.get(key, "empty"):
            out.append(f"{key}: {value}")
    return out


def _slots(page: bytes) -> View:
    found: View = {}
    for sint in range(SINTS):
        kind, size, flags, reserved, sender = unpack_from("<IBBHQ", page, 256 * sint)
        if not kind:
            found[f"slot{sint}"] = "empty"
            continue
        text = f"type {kind:#x} size {size} flags {flags:#x}" + (f" sender {sender:#x}" if sender else "")
        text += f" reserved {reserved:#x}" if reserved else ""
        if kind == HVMSG_TIMER_EXPIRED:
            index, zero, expired, delivered = unpack_from("<IIQQ", page, 256 * sint + 16)
            text += f" timer {index} {zero} " + (f"due {expired}" if expired < 1000 else "due later")
            text += "" if delivered >= expired else " delivered before it was due"
        elif size:
            text += f" payload {sorted(set(page[256 * sint + 16 : 256 * sint + 16 + size]))}"
        found[f"slot{sint}"] = text
    return found


def _flags(page: bytes) -> View:
    bits = int.from_bytes(page, "little")
    flags = []
    while bits:
        flags.append((bits & -bits).bit_length() - 1)
        bits &= bits - 1
    return {"flags": " ".join(f"{flag >> 11}:{flag & 2047}" for flag in flags) or "empty"}
