"""Bits of x86's own registers: control registers, EFER, RFLAGS (SDM volume 3, 2.2 to 2.5), MTRRs (12.11)."""

from __future__ import annotations

X86_CR0_PE = 1 << 0
X86_CR0_ET = 1 << 4
X86_CR0_PG = 1 << 31
X86_CR4_PAE = 1 << 5

EFER_LME = 1 << 8
EFER_LMA = 1 << 10

X86_EFLAGS_FIXED = 1 << 1
"""Always one."""
X86_EFLAGS_IF = 1 << 9
X86_EFLAGS_VM = 1 << 17

MSR_MTRRdefType = 0x2FF
"""What memory is that no other MTRR names."""
MTRR_DEF_TYPE_E = 1 << 11
"""MTRRs are on; the fixed ones of the first MiB have a bit of their own."""
MTRR_TYPE_WRBACK = 6
