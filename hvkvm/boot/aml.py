"""A small pure AML builder: each function returns the bytes of one term.

Why: the DSDT depends on the board (ports, MMIO windows), and guests must not
need an ASL compiler on the host. No state; any
thread. Source: ACPI 6.5 chapter 20 (AML) and section 6.4 (resource data). Only
what the project's DSDT uses is here; a test has `iasl` read it all back.
Wrong arguments are the project's own mistakes and raise ValueError.
"""

from __future__ import annotations

import struct

ZERO = b"\x00"
ONE = b"\x01"

_NAME_OP = b"\x08"
_SCOPE_OP = b"\x10"
_BUFFER_OP = b"\x11"
_PACKAGE_OP = b"\x12"
_METHOD_OP = b"\x14"
_RETURN_OP = b"\xa4"
_NOTIFY_OP = b"\x86"
_AND_OP = b"\x7b"
_OR_OP = b"\x7d"
_DEVICE_OP = b"\x5b\x82"

_LARGE_FIXED_MEMORY = 0x86
_LARGE_DWORD_ADDRESS = 0x87
_LARGE_WORD_ADDRESS = 0x88
_LARGE_QWORD_ADDRESS = 0x8A
_MEMORY_RANGE = 0
_IO_RANGE = 1
_BUS_NUMBER_RANGE = 2
_ENTIRE_RANGE = 3
_PRODUCER_FIXED = 0b1100  # ResourceProducer, PosDecode, MinFixed, MaxFixed
_CACHEABLE_READ_WRITE = 0b011


def name_string(path: str) -> bytes:
    r"""A NameString: `_HID`, `\_SB`, `VMOD.VMBS`. Segments are 1 to 4 of A-Z, 0-9, _, padded with _."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [_name_seg(part) for part in path.removeprefix("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + b"\x2e" + b"".join(segments)
    return root + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def _name_seg(part: str) -> bytes:
    allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789"
    if not 1 <= len(part) <= 4 or any(letter not in allowed for letter in part) or part[0].isdigit():
        raise ValueError(f"{part!r} is not an AML name segment")
    return part.ljust(4, "_").encode("ascii")


def package_length(body_size: int, *, prefix: int = 0) -> bytes:
    """A PkgLength that counts itself, `prefix` and `body_size` bytes after it (all below 2**28)."""
    size = body_size + prefix
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            rest = total >> 4
            return bytes([extra << 6 | total & 0xF]) + rest.to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes is too long")


def integer(value: int) -> bytes:
    """The shortest constant for `value` (0 to 2**64 - 1)."""
    if value == 0:
        return ZERO
    if value == 1:
        return ONE
    for size, opcode in ((1, b"\x0a"), (2, b"\x0b"), (4, b"\x0c"), (8, b"\x0e")):
        if 0 < value < 1 << (8 * size):
            return opcode + value.to_bytes(size, "little")
    raise ValueError(f"{value} does not fit an AML integer")


def string(text: str) -> bytes:
    """A NUL-terminated ASCII string object."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"{text!r} is not an AML string")
    return b"\x0d" + text.encode("ascii") + b"\x00"


def eisa_id(text: str) -> bytes:
    """The packed 32-bit form of an EISA id such as PNP0501 (5 bits a letter, 4 a digit, high byte first)."""
    vendor, product = text[:3], text[3:]
    if len(text) != 7 or not vendor.isalpha() or not vendor.isupper():
        raise ValueError(f"{text!r} is not an EISA id")
    packed = 0
    for letter in vendor:
        packed = packed << 5 | (ord(letter) - ord("A") + 1)
    return b"\x0c" + struct.pack(">I", packed << 16 | int(product, 16))


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return _NAME_OP + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """Package () {elements}, at most 255."""
    body = bytes([len(elements)]) + b"".join(elements)
    return _PACKAGE_OP + package_length(len(body)) + body


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}."""
    return _block(_SCOPE_OP, name_string(path), terms)


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}."""
    return _block(_DEVICE_OP, name_string(path), terms)


def method(path: str, *terms: bytes) -> bytes:
    """Method (path, 0, NotSerialized) {terms}."""
    return _block(_METHOD_OP, name_string(path) + ZERO, terms)


def _block(opcode: bytes, head: bytes, terms: tuple[bytes, ...]) -> bytes:
    body = head + b"".join(terms)
    return opcode + package_length(len(body)) + body


def and_into(target: str, mask: int) -> bytes:
    """Target &= mask."""
    return _AND_OP + name_string(target) + integer(mask) + name_string(target)


def or_into(target: str, mask: int) -> bytes:
    """Target |= mask."""
    return _OR_OP + name_string(target) + integer(mask) + name_string(target)


def return_(value: bytes) -> bytes:
    """Return (value)."""
    return _RETURN_OP + value


def notify(path: str, value: int) -> bytes:
    """Notify (path, value)."""
    return _NOTIFY_OP + name_string(path) + integer(value)


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}: a buffer closed by an end tag (checksum 0 means unchecked)."""
    data = b"".join(descriptors) + b"\x79\x00"
    body = integer(len(data)) + data
    return _BUFFER_OP + package_length(len(body)) + body


def io_ports(port: int, length: int) -> bytes:
    """IO (Decode16, port, port, 1, length): fixed I/O ports."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, length)


def irq_no_flags(irq: int) -> bytes:
    """IRQNoFlags () {irq}: an edge-triggered, active-high ISA interrupt, 0 to 15."""
    return struct.pack("<BH", 0x22, 1 << irq)


def fixed_memory(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadOnly, base, size): registers that a device has for itself."""
    return struct.pack("<BHBII", _LARGE_FIXED_MEMORY, 9, 0, base, size)


def dword_memory(base: int, size: int) -> bytes:
    """DWordMemory, a producer's fixed window below 4 GiB."""
    return _memory_window(_LARGE_DWORD_ADDRESS, "<5I", base, size)


def qword_memory(base: int, size: int) -> bytes:
    """QWordMemory, a producer's fixed window anywhere."""
    return _memory_window(_LARGE_QWORD_ADDRESS, "<5Q", base, size)


def word_bus_numbers(base: int, count: int) -> bytes:
    """WordBusNumber, a producer's fixed range."""
    return _word_range(_BUS_NUMBER_RANGE, 0, base, count)


def word_io(base: int, count: int) -> bytes:
    """WordIO, a producer's fixed range of ports."""
    return _word_range(_IO_RANGE, _ENTIRE_RANGE, base, count)


def _word_range(kind: int, flags: int, base: int, count: int) -> bytes:
    fields = struct.pack("<5H", 0, base, base + count - 1, 0, count)
    head = bytes([kind, _PRODUCER_FIXED, flags])
    return struct.pack("<BH", _LARGE_WORD_ADDRESS, len(head) + len(fields)) + head + fields


def _memory_window(tag: int, code: str, base: int, size: int) -> bytes:
    granularity = translation = 0
    fields = struct.pack(code, granularity, base, base + size - 1, translation, size)
    head = bytes([_MEMORY_RANGE, _PRODUCER_FIXED, _CACHEABLE_READ_WRITE])
    return struct.pack("<BH", tag, len(head) + len(fields)) + head + fields
