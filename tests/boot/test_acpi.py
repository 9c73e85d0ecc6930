"""The ACPI tables: checksums, what they promise about the board, and what `iasl` makes of them."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import fwts_runs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iasl_runs import iasl, shows_resources

from hvkvm.abi import board
from hvkvm.boot import acpi
from hvkvm.boot.acpi_pci import devices
from hvkvm.errors import BootError

MIB = 1 << 20


class Tables:
    """Follows the pointers as a guest does."""

    def __init__(
        self,
        cpus: int = 2,
        memory: int = 512 * MIB,
        *,
        vmbus: bool = True,
        serial_ports: int = 1,
        pci: bool = False,
    ) -> None:
        fixed = acpi.FixedHardware(is_pc=pci)
        terms = devices(memory, hpet=False) if pci else ()
        self.built = acpi.build(
            cpus, memory, vmbus=vmbus, serial_ports=serial_ports, fixed=fixed, devices=terms
        )
        self.rsdp = self.bytes_at(self.built.rsdp, 36)
        self.xsdt = self.table(struct.unpack_from("<Q", self.rsdp, 24)[0])
        pointers = struct.unpack(f"<{(len(self.xsdt) - 36) // 8}Q", self.xsdt[36:])
        listed = [self.table(pointer) for pointer in pointers]
        self.by_name = {table[:4].decode(): table for table in listed}
        fadt = self.by_name["FACP"]
        self.by_name["DSDT"] = self.table(struct.unpack_from("<Q", fadt, 140)[0])
        self.facs_address = struct.unpack_from("<I", fadt, 36)[0]
        self.facs = self.bytes_at(self.facs_address, 64)

    def bytes_at(self, address: int, n: int) -> bytes:
        at = address - self.built.address
        assert at >= 0
        assert at + n <= len(self.built.image)
        return self.built.image[at : at + n]

    def table(self, address: int) -> bytes:
        (length,) = struct.unpack_from("<I", self.bytes_at(address, 8), 4)
        return self.bytes_at(address, length)

    def madt_entries(self) -> list[bytes]:
        madt, at, entries = self.by_name["APIC"], 44, []
        while at < len(madt):
            assert madt[at + 1] >= 2
            entries.append(madt[at : at + madt[at + 1]])
            at += madt[at + 1]
        assert at == len(madt)
        return entries


@given(cpus=st.integers(1, 600), gib=st.integers(1, 600), vmbus=st.booleans())
def test_every_checksum_and_header(cpus: int, gib: int, vmbus: bool) -> None:
    tables = Tables(cpus, gib << 30, vmbus=vmbus)
    assert tables.rsdp[:8] == b"RSD PTR "
    assert sum(tables.rsdp[:20]) % 256 == 0
    assert sum(tables.rsdp) % 256 == 0
    assert tables.rsdp[15] == 2
    assert struct.unpack_from("<I", tables.rsdp, 20)[0] == 36
    assert set(tables.by_name) == {"FACP", "APIC", "DSDT"}
    for table in (tables.xsdt, *tables.by_name.values()):
        assert sum(table) % 256 == 0
    assert tables.facs[:8] == b"FACS" + struct.pack("<I", 64)
    assert tables.facs_address % 64 == 0
    assert tables.built.address == board.ACPI_AREA_ADDRESS
    assert tables.built.address + len(tables.built.image) <= board.SMBIOS_ADDRESS


def test_fadt_names_the_boards_ports() -> None:
    fadt = Tables().by_name["FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 5)
    assert struct.unpack_from("<H", fadt, 46)[0] == board.SCI_IRQ
    assert struct.unpack_from("<I", fadt, 48)[0] == 0  # SMI_CMD: ACPI mode from reset
    assert struct.unpack_from("<II", fadt, 56) == (board.PM1A_EVT_PORT, 0)
    assert struct.unpack_from("<II", fadt, 64) == (board.PM1A_CNT_PORT, 0)
    assert fadt[88:92] == bytes([4, 2, 0, 0])
    assert struct.unpack_from("<BBBBQ", fadt, 148) == (1, 32, 0, 2, board.PM1A_EVT_PORT)
    assert struct.unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 2, board.PM1A_CNT_PORT)
    assert struct.unpack_from("<II", fadt, 80) == (board.GPE0_PORT, 0)
    assert fadt[92:94] == bytes([board.GPE0_SIZE, 0])
    assert struct.unpack_from("<BBBBQ", fadt, 220) == (1, 32, 0, 1, board.GPE0_PORT)
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, board.RESET_PORT, board.RESET_VALUE)
    (boot_arch,) = struct.unpack_from("<H", fadt, 109)
    assert boot_arch == acpi.ACPI_FADT_NO_VGA | acpi.ACPI_FADT_NO_CMOS_RTC  # no legacy, no 8042; MSI works
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & acpi.ACPI_FADT_RESET_REGISTER
    assert not flags & acpi.ACPI_FADT_POWER_BUTTON  # PM1 has it
    assert flags & acpi.ACPI_FADT_SLEEP_BUTTON
    assert not flags & 1 << 20  # HW_REDUCED


@given(st.integers(1, 600))
def test_madt_names_each_cpu_once_in_order(cpus: int) -> None:
    tables = Tables(cpus)
    ids = []
    for entry in tables.madt_entries():
        if entry[0] == acpi.MADT_LOCAL_APIC:
            uid, apic_id, flags = struct.unpack_from("<BBI", entry, 2)
            assert (len(entry), apic_id <= 254) == (8, True)
        elif entry[0] == acpi.MADT_LOCAL_X2APIC:
            apic_id, flags, uid = struct.unpack_from("<III", entry, 4)
            assert (len(entry), apic_id > 254) == (16, True)
        else:
            continue
        assert (uid, flags) == (apic_id, 1)
        ids.append(apic_id)
    assert ids == list(range(cpus))


@pytest.mark.parametrize(("cpus", "nmi_kinds"), [(1, [4]), (255, [4]), (256, [4, 10])])
def test_madt_interrupts(cpus: int, nmi_kinds: list[int]) -> None:
    entries = Tables(cpus).madt_entries()
    assert [entry[0] for entry in entries if entry[0] in (4, 10)] == nmi_kinds
    (ioapic,) = [entry for entry in entries if entry[0] == acpi.MADT_IO_APIC]
    assert struct.unpack_from("<II", ioapic, 4) == (board.IOAPIC_ADDRESS, 0)
    overrides = [struct.unpack_from("<BBIH", entry, 2) for entry in entries if entry[0] == 2]
    assert overrides == [
        (0, 9, 9, 0b1101)
    ]  # SCI level, active high; all else as KVM's default routing has it


def test_too_many_cpus_is_said() -> None:
    with pytest.raises(BootError, match="--cpus 9000"):
        acpi.build(9000, 512 * MIB)


def test_dsdt_without_vmbus_has_no_bus_and_no_windows() -> None:
    assert b"VMBS" in Tables().by_name["DSDT"]
    dsdt = Tables(vmbus=False).by_name["DSDT"]
    assert b"VMBS" not in dsdt
    assert b"VMOD" not in dsdt
    assert b"COM1" in dsdt
    assert b"COM2" not in dsdt


def test_the_serial_console_is_com1() -> None:
    """Where Windows' Emergency Management Services look for it: SPCR, revision 2."""
    spcr = Tables(pci=True).by_name["SPCR"]
    assert (len(spcr), spcr[8], spcr[36]) == (80, 2, 0)
    assert struct.unpack_from("<BBBBQ", spcr, 40) == (1, 8, 0, 1, board.COM1_PORT)
    assert struct.unpack_from("<BBIB", spcr, 52) == (3, board.COM1_IRQ, board.COM1_IRQ, 7)
    assert struct.unpack_from("<HH", spcr, 64) == (0xFFFF, 0xFFFF), "no PCI device"


def test_more_serial_ports_are_in_the_dsdt_where_a_pc_has_them(tmp_path: Path) -> None:
    (tmp_path / "DSDT.dat").write_bytes(Tables(serial_ports=4).by_name["DSDT"])
    iasl(tmp_path, "-d", "DSDT.dat")
    text = (tmp_path / "DSDT.dsl").read_text()
    if not shows_resources(text):
        pytest.skip("this iasl shows no resources")
    ports = [text[text.index(f"Device (COM{number})") :] for number in (1, 2, 3, 4)]
    for found, (port, irq) in zip(ports, board.COM_PORTS, strict=True):
        assert f"0x{port:04X}," in found.split("Device (", 2)[1]
        assert f"{{{irq}}}" in found.split("Device (", 2)[1]


@pytest.mark.parametrize("vmbus", [True, False])
@pytest.mark.parametrize(("cpus", "pci"), [(1, False), (300, False), (2, True)])
def test_iasl_reads_and_recompiles_every_table(tmp_path: Path, cpus: int, vmbus: bool, pci: bool) -> None:
    tables = Tables(cpus, 6 << 30 if not pci else 512 * MIB, vmbus=vmbus, pci=pci)
    assert ({"WAET", "SPCR"} <= set(tables.by_name)) is pci
    everything = {**tables.by_name, "XSDT": tables.xsdt, "FACS": tables.facs}
    for name, content in everything.items():
        (tmp_path / f"{name}.dat").write_bytes(content)
        iasl(tmp_path, "-d", f"{name}.dat")
        if not iasl(tmp_path, "-p", f"again_{name}", f"{name}.dsl"):
            continue
        if name not in ("DSDT", "FACS"):  # the compiler signs its own output; data tables stay as they were
            again = bytearray((tmp_path / f"again_{name}.aml").read_bytes())
            again[9] = content[9]
            again[28:36] = content[28:36]
            assert bytes(again) == content
    source = (tmp_path / "DSDT.dsl").read_text()
    if not pci and shows_resources(source):
        assert ("0x0000000400000000, // Range Minimum" in source) is vmbus
    assert ('Name (_CID, "VMBus")' in source) is vmbus
    assert 'Name (_CID, "VM_Gen_Counter")' in source
    address = f"0x{board.GENERATION_ADDRESS:08X}"
    assert re.search(rf"Name \(ADDR, Package \(0x02\).*\n\s*{{\s*{address},\s*Zero\s*}}", source)
    assert re.search(r"Scope \(\\_GPE\)\s*{\s*Method \(_E00.*\n\s*{\s*Notify \(\\_SB.VGID, 0x80\)", source)
    assert re.search(r"_S5, Package \(0x04\).*\n\s*{\s*0x05,", source)


def test_dsdt_compiles_back_to_the_same_code(tmp_path: Path) -> None:
    """-oa: without it iasl shortens paths, and the bytes differ though the meaning does not."""
    dsdt = Tables().by_name["DSDT"]
    (tmp_path / "DSDT.dat").write_bytes(dsdt)
    iasl(tmp_path, "-d", "DSDT.dat")
    iasl(tmp_path, "-oa", "-p", "again", "DSDT.dsl")
    again = (tmp_path / "again.aml").read_bytes()
    assert again[36:] == dsdt[36:]


# Some look at this machine's processors and its kernel's log as well.
FWTS = ["--acpitests", "-S", "cstates,hpet,acpiinfo,pcc", "-q", "-w", "200", "--results-no-separators"]


@pytest.mark.skipif(not os.environ.get("HVKVM_FWTS"), reason="needs fwts: scripts/artifacts fetch fwts")
@pytest.mark.parametrize(("cpus", "pci"), [(1, True), (2, False)])
def test_fwts_fails_in_what_is_documented_only(tmp_path: Path, cpus: int, pci: bool) -> None:
    tables, folder = Tables(cpus, pci=pci), tmp_path / "tables"
    folder.mkdir()
    named = {**tables.by_name, "XSDT": tables.xsdt, "FACS": tables.facs, "RSDP": tables.rsdp}
    for name, content in named.items():
        (folder / f"{name}.dat").write_bytes(content)
    command = [*fwts_runs.Files.found().command(), *FWTS, "-t", folder, "-r", tmp_path / "said"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = tmp_path / "said.log"
    assert log.exists(), done.stdout + done.stderr
    said = fwts_runs.read(log.read_text())
    assert not said.unknown()
    assert {"acpitables", "checksum", "facs", "fadt", "madt", "method", "rsdp", "xsdt"} <= said.ran
    assert {"spcr", "waet"} & said.ran == ({"spcr", "waet"} if pci else set())
    assert said.passed > (90 if pci else 70), log.read_text()
