"""SMBIOS tables walked as a guest does it."""

from __future__ import annotations

import struct
import uuid

from hypothesis import example, given
from hypothesis import strategies as st

from hvkvm.abi import board
from hvkvm.boot import smbios

LENGTHS = {0: 26, 1: 27, 3: 22, 4: 48, 16: 23, 17: 84, 19: 31, 32: 11, 127: 4}


@example(cpus=1, megabytes=8, name="\0")
@example(cpus=1, megabytes=8, name="")
@given(cpus=st.integers(1, 254), megabytes=st.integers(8, 1 << 19), name=st.text(max_size=48))
def test_tables_are_well_formed(cpus: int, megabytes: int, name: str) -> None:
    made = smbios.build(name, cpus, megabytes << 20, "1.0")
    assert made.anchor[:5] == b"_SM3_"
    assert (sum(made.anchor) & 0xFF, len(made.anchor)) == (0, made.anchor[6])
    assert struct.unpack_from("<I", made.anchor, 12)[0] == len(made.tables)
    at, kinds, handles, memory = 0, [], set(), 0
    while at < len(made.tables):
        kind, length, handle = struct.unpack_from("<BBH", made.tables, at)
        assert length == LENGTHS[kind]
        if kind == 19:
            first, last = struct.unpack_from("<II", made.tables, at + 4)
            wide_first, wide_last = struct.unpack_from("<QQ", made.tables, at + 15)
            memory += (last - first + 1 << 10) if first != 0xFFFFFFFF else wide_last - wide_first + 1
        end = made.tables.index(b"\0\0", at + length)
        assert b"\0\0" not in made.tables[at + length : end]
        strings = made.tables[at + length : end].split(b"\0")
        assert kind != 1 or len(strings) == 4, "the fourth is the serial number, whatever the name is"
        assert all(0x20 <= byte <= 0x7E or byte == 0 for byte in made.tables[at + length : end])
        kinds.append(kind)
        handles.add(handle)
        at = end + 2
    assert (kinds[0], kinds[-1], kinds.count(4), len(handles)) == (0, 127, cpus, len(kinds))
    assert memory == megabytes << 20
    assert made == smbios.build(name, cpus, megabytes << 20, "1.0")


def test_a_guest_without_firmware_finds_them_by_scanning() -> None:
    made, files = smbios.placed("demo", 254, 1 << 40, "1.0"), smbios.build("demo", 254, 1 << 40, "1.0")
    assert (made[:5], sum(made[: made[6]]) & 0xFF) == (b"_SM3_", 0)
    length, address = struct.unpack_from("<IQ", made, 12)
    assert made[address - board.SMBIOS_ADDRESS :] == files.tables[:length] == files.tables
    assert board.SMBIOS_ADDRESS + len(made) <= board.GENERATION_ADDRESS


@given(name=st.text(max_size=48))
def test_the_uuid_is_version_5_of_the_name(name: str) -> None:
    made = smbios.build(name, 1, 1 << 30, "1.0").tables
    system = made.index(struct.pack("<BBH", 1, 27, 0x100))
    expected = uuid.uuid5(uuid.UUID("5a1f2c8e-8d0f-4d4e-9a51-8f9b6d0f7c11"), name)
    assert made[system + 8 : system + 24] == expected.bytes_le
