"""Who a unit is: INQUIRY data and the vital product data that every unit has (SPC-4 6.4, 7.8)."""

from __future__ import annotations

from hvkvm.digest import sha256
from hvkvm.tuples import NamedTuple

VENDOR = b"HVKVM"
SPC4 = 6
SUPPORTED_PAGES = 0x00
SERIAL_NUMBER = 0x80
IDENTIFICATION = 0x83
MAX_SERIAL = 64


class Identity(NamedTuple):
    """`product` up to 16 ASCII characters; `serial` tells this unit from every other."""

    product: str
    serial: str
    revision: str = "1"
    standards: tuple[int, ...] = ()
    """Version descriptors: the standards that the unit follows."""


def text(value: str, width: int) -> bytes:
    """A field of printable ASCII, filled up with blanks."""
    raw = bytes(ord(one) if " " <= one <= "~" else ord("?") for one in value)
    return raw[:width].ljust(width)


def standard_inquiry(device_type: int, identity: Identity, removable: bool) -> bytes:
    """Standard INQUIRY data, 96 bytes."""
    data = bytearray(96)
    data[0] = device_type
    data[1] = 0x80 if removable else 0
    data[2] = SPC4
    data[3] = 0x12  # HISUP, response data format 2
    data[4] = len(data) - 5
    data[7] = 0x02  # CMDQUE
    data[8:16] = VENDOR.ljust(8)
    data[16:32] = text(identity.product, 16)
    data[32:36] = text(identity.revision, 4)
    for number, standard in enumerate(identity.standards[:8]):
        data[58 + 2 * number : 60 + 2 * number] = standard.to_bytes(2, "big")
    return bytes(data)


def vpd_page(page: int, identity: Identity, more: tuple[int, ...]) -> bytes | None:
    """The body of a page that every unit has; None for another. `more` are the unit's own pages."""
    if page == SUPPORTED_PAGES:
        return bytes(sorted((SUPPORTED_PAGES, SERIAL_NUMBER, IDENTIFICATION, *more)))
    if page == SERIAL_NUMBER:
        return text(identity.serial, min(len(identity.serial), MAX_SERIAL))
    if page == IDENTIFICATION:
        return _designator(2, 1, VENDOR.ljust(8) + text(identity.serial, min(len(identity.serial), 48))) + (
            _designator(1, 3, _locally_assigned(identity.serial))
        )
    return None


def _designator(code_set: int, kind: int, value: bytes) -> bytes:
    return bytes((code_set, kind, 0, len(value))) + value


def _locally_assigned(serial: str) -> bytes:
    """A name of NAA 3: eight bytes that nobody administers, the same for the same serial."""
    digest = sha256(b"hvkvm disk " + serial.encode(errors="replace")).digest()
    return bytes((0x30 | digest[0] & 0x0F,)) + digest[1:8]
