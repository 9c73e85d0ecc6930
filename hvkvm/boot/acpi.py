"""The ACPI tables: RSDP, XSDT, FADT, FACS, MADT, those of a PC, and a DSDT with COM1 and VMBus.

Why: without ACPI a guest finds neither its other CPUs nor the VMBus, and cannot
power off. Called by the loaders through `boot.image`. Pure: `build` returns
bytes and the address they belong at; any thread. Source: ACPI 6.5 (sections
5.2.5 to 5.2.12), Linux arch/x86/kernel/acpi/boot.c for what each flag spares.

What is left out on purpose, because each costs a guest boot time or a driver:
- a PM timer (PM_TMR_BLK 0, optional since ACPI 5.0A), where there is no PCI: a port exit
  for every read; guests have the Hyper-V reference time, or the TSC. Firmware wants one.
- CPU devices (ACPI0007): the MADT suffices, and no cpuidle driver is bound.
- 8042, without PCI an RTC (PNP0B00), unless asked for an HPET: not on the board. FADT says so, and
  Linux then skips their probes. It reads the time of day from CMOS regardless
  (mach_get_cmos_time, up to a second of retries when nobody answers), which is
  why the board has CMOS_PORT.
HW_REDUCED is not set: the board does have PIC, PIT and PM1 registers, and Linux
drops the first two when it sees that flag.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hvkvm.abi import board
from hvkvm.abi.pci import PM_TIMER_OFFSET
from hvkvm.boot import acpi_pc, aml
from hvkvm.boot.acpi_table import HEADER_SIZE, OEM_ID, checksum, port_address, table
from hvkvm.errors import BootError
from hvkvm.tuples import NamedTuple

_ALIGN = 64  # FACS demands it; the others do not mind

FADT_SIZE = 276
_FADT_MINOR = 5
_MADT_REVISION = 6
"""The one that belongs to a FADT of revision 6.5."""

MADT_LOCAL_APIC = 0
MADT_IO_APIC = 1
MADT_INTERRUPT_SOURCE_OVERRIDE = 2
MADT_LOCAL_APIC_NMI = 4
MADT_LOCAL_X2APIC = 9
MADT_LOCAL_X2APIC_NMI = 10
_APIC_ENABLED = 1
_MADT_PCAT_COMPAT = 1
_MPS_ACTIVE_HIGH_LEVEL = 0b1101
_ALL_UIDS_8 = 0xFF
_ALL_UIDS_32 = 0xFFFFFFFF
LAST_XAPIC_ID = 254  # 255 is the xAPIC broadcast; from there on only x2APIC entries can name a CPU

# FADT IAPC_BOOT_ARCH. LEGACY_DEVICES (bit 0) and 8042 (bit 1) are left clear: neither is there.
ACPI_FADT_NO_VGA = 1 << 2
ACPI_FADT_NO_CMOS_RTC = 1 << 5
# MSI Not Supported (bit 3) is left clear too: vPCI devices use MSI.

# FADT Flags.
ACPI_FADT_WBINVD = 1 << 0
ACPI_FADT_C1_SUPPORTED = 1 << 2
ACPI_FADT_POWER_BUTTON = 1 << 4  # clear: the power button is PM1's own; set it would be a DSDT device
ACPI_FADT_SLEEP_BUTTON = 1 << 5  # set: no sleep button in PM1 (and none in the DSDT)
ACPI_FADT_FIXED_RTC = 1 << 6  # set: the RTC's alarm is no event of PM1
ACPI_FADT_RESET_REGISTER = 1 << 10

_NO_C2 = 0xFFF  # a latency above 100 us says: no such state (C3: above 1000)


class Pointer(NamedTuple):
    """`size` bytes at `offset` of the image hold the guest address of a table in it."""

    offset: int
    size: int


class Checksum(NamedTuple):
    """The byte at `offset` of the image makes `length` bytes from `start` sum up to 0."""

    offset: int
    start: int
    length: int


class FixedHardware(NamedTuple):
    """Where the ACPI blocks are: PM1_EVT at `base`, PM1_CNT 4 ports on, and 8 on a PC's PM timer."""

    base: int = board.PM1A_EVT_PORT
    is_pc: bool = False
    """A machine with PCI: it has a PM timer and an RTC."""
    has_hpet: bool = False


DEFAULT_FIXED = FixedHardware()


class AcpiTables(NamedTuple):
    """`image` belongs at guest address `address`; the RSDP is at its start.

    `pointers` and `checksums` are what somebody must mend who places it elsewhere.
    """

    address: int
    image: bytes
    pointers: tuple[Pointer, ...] = ()
    checksums: tuple[Checksum, ...] = ()

    @property
    def rsdp(self) -> int:
        """Where the RSDP is."""
        return self.address


def build(
    cpus: int,
    memory_size: int,
    *,
    vmbus: bool = True,
    serial_ports: int = 1,
    devices: Sequence[bytes] = (),
    fixed: FixedHardware = DEFAULT_FIXED,
    address: int = board.ACPI_AREA_ADDRESS,
    generation: bool = True,
) -> AcpiTables:
    """All tables for `cpus` vCPUs (APIC id = index) and `memory_size` bytes of RAM, to lie at `address`.

    `vmbus` False leaves the VMBus and its MMIO windows out; there are COM1 and
    its like, `serial_ports` of them. `devices` are terms (AML) that other parts of the machine
    bring, for the scope of \\_SB. `generation`: there is a VM generation id at board.GENERATION_ADDRESS.
    Raises BootError when more CPUs are asked for than the ACPI area can name.
    """
    image = bytearray(_ALIGN)  # room for the RSDP, which is written last
    checksums = [Checksum(8, 0, 20), Checksum(32, 0, 36)]

    def place(made: bytes) -> int:
        image.extend(bytes(-len(image) % _ALIGN))
        at = len(image)
        image.extend(made)
        checksums.append(Checksum(at + 9, at, len(made)))
        return address + at

    facs = place(_facs())
    checksums.pop()  # the one table without
    terms = [_vm_generation(), *devices] if generation else devices
    dsdt = place(_dsdt(memory_size, vmbus=vmbus, serial_ports=serial_ports, devices=terms, events=generation))
    fadt = place(_fadt(facs, dsdt, fixed))
    madt = place(_madt(cpus))
    listed = [fadt, madt]
    if fixed.is_pc:
        listed += [place(acpi_pc.waet()), place(acpi_pc.spcr())]
    if fixed.has_hpet:
        listed.append(place(acpi_pc.hpet_table()))
    xsdt = place(table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    image[: len(_rsdp(xsdt))] = _rsdp(xsdt)
    if len(image) > board.SMBIOS_ADDRESS - board.ACPI_AREA_ADDRESS:
        raise BootError(f"--cpus {cpus}: more than the ACPI tables can name; give fewer")
    at = fadt - address
    pointers = [Pointer(24, 8), Pointer(at + 36, 4), Pointer(at + 40, 4), Pointer(at + 140, 8)]
    pointers += [Pointer(xsdt - address + HEADER_SIZE + 8 * index, 8) for index in range(len(listed))]
    return AcpiTables(address, bytes(image), tuple(pointers), tuple(checksums))


def _rsdp(xsdt: int) -> bytes:
    first = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, 0))
    first[8] = checksum(first)
    whole = bytearray(first + struct.pack("<IQB3x", 36, xsdt, 0))
    whole[32] = checksum(whole)
    return bytes(whole)


def _facs() -> bytes:
    # Version 2, no waking vector, no hardware signature: this board neither sleeps nor hibernates itself.
    return struct.pack("<4sI4x4x4x4x8xB31x", b"FACS", 64, 2)


def _fadt(facs: int, dsdt: int, fixed: FixedHardware) -> bytes:
    """FADT revision 6.5. Each register is given in both its old and its X_ form, and they agree."""
    fadt = bytearray(FADT_SIZE - HEADER_SIZE)

    def put(offset: int, code: str, *values: int) -> None:
        struct.pack_into("<" + code, fadt, offset - HEADER_SIZE, *values)

    put(36, "II", facs, dsdt)
    put(46, "H", board.SCI_IRQ)
    control = fixed.base + board.PM1A_CNT_PORT - board.PM1A_EVT_PORT
    put(56, "I", fixed.base)
    put(64, "I", control)
    put(88, "BB", board.PM1A_EVT_SIZE, board.PM1A_CNT_SIZE)
    put(96, "HH", _NO_C2, _NO_C2)
    put(109, "H", ACPI_FADT_NO_VGA | (0 if fixed.is_pc else ACPI_FADT_NO_CMOS_RTC))
    put(
        112,
        "I",
        ACPI_FADT_WBINVD
        | ACPI_FADT_C1_SUPPORTED
        | ACPI_FADT_SLEEP_BUTTON
        | (0 if fixed.is_pc else ACPI_FADT_FIXED_RTC)
        | ACPI_FADT_RESET_REGISTER,
    )
    fadt[116 - HEADER_SIZE : 128 - HEADER_SIZE] = port_address(board.RESET_PORT, 8, 1)
    put(128, "B", board.RESET_VALUE)
    put(131, "B", _FADT_MINOR)
    put(140, "Q", dsdt)  # X_FIRMWARE_CTRL stays 0: Linux would list the FACS twice
    # Access size word: Linux would split a dword access to the two event registers anyway.
    fadt[148 - HEADER_SIZE : 160 - HEADER_SIZE] = port_address(fixed.base, 8 * board.PM1A_EVT_SIZE, 2)
    fadt[172 - HEADER_SIZE : 184 - HEADER_SIZE] = port_address(control, 8 * board.PM1A_CNT_SIZE, 2)
    put(80, "I", board.GPE0_PORT)
    put(92, "B", board.GPE0_SIZE)
    fadt[220 - HEADER_SIZE : 232 - HEADER_SIZE] = port_address(board.GPE0_PORT, 8 * board.GPE0_SIZE, 1)
    if fixed.is_pc:
        put(76, "I", fixed.base + PM_TIMER_OFFSET)
        put(91, "B", board.PM_TMR_SIZE)
        fadt[208 - HEADER_SIZE : 220 - HEADER_SIZE] = port_address(fixed.base + PM_TIMER_OFFSET, 32, 3)
    return table(b"FACP", 6, bytes(fadt))


def _madt(cpus: int) -> bytes:
    body = bytearray(struct.pack("<II", board.LAPIC_ADDRESS, _MADT_PCAT_COMPAT))
    for index in range(cpus):
        if index <= LAST_XAPIC_ID:
            body += struct.pack("<BBBBI", MADT_LOCAL_APIC, 8, index, index, _APIC_ENABLED)
        else:
            body += struct.pack("<BBHIII", MADT_LOCAL_X2APIC, 16, 0, index, _APIC_ENABLED, index)
    body += struct.pack(
        "<BBBBII", MADT_IO_APIC, 12, board.IOAPIC_ID, 0, board.IOAPIC_ADDRESS, board.IOAPIC_GSI_BASE
    )
    # No override for ISA IRQ 0: KVM's default routing leaves the PIT on IOAPIC pin 0, where PCs use pin 2.
    # With one, Linux waits for a tick that never comes.
    sci = board.SCI_IRQ
    body += struct.pack("<BBBBIH", MADT_INTERRUPT_SOURCE_OVERRIDE, 10, 0, sci, sci, _MPS_ACTIVE_HIGH_LEVEL)
    body += struct.pack("<BBBHB", MADT_LOCAL_APIC_NMI, 6, _ALL_UIDS_8, 0, 1)
    if cpus - 1 > LAST_XAPIC_ID:
        body += struct.pack("<BBHIB3x", MADT_LOCAL_X2APIC_NMI, 12, 0, _ALL_UIDS_32, 1)
    return table(b"APIC", _MADT_REVISION, bytes(body))


def _dsdt(
    memory_size: int, *, vmbus: bool, serial_ports: int, devices: Sequence[bytes], events: bool
) -> bytes:
    board_devices = [_serial(index) for index in range(serial_ports)]
    if vmbus:
        board_devices.append(_vmbus_module(memory_size))
    sleep_type = aml.integer(board.S5_SLP_TYP)
    terms = [
        aml.name("\\_S5", aml.package(sleep_type, sleep_type, aml.ZERO, aml.ZERO)),
        aml.scope("\\_SB", *board_devices, *devices),
    ]
    if events:
        told = aml.notify("\\_SB.VGID", 0x80)
        terms.append(aml.scope("\\_GPE", aml.method(f"_E{board.GPE_GENERATION:02X}", told)))
    return table(b"DSDT", 2, b"".join(terms))


def _serial(index: int) -> bytes:
    port, irq = board.COM_PORTS[index]
    resources = aml.resource_template(aml.io_ports(port, board.COM1_SIZE), aml.irq_no_flags(irq))
    return aml.device(
        f"COM{index + 1}",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(index + 1)),
        aml.name("_CRS", resources),
    )


def _vm_generation() -> bytes:
    """The VM generation id, as Microsoft's paper of that name has it: found by its _CID, placed by ADDR.

    What it has for a _HID is the maker's own. Linux's driver (since 5.18) matches the _CID in capitals, as
    ACPICA hands it out.
    """
    low, high = board.GENERATION_ADDRESS & 0xFFFFFFFF, board.GENERATION_ADDRESS >> 32
    return aml.device(
        "VGID",
        aml.name("_HID", aml.string("HVKV0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def _vmbus_module(memory_size: int) -> bytes:
    r"""\_SB.VMOD, which owns the MMIO windows, and in it VMBS: the shape that Hyper-V's own firmware has.

    Linux takes the windows from the nearest ancestor with a _CRS and matches
    the bus by its _CID ("VMBus" is the only name that 6.1 knows); Windows
    knows both names. _PS3 is a method, not a Name, by ACPI 6.5 7.3.5.
    """
    windows = aml.resource_template(
        aml.dword_memory(board.MMIO_LOW_BASE, board.MMIO_LOW_SIZE),
        aml.qword_memory(board.mmio_high_base(memory_size), board.MMIO_HIGH_SIZE),
    )
    bus = aml.device(
        "VMBS",
        aml.name("STA", aml.integer(0xF)),
        aml.name("_HID", aml.string("MSFT1000")),
        aml.name("_CID", aml.string("VMBus")),
        aml.name("_UID", aml.ZERO),
        aml.name("_DDN", aml.string("VMBUS")),
        aml.method("_DIS", aml.and_into("STA", 0xD)),
        aml.method("_PS0", aml.or_into("STA", 0xF)),
        aml.method("_STA", aml.return_(aml.name_string("STA"))),
        aml.method("_PS3"),
        aml.name("_CRS", aml.resource_template(aml.irq_no_flags(board.VMBUS_IRQ))),
    )
    return aml.device(
        "VMOD",
        aml.name("_HID", aml.string("ACPI0004")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", windows),
        bus,
    )
