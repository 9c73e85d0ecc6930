"""Bits of x86's own registers: control registers, EFER, RFLAGS (SDM volume 3, 2.2 to 2.5)."""

from __future__ import annotations

X86_CR0_PE = 1 << 0
X86_CR0_ET = 1 << 4
X86_CR0_PG = 1 << 31
X86_CR4_PAE = 1 << 5

EFER_LME = 1 << 8
EFER_LMA = 1 << 10

X86_EFLAGS_FIXED = 1 << 1
"""Always one."""
X86_EFLAGS_VM = 1 << 17
