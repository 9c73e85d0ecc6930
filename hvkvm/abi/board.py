"""The board: every guest-visible port, line and address that hvkvm fixes, in one place.

The ACPI tables (`boot.acpi`) promise these numbers to the guest and the port
devices (`devices.port`) keep the promise, so neither may write them down again.
Numbers only, no state; any thread. Ports are x86 I/O ports, addresses are guest
physical (gpa), sizes are bytes, IRQs are GSIs of the single IOAPIC.
"""

from __future__ import annotations

# --- I/O ports -----------------------------------------------------------------------------------

COM1_PORT = 0x3F8
COM1_SIZE = 8
COM1_IRQ = 4
COM_PORTS = ((COM1_PORT, COM1_IRQ), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""COM1 to COM4 with their IRQs. A PC's: Linux without ACPI knows them by that, and copes with shared ones."""

CMOS_PORT = 0x70  # index, data
CMOS_SIZE = 2
PIT_IRQ = 0
RTC_IRQ = 8

HPET_ADDRESS = 0xFED00000  # a PC's; only on a machine that is asked to have one

I8042_COMMAND_PORT = 0x64  # only the reset pulse (0xFE) is kept; FADT says that there is no 8042

RESET_PORT = 0xCF9  # FADT RESET_REG
RESET_VALUE = 0x06  # FADT RESET_VALUE: CPU reset + hard reset

SCI_IRQ = 9
PM1A_EVT_PORT = 0x600  # PM1_STS u16 (write 1 to clear), PM1_EN u16 at +2
PM1A_EVT_SIZE = 4
PM1A_CNT_PORT = 0x604  # PM1_CNT u16
PM1A_CNT_SIZE = 2
PM_TMR_SIZE = 4  # behind both, at PM1A_EVT_PORT + 8, and only where there is PCI
PM1_CNT_SCI_EN = 1 << 0  # read as one always: FADT.SMI_CMD is 0, the board is in ACPI mode from reset
PM1_CNT_SLP_TYP_SHIFT = 10
PM1_CNT_SLP_TYP_MASK = 7 << PM1_CNT_SLP_TYP_SHIFT
PM1_CNT_SLP_EN = 1 << 13
S5_SLP_TYP = 5  # what DSDT's \_S5 names: PM1_CNT written with this SLP_TYP and SLP_EN is a power-off
PIIX4_S5_SLP_TYP = 0  # what firmware writes that takes the board for a PIIX4

GPE0_PORT = 0x620  # GPE0_STS u16 (write 1 to clear), GPE0_EN u16 at +2
GPE0_SIZE = 4
GPE_GENERATION = 0  # the VM generation id has changed: \_GPE._E00
GPE0_EVENTS = 1 << GPE_GENERATION

DEBUG_EXIT_PORT = 0xF4  # isa-debug-exit
DEBUG_EXIT_SIZE = 4
FW_CFG_PORT = 0x510  # selector u16; data byte at +1
FW_CFG_SIZE = 2
FW_CFG_DMA_PORT = 0x514  # a big-endian u64; only on machines with firmware
FW_CFG_DMA_SIZE = 8
HYPERV_TESTDEV_PORT = 0x3000
HYPERV_TESTDEV_SIZE = 4
GUEST_EXIT_PORT = 0x5F8  # the exit status of the command run in the guest, one byte
GUEST_EXIT_SIZE = 1
HYPERCALL_PORT = 0xE4  # our own hypercall page's `out imm8, eax`; nothing on a PC is there
HYPERCALL_PORT_SIZE = 4

# --- Interrupts ----------------------------------------------------------------------------------

IOAPIC_ADDRESS = 0xFEC00000
IOAPIC_ID = 0  # the reset value of its ID register in KVM; IOAPIC and LAPIC ids do not collide there
IOAPIC_GSI_BASE = 0
IOAPIC_PINS = 24
LAPIC_ADDRESS = 0xFEE00000
VMBUS_IRQ = 7  # the formality in VMBS._CRS; x86 guests take the SINT vector from their own allocation

# --- Physical address map ------------------------------------------------------------------------
# RAM lies at 0 up to RAM_LOW_LIMIT and goes on at RAM_HIGH_BASE.

RAM_LOW_LIMIT = 0xC0000000  # 3 GiB
RAM_HIGH_BASE = 0x1_0000_0000  # 4 GiB

MMIO_LOW_BASE = 0xE0000000  # the VMBus devices' window below 4 GiB (frame buffer, 32-bit BARs)
MMIO_LOW_SIZE = 0x1E000000  # 480 MiB: ends below the IOAPIC, LAPIC and the vTPM page at 0xFED40000
MMIO_HIGH_SIZE = 0x4_0000_0000  # 16 GiB
MMIO_HIGH_ALIGN = 0x4_0000_0000

# Below the firmware's ROM, which ends at 4 GiB, and above the LAPIC.
IDENTITY_MAP_ADDRESS = 0xFEFFC000  # KVM_SET_IDENTITY_MAP_ADDR: one page
TSS_ADDRESS = 0xFEFFD000  # KVM_SET_TSS_ADDR: three pages
FIRMWARE_END = 0x1_0000_0000  # the ROM's last byte is below it
FIRMWARE_LIMIT = 16 << 20  # so much of it at most
FIRMWARE_SHADOW_END = 0x10_0000  # the ROM's end is here, too, when a CPU starts
FIRMWARE_SHADOW_SIZE = 128 << 10  # so much of it at most, as with the i440FX

ORDERS_ADDRESS = 0xD0000000  # where a warm guest finds what it shall run: see abi.guest_orders
ORDERS_SIZE = 0x10000000  # 256 MiB at most, up to the VMBus devices' window


# --- Low megabyte, where the loaders put what the kernel reads at entry ---------------------------
# Page 0 stays empty: kvm-unit-tests and Linux put their AP trampolines near it.

GDT_ADDRESS = 0x1000
PVH_START_INFO_ADDRESS = 0x2000
MULTIBOOT_INFO_ADDRESS = 0x3000
ZERO_PAGE_ADDRESS = 0x7000  # struct boot_params
SETUP_DATA_ADDRESS = 0x8000
BOOT_STACK_ADDRESS = 0x9000  # grows down, into the setup_data page's free upper end
PAGE_TABLES_ADDRESS = 0xA000  # PML4, PDPT and one page directory per identity-mapped GiB
COMMAND_LINE_ADDRESS = 0x20000
COMMAND_LINE_LIMIT = 0x10000  # bytes, the closing NUL included
LOW_RAM_END = 0x9FC00  # conventional memory ends where a BIOS would keep its EBDA
ACPI_AREA_ADDRESS = 0xE0000  # RSDP first: guests that are told nothing scan from here
ACPI_AREA_SIZE = 0x20000
SMBIOS_ADDRESS = 0xF0000  # the entry point, where guests scan for it, and its tables behind it
GENERATION_ADDRESS = 0xFE000  # the VM generation id, 16 bytes in a page of its own; tables end before it
GENERATION_SIZE = 16
RESET_VECTOR_ADDRESS = 0xFFFF0  # F000:FFF0, where a BIOS starts: a guest that jumps there wants a reset
KERNEL_ADDRESS = 0x100000


def ram_end(memory_size: int) -> int:
    """The gpa after the last byte of RAM for `memory_size` bytes of it, split as RAM_LOW_LIMIT says."""
    if memory_size <= RAM_LOW_LIMIT:
        return memory_size
    return RAM_HIGH_BASE + memory_size - RAM_LOW_LIMIT


def mmio_high_base(memory_size: int) -> int:
    """Start of the VMBus devices' window above RAM: the first 16 GiB boundary past it.

    As low as can be, because a guest may have as few as 36 physical address bits.
    """
    end = max(ram_end(memory_size), RAM_HIGH_BASE)
    return -(-end // MMIO_HIGH_ALIGN) * MMIO_HIGH_ALIGN
