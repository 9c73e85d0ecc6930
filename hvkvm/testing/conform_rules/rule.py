"""One rule of `hvkvm conform`: a small program for a micro guest, and what it should see."""

from __future__ import annotations

from typing import NamedTuple

FAULT = 1 << 32
"""Added to an exception's vector: what a row saw that took it."""


class Rule(NamedTuple):
    """One row. `expected` values are right; `absent` ones say that this VMM has no such thing."""

    name: str
    title: str
    code: str
    expected: tuple[int, ...]
    absent: tuple[int, ...] = ()
    least: bool = False
    """Whether what is more than expected is right too."""

    def verdict(self, seen: int) -> str:
        """ "ok", "absent" or "not ok"."""
        if seen in self.expected or (self.least and not seen & FAULT and seen >= self.expected[0]):
            return "ok"
        return "absent" if seen in self.absent else "not ok"


def post(connection: int, size: int, *words: int, message_type: int = 1, at: str = "pages") -> str:
    """Post a message whose payload begins with `words`, 4 bytes each."""
    lines = [f"movl ${at}, %ebx", f"movl ${connection}, (%rbx)", "movl $0, 4(%rbx)"]
    lines += [f"movl ${message_type}, 8(%rbx)", f"movl ${size}, 12(%rbx)"]
    lines += [f"movl ${word}, {16 + 4 * index}(%rbx)" for index, word in enumerate(words)]
    lines += [f"hypercall $0x5c, ${at}"]
    return "\n".join(lines)


def slot(sint: int) -> str:
    """Wait for a message in a slot: its type is in eax, the slot in rsi."""
    return f"movl $(pages + 0x1000 + 256 * {sint}), %esi\ncall wait_message"


def testdev(command: int, connection: int, sint: int) -> str:
    value = connection << 24 | command << 16 | sint
    return f"movl ${value:#x}, %eax\nmovw $0x3000, %dx\noutl %eax, %dx"


NO_DEVICE = (0xFFFF,)
"""Seen where there is no hyperv-testdev."""
NO_BUS = (18,)
"""Seen where there is no VMBus host."""
