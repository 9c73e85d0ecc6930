"""Mode pages: what a unit says of how it works. Nothing of it can be changed (SPC-4 7.5)."""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense

ALL_PAGES = 0x3F
CURRENT, CHANGEABLE, DEFAULT, SAVED = range(4)

ERROR_RECOVERY = 0x01
CACHING = 0x08
CONTROL = 0x0A
INFORMATIONAL_EXCEPTIONS = 0x1C
CAPABILITIES = 0x2A

WCE = 0x04

DISK_PAGES = {
    ERROR_RECOVERY: bytes((0xC0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),  # AWRE, ARRE
    CACHING: bytes((WCE, 0, 0xFF, 0xFF, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0)),
    CONTROL: bytes((0x02, 0x10, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0)),  # GLTSD, commands in any order
    INFORMATIONAL_EXCEPTIONS: bytes((0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0)),  # DEXCPT
}
"""Page number: what follows its two bytes of head."""


class ModePages:
    """`pages` by number. `specific()`: the device-specific parameter; `geometry()`: blocks, their size."""

    def __init__(
        self,
        pages: dict[int, bytes],
        specific: Callable[[], int],
        geometry: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._pages = pages
        self._specific = specific
        self._geometry = geometry

    def sense(
        self, *, page: int, subpage: int, control: int, descriptor: bool, long_lba: bool, ten: bool
    ) -> bytes | Sense:
        """The answer to MODE SENSE(6) or, with `ten`, (10)."""
        if control == SAVED:
            return scsi.SAVING_NOT_SUPPORTED
        if (page != ALL_PAGES and page not in self._pages) or subpage not in (
            0,
            0xFF if page == ALL_PAGES else 0,
        ):
            return scsi.INVALID_FIELD_IN_CDB
        body = b"".join(
            bytes((number, len(data))) + (bytes(len(data)) if control == CHANGEABLE else data)
            for number, data in sorted(self._pages.items())
            if page in (ALL_PAGES, number)
        )
        blocks = self._descriptor(long_lba) if descriptor else b""
        specific = self._specific()
        if ten:
            flag = 1 if long_lba and blocks else 0
            head = bytes((0, specific, flag, 0)) + len(blocks).to_bytes(2, "big")
            return (len(head) + len(blocks) + len(body)).to_bytes(2, "big") + head + blocks + body
        head = bytes((0, specific, len(blocks)))
        return bytes((len(head) + len(blocks) + len(body),)) + head + blocks + body

    def select(self, data: bytes, *, ten: bool) -> Sense | None:
        """What is wrong with MODE SELECT data: anything that would change something; None if nothing."""
        head = 8 if ten else 4
        if len(data) < head:
            return scsi.PARAMETER_LIST_LENGTH
        at = head + (int.from_bytes(data[6:8], "big") if ten else data[3])
        if at > len(data):
            return scsi.PARAMETER_LIST_LENGTH
        if at > head and not self._is_own(data[head:at], long_lba=bool(ten and data[4] & 1)):
            return scsi.INVALID_FIELD_IN_PARAMETERS
        while at < len(data):
            if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
                return scsi.PARAMETER_LIST_LENGTH
            number, length = data[at] & 0x3F, data[at + 1]
            if data[at] & 0x40 or self._pages.get(number) != data[at + 2 : at + 2 + length]:
                return scsi.INVALID_FIELD_IN_PARAMETERS
            at += 2 + length
        return None

    def _is_own(self, descriptor: bytes, *, long_lba: bool) -> bool:
        """Whether a block descriptor leaves the medium as it is; 0 blocks are those that there are."""
        own = self._descriptor(long_lba)
        blocks = 8 if long_lba else 4
        return bool(own) and descriptor in (own, bytes(blocks) + own[blocks:])

    def _descriptor(self, long_lba: bool) -> bytes:
        if self._geometry is None:
            return b""
        blocks, size = self._geometry()
        if long_lba:
            return blocks.to_bytes(8, "big") + bytes(4) + size.to_bytes(4, "big")
        return min(blocks, 0xFFFFFFFF).to_bytes(4, "big") + size.to_bytes(4, "big")
