"""The HPET's registers and bits, by the names of Linux's asm/hpet.h.

Numbers only. Offsets and sizes are bytes, periods femtoseconds. Source: IA-PC HPET specification 1.0a.
"""

from __future__ import annotations

HPET_SIZE = 0x400

HPET_ID = 0x000
HPET_CFG = 0x010
HPET_STATUS = 0x020
HPET_COUNTER = 0x0F0
HPET_T0 = 0x100
"""Of timer 0: its configuration, its comparator 8 bytes on; the next timer's come HPET_TN_SIZE later."""
HPET_TN_SIZE = 0x20
HPET_TN_CMP = 0x08

HPET_ID_REV = 0x01
HPET_ID_NUMBER_SHIFT = 8
HPET_ID_64BIT = 1 << 13
HPET_ID_LEGSUP = 1 << 15
HPET_ID_VENDOR_SHIFT = 16
HPET_PERIOD_SHIFT = 32

TIMERS = 3
PERIOD_FS = 10_000_000
"""10 ns: 100 MHz, as QEMU has it."""
TICK_NS = PERIOD_FS // 1_000_000
MIN_TICK = 0x80
"""Of the ACPI table: the least count between two periodic interrupts for which none is said to be lost."""
CAPABILITIES = (
    HPET_ID_REV
    | TIMERS - 1 << HPET_ID_NUMBER_SHIFT
    | HPET_ID_64BIT
    | HPET_ID_LEGSUP
    | 0x8086 << HPET_ID_VENDOR_SHIFT
)
"""The lower half of the identification register: ours."""

HPET_CFG_ENABLE = 1 << 0
HPET_CFG_LEGACY = 1 << 1

HPET_TN_LEVEL = 1 << 1
HPET_TN_ENABLE = 1 << 2
HPET_TN_PERIODIC = 1 << 3
HPET_TN_PERIODIC_CAP = 1 << 4
HPET_TN_64BIT_CAP = 1 << 5
HPET_TN_SETVAL = 1 << 6
HPET_TN_32BIT = 1 << 8
HPET_TN_ROUTE_SHIFT = 9
HPET_TN_ROUTE = 0x1F << HPET_TN_ROUTE_SHIFT
HPET_TN_ROUTE_CAP_SHIFT = 32
