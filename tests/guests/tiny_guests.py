"""Guests of a few bytes of 32-bit code, for tests of the command: what they print and how they end."""

from __future__ import annotations

from pathlib import Path

from hvkvm.abi import board

HANG = b"\xfa\xf4\xeb\xfd"  # cli; hlt; again
SPIN = b"\xeb\xfe"
TRIPLE_FAULT = b"\x0f\x01\x1d\x00\x00\x00\x00\x0f\x0b"  # lidt [0], where a limit of 0 lies; ud2
DEADLINE = 100.0


def out_string(text: bytes, port: int = board.COM1_PORT) -> bytes:
    """Machine code, for 64 bits too, that prints `text` on a serial port."""
    code = b"\x66\xba" + port.to_bytes(2, "little")  # mov dx, port
    return code + b"".join(bytes([0xB0, byte, 0xEE]) for byte in text)  # mov al, byte; out dx, al


def out(port: int, value: int) -> bytes:
    """Machine code for one byte written to `port`."""
    return b"\x66\xba" + port.to_bytes(2, "little") + bytes([0xB0, value, 0xEE])


def run_arguments(kernel: Path, *more: object) -> tuple[object, ...]:
    return ("run", "--kernel", kernel, "--memory", "16M", "--hv", "none", *more)
