"""CRC-32C (Castagnoli), the checksum of VHDX structures.

zlib has another polynomial, and the packages that have this one bring compiled code for what is some
kilobytes a flush here. What makes it quick enough: these structures are mostly zeros, and a run of zeros is
some multiplications in GF(2), not a loop.
"""

from __future__ import annotations

from functools import cache

_POLYNOMIAL = 0x82F63B78


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _make_table()


_RUN = bytes(128)
"""Fewer zeros are as quick as other bytes."""


def crc32c(data: bytes) -> int:
    """The checksum of `data`."""
    crc = 0xFFFFFFFF
    table = _TABLE
    at, end = 0, len(data)
    while at < end:
        zeros = data.find(_RUN, at)
        for byte in data[at : zeros if zeros >= 0 else end]:
            crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
        if zeros < 0:
            break
        at = end - len(data[zeros:].lstrip(b"\0"))
        crc = _append_zeros(crc, at - zeros)
    return crc ^ 0xFFFFFFFF


def _append_zeros(crc: int, n: int) -> int:
    """What `crc` becomes by `n` zero bytes, in log2(n) steps."""
    power = 0
    while n:
        if n & 1:
            crc = _apply(_operator(power), crc)
        n >>= 1
        power += 1
    return crc


@cache
def _operator(power: int) -> tuple[int, ...]:
    """The 32 columns of the matrix that appends 2**power zero bytes."""
    if power == 0:
        return tuple(_TABLE[1 << bit] if bit < 8 else 1 << bit - 8 for bit in range(32))
    half = _operator(power - 1)
    return tuple(_apply(half, column) for column in half)


def _apply(columns: tuple[int, ...], vector: int) -> int:
    result = 0
    for column in columns:
        if not vector:
            break
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
