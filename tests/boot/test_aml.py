"""The AML builder's edges: encodings that change shape with size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.boot import aml


def read_package_length(data: bytes) -> tuple[int, int]:
    """(value, its own size), by ACPI 6.5 20.2.4."""
    extra = data[0] >> 6
    if extra == 0:
        return data[0] & 0x3F, 1
    value = data[0] & 0xF
    for index in range(extra):
        value |= data[1 + index] << (4 + 8 * index)
    return value, 1 + extra


@given(st.one_of(st.integers(0, 5000), st.integers(0, (1 << 28) - 5)))
def test_package_length_counts_itself(size: int) -> None:
    encoded = aml.package_length(size)
    assert read_package_length(encoded) == (size + len(encoded), len(encoded))


@pytest.mark.parametrize(("size", "length"), [(62, 1), (63, 2), (4093, 2), (4094, 3), ((1 << 20) - 4, 3)])
def test_package_length_is_the_shortest(size: int, length: int) -> None:
    assert len(aml.package_length(size)) == length


def test_package_length_has_an_end() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.package_length(1 << 28)


@given(st.integers(0, (1 << 64) - 1))
def test_integer_reads_back(value: int) -> None:
    encoded = aml.integer(value)
    if value < 2:
        assert encoded == bytes([value])
        return
    size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[encoded[0]]
    assert len(encoded) == 1 + size
    assert int.from_bytes(encoded[1:], "little") == value


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_refuses_what_does_not_fit(value: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("\\_SB", b"\\_SB_"),
        ("STA", b"STA_"),
        ("VMOD.VMBS", b"\x2eVMODVMBS"),
        ("\\_SB.VMOD.VMBS", b"\\\x2f\x03_SB_VMODVMBS"),
    ],
)
def test_name_string(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["", "ABCDE", "1ABC", "abc", "A.", "A B"])
def test_name_string_refuses_what_is_no_name(path: str) -> None:
    with pytest.raises(ValueError, match="name segment"):
        aml.name_string(path)


def test_eisa_id_is_packed_high_byte_first() -> None:
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"
    with pytest.raises(ValueError, match="EISA"):
        aml.eisa_id("VMBUS")


def test_string_refuses_what_would_end_it_early() -> None:
    assert aml.string("VMBus") == b"\x0dVMBus\0"
    for text in ("a\0b", "é"):
        with pytest.raises(ValueError, match="AML string"):
            aml.string(text)
