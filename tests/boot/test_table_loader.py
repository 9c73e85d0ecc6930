"""The table loader's script, carried out as firmware does: what comes out must be the tables, moved."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iasl_runs import iasl, shows_resources

from hvkvm.abi import board, hpet
from hvkvm.boot import acpi, table_loader
from hvkvm.boot.acpi_pci import devices, mem32_window

MIB = 1 << 20


def build(address: int, cpus: int = 2, memory: int = 512 * MIB, base: int = 0xB000) -> acpi.AcpiTables:
    """Those of a machine that has everything."""
    fixed = acpi.FixedHardware(base, is_pc=True, has_hpet=True)
    return acpi.build(cpus, memory, devices=devices(memory, hpet=True), fixed=fixed, address=address)


def carried_out(files: table_loader.LoaderFiles, tables_at: int) -> tuple[bytes, bytes]:
    """Both files after the script: the RSDP, and the tables as they lie at `tables_at`."""
    memory = {
        table_loader.RSDP_FILE: bytearray(files.rsdp),
        table_loader.TABLES_FILE: bytearray(files.tables),
    }
    where = {table_loader.RSDP_FILE: 0xF0000, table_loader.TABLES_FILE: tables_at}
    allocated = set()
    for at in range(0, len(files.loader), 128):
        command = files.loader[at : at + 128]
        kind = int.from_bytes(command[:4], "little")
        name = command[4:60].rstrip(b"\0").decode()
        if kind == 1:
            allocated.add(name)
        elif kind == 2:
            target = command[60:116].rstrip(b"\0").decode()
            assert {name, target} <= allocated
            offset, size = struct.unpack_from("<IB", command, 116)
            old = int.from_bytes(memory[name][offset : offset + size], "little")
            assert old < len(memory[target])
            memory[name][offset : offset + size] = (old + where[target]).to_bytes(size, "little")
        else:
            assert kind == 3
            result, start, length = struct.unpack_from("<III", command, 60)
            # With the old byte in the sum, as edk2 does it.
            memory[name][result] = -sum(memory[name][start : start + length]) & 0xFF
    return bytes(memory[table_loader.RSDP_FILE]), bytes(memory[table_loader.TABLES_FILE])


@given(cpus=st.integers(1, 300), memory=st.sampled_from((64, 512, 3000, 5000)), page=st.integers(0, 1 << 18))
def test_moved_tables_are_those_built_there(cpus: int, memory: int, page: int) -> None:
    files = table_loader.split(lambda address: build(address, cpus, memory * MIB))
    rsdp, tables = carried_out(files, page * 4096)
    expected = build(page * 4096 - 64, cpus, memory * MIB).image
    assert (rsdp, tables) == (expected[:36], expected[64:])


def test_the_size_does_not_depend_on_where_the_blocks_are() -> None:
    sizes = {
        tuple(map(len, table_loader.split(lambda at, base=base: build(at, base=base))))
        for base in (0x600, 0xB000)
    }  # type: ignore[misc]
    assert len(sizes) == 1


def test_fadt_names_the_blocks_of_the_pm_function() -> None:
    made = build(0xE0000)
    at = made.image.index(b"FACP")
    words = [struct.unpack_from("<I", made.image, at + offset)[0] for offset in (56, 64, 76)]
    assert words == [0xB000, 0xB004, 0xB008]
    assert made.image[at + 91] == 4
    assert struct.unpack_from("<Q", made.image, at + 208 + 4)[0] == 0xB008


def test_the_pm_timer_is_said_to_be_good_where_there_is_one() -> None:
    image = build(0xE0000).image
    at = image.index(b"WAET")
    assert image[at + 36 : at + 40] == b"\x02\0\0\0"
    assert sum(image[at : at + 40]) & 0xFF == 0
    assert b"WAET" not in acpi.build(1, 512 * MIB).image


def test_the_hpet_is_where_the_board_has_it_if_it_was_asked_for() -> None:
    """As Linux's acpi_parse_hpet() reads it."""
    image = build(0xE0000).image
    at = image.index(b"HPET", image.index(b"APIC"))
    block, space, _width, _offset, _access, address, number, tick = struct.unpack_from(
        "<IBBBBQBH", image, at + 36
    )
    assert (space, address, number, tick) == (0, board.HPET_ADDRESS, 0, hpet.MIN_TICK)
    assert (block, sum(image[at : at + 56]) & 0xFF) == (hpet.CAPABILITIES, 0)
    fixed = acpi.FixedHardware(is_pc=True)
    other = acpi.build(1, 512 * MIB, devices=devices(512 * MIB, hpet=False), fixed=fixed).image
    assert b"HPET" not in other


@pytest.mark.parametrize(
    ("memory", "window"),
    [
        (512 * MIB, (0x80000000, 0x60000000)),
        (2560 * MIB, (0xA0000000, 0x40000000)),
        (8192 * MIB, (0xC0000000, 0x20000000)),
    ],
)
def test_the_window_for_bars_is_where_firmware_places_them(memory: int, window: tuple[int, int]) -> None:
    assert mem32_window(memory) == window


@pytest.mark.parametrize("name", ["FACP", "APIC", "WAET", "SPCR", "HPET", "XSDT", "FACS"])
def test_iasl_reads_the_tables_of_a_machine_with_pci(tmp_path: Path, name: str) -> None:
    made = build(0xE0000)
    at = next(at for at in range(0, len(made.image), 64) if made.image[at : at + 4] == name.encode())
    length = int.from_bytes(made.image[at + 4 : at + 8], "little")
    (tmp_path / "table.dat").write_bytes(made.image[at : at + length])
    iasl(tmp_path, "-d", "table.dat")


def test_iasl_reads_the_root_bridge(tmp_path: Path) -> None:
    made = build(0xE0000)
    at = made.image.index(b"DSDT")
    length = int.from_bytes(made.image[at + 4 : at + 8], "little")
    (tmp_path / "dsdt.dat").write_bytes(made.image[at : at + length])
    iasl(tmp_path, "-d", "dsdt.dat")
    text = (tmp_path / "dsdt.dsl").read_text()
    resources = ("WordBusNumber", "0x80000000") if shows_resources(text) else ()
    for words in (*resources, "PNP0A03", "PNP0B00", "PNP0103", "_PRT", "Package (0x7C)"):
        assert words in text, words
    iasl(tmp_path, "dsdt.dsl")
