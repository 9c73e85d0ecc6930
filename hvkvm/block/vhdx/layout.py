"""The structures of a VHDX file: their offsets, sizes, numbers and limits ([MS-VHDX] section 2).

Layout only. Integers are little-endian; `Struct` names are those of the specification, in its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from uuid import UUID

from hvkvm.block.ranges import cut
from hvkvm.block.vhdx.crc32c import crc32c
from hvkvm.tuples import NamedTuple

KIB = 1 << 10
MIB = 1 << 20
TIB = 1 << 40

SECTOR = 4096
"""Bytes of a log sector, and of what one data descriptor replaces."""

FILE_IDENTIFIER_OFFSET = 0
HEADER_OFFSETS = (64 * KIB, 128 * KIB)
REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
HEADER_SECTION_BYTES = MIB
HEADER_BYTES = 4 * KIB
REGION_TABLE_BYTES = 64 * KIB
METADATA_TABLE_BYTES = 64 * KIB

FILE_SIGNATURE = b"vhdxfile"
HEADER_SIGNATURE = b"head"
REGION_SIGNATURE = b"regi"
METADATA_SIGNATURE = b"metadata"
LOG_SIGNATURE = b"loge"
ZERO_SIGNATURE = b"zero"
DESC_SIGNATURE = b"desc"
DATA_SIGNATURE = b"data"

header = Struct("<4sIQ16s16s16sHHIQ")
"""Signature, Checksum, SequenceNumber, FileWriteGuid, DataWriteGuid, LogGuid, LogVersion, Version, LogLength,
LogOffset."""
region_table_header = Struct("<4sIII")
"""Signature, Checksum, EntryCount, Reserved."""
region_table_entry = Struct("<16sQII")
"""Guid, FileOffset, Length, Required."""
MAX_REGIONS = 2047

metadata_table_header = Struct("<8sHH20x")
"""Signature, Reserved, EntryCount."""
metadata_table_entry = Struct("<16sIIII")
"""ItemId, Offset, Length, flags, Reserved."""
MAX_METADATA = 2047
IS_USER = 1
IS_VIRTUAL_DISK = 2
IS_REQUIRED = 4

log_entry_header = Struct("<4sIIIQII16sQQ")
"""Signature, Checksum, EntryLength, Tail, SequenceNumber, DescriptorCount, Reserved, LogGuid,
FlushedFileOffset, LastFileOffset."""
zero_descriptor = Struct("<4s4xQQQ")
"""ZeroSignature, ZeroLength, FileOffset, SequenceNumber."""
data_descriptor = Struct("<4s4s8sQQ")
"""DataSignature, TrailingBytes, LeadingBytes, FileOffset, SequenceNumber."""
DESCRIPTOR_BYTES = 32
data_sector = Struct("<4sI4084sI")
"""DataSignature, SequenceHigh, Data, SequenceLow."""

parent_locator_header = Struct("<16sHH")
"""LocatorType, Reserved, KeyValueCount."""
parent_locator_entry = Struct("<IIHH")
"""KeyOffset, ValueOffset, KeyLength, ValueLength."""


def guid(text: str) -> bytes:
    """A GUID as it lies in the file."""
    return UUID(text).bytes_le


NO_GUID = bytes(16)
BAT_REGION = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR_SIZE = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
VHDX_PARENT = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")

LEAVE_BLOCKS_ALLOCATED = 1
HAS_PARENT = 2

MIN_BLOCK = MIB
MAX_BLOCK = 256 * MIB
MAX_DISK = 64 * TIB

# States of BAT entries, section 2.5.1.
STATE_MASK = 7
OFFSET_MASK = ~(MIB - 1) & (1 << 64) - 1
NOT_PRESENT = 0
UNDEFINED = 1
ZERO = 2
UNMAPPED = 3
FULLY_PRESENT = 6
PARTIALLY_PRESENT = 7
PAYLOAD_STATES = frozenset((NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT))
BITMAP_STATES = frozenset((NOT_PRESENT, FULLY_PRESENT))
RESERVED_MASK = MIB - 1 & ~STATE_MASK


class Geometry(NamedTuple):
    """Where the BAT entry of a block is, section 2.5: after each chunk of payload blocks a bitmap block."""

    disk_size: int
    block_size: int
    sector_size: int
    has_parent: bool

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.disk_size // self.block_size)

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks whose sectors one bitmap block of 1 MiB describes."""
        return (1 << 23) * self.sector_size // self.block_size

    @property
    def entries(self) -> int:
        """Entries that the BAT needs."""
        if self.has_parent:
            return -(-self.blocks // self.chunk_ratio) * (self.chunk_ratio + 1)
        return self.blocks + (self.blocks - 1) // self.chunk_ratio

    def payload_index(self, block: int) -> int:
        """The BAT index of payload block `block`."""
        return block + block // self.chunk_ratio

    def bitmap_index(self, block: int) -> int:
        """The BAT index of the bitmap block for payload block `block`."""
        return block // self.chunk_ratio * (self.chunk_ratio + 1) + self.chunk_ratio

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """A range of the disk cut at blocks: block, offset within it, length."""
        return cut(offset, offset + length, self.block_size)

    def is_bitmap(self, index: int) -> bool:
        """Whether BAT entry `index` is one for a bitmap block."""
        return index % (self.chunk_ratio + 1) == self.chunk_ratio


def seal(structure: bytes) -> bytes:
    """`structure` with its checksum, which lies behind the signature of four bytes and counts as zero."""
    blank = structure[:4] + bytes(4) + structure[8:]
    return blank[:4] + crc32c(blank).to_bytes(4, "little") + blank[8:]


def is_sealed(structure: bytes) -> bool:
    """Whether the checksum is right."""
    blank = structure[:4] + bytes(4) + structure[8:]
    return int.from_bytes(structure[4:8], "little") == crc32c(blank)
