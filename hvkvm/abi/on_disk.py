"""Where partition tables and file systems say on a disk what they are: GPT, MBR, El Torito, FAT, ext4, ...

Sources: UEFI 2.10 section 5 (GPT, protective MBR) and 13.3.2 (El Torito's platform for EFI); El Torito 1.0
section 2; Linux block/partitions/msdos.c (MBR, extended partitions), fs/ext4/ext4.h (struct
ext4_super_block), fs/xfs/libxfs/xfs_format.h (struct xfs_dsb), btrfs_tree.h (struct btrfs_super_block); the
Discoverable Partitions Specification (types). Layout only; anyone may import it.
"""

from __future__ import annotations

import uuid
from struct import Struct

from hvkvm.tuples import NamedTuple

MBR_SIGNATURE = b"\x55\xaa"
MBR_SIGNATURE_AT = 510
MBR_ENTRIES_AT = 446
mbr_entry = Struct("<B3xB3xII")
"""Boot indicator, type, first sector, sectors; four of them."""
MBR_TYPE_PROTECTIVE = 0xEE
MBR_TYPES_EXTENDED = frozenset((0x05, 0x0F, 0x85))
MBR_FIRST_LOGICAL = 5
MBR_BOOT_INDICATOR = 0x80
MBR_TYPE_EFI = 0xEF
MBR_TYPES_FAT = frozenset((0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E))

GPT_SIGNATURE = b"EFI PART"
gpt_header = Struct("<8sIII4xQQQQ16sQIII")


class GptHeader(NamedTuple):
    """The fields of `gpt_header`. UEFI: EFI_PARTITION_TABLE_HEADER."""

    signature: bytes
    revision: int
    header_size: int
    header_crc: int
    my_lba: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    disk_guid: bytes
    entries_lba: int
    entries: int
    entry_size: int
    entries_crc: int


GPT_CRC_AT = 16
gpt_entry = Struct("<16s16sQQQ72s")
"""Type, own GUID, first and last sector, attributes, name in UTF-16."""


def _type(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


GPT_EFI_SYSTEM = _type("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
GPT_ROOT_X86_64 = _type("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
GPT_NO_ROOT = frozenset((GPT_EFI_SYSTEM,)) | frozenset(
    map(
        _type,
        (
            "bc13c2ff-59e6-4262-a352-b275fd6f7172",  # extended boot loader
            "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",  # swap
            "933ac7e1-2eb4-4f13-b844-0e14e2aef915",  # /home
            "3b8f8425-20e0-4f3b-907f-1a25a76f98e8",  # /srv
            "4d21b016-b534-45c2-a9fb-5c16e091fd2d",  # /var
            "7ec6f557-3bc5-4aca-b293-16ef5df639d1",  # /var/tmp
            "8484680c-9521-48c6-9c11-b0720656f69e",  # /usr of x86-64
        ),
    )
)
"""Types of partitions that may hold a file system of Linux, but not its root."""

FAT_JUMPS = (b"\xeb", b"\xe9")
FAT_TYPES_AT = (54, 82)
"""Where FAT12/16 and FAT32 have their type, as text that begins with "FAT" (BS_FilSysType)."""

ISO_SECTOR = 2048
EL_TORITO_AT = 17 * ISO_SECTOR
EL_TORITO_MAGIC = b"\0CD001\1EL TORITO SPECIFICATION"
EL_TORITO_CATALOG_AT = 0x47
"""In that sector: which sector the boot catalogue is in, u32."""
EL_TORITO_ENTRY_SIZE = 32
EL_TORITO_VALIDATION = 1
EL_TORITO_SECTIONS = (0x90, 0x91)
"""The first byte of a section's header: more follow, or it is the last."""
EL_TORITO_PLATFORM_EFI = 0xEF
el_torito_header = Struct("<BBH28x")
"""Header or validation id, platform, entries of the section."""

EXT4_SUPER_BLOCK_AT = 1024
EXT4_SUPER_MAGIC = 0xEF53
ext4_super_block = Struct("<4xI16xI28xH34xIII16s16s")
"""s_blocks_count_lo, s_log_block_size, s_magic, s_feature_compat, _incompat, _ro_compat, s_uuid,
s_volume_name."""
EXT4_FEATURE_COMPAT_HAS_JOURNAL = 0x4
EXT4_FEATURE_INCOMPAT_JOURNAL_DEV = 0x8
EXT4_FEATURE_INCOMPAT_EXTENTS = 0x40
EXT4_MAX_BLOCK_LOG_SIZE = 6

XFS_SB_MAGIC = b"XFSB"
xfs_dsb = Struct(">4sIQ16x16s60x12s")
"""sb_magicnum, sb_blocksize, sb_dblocks, sb_uuid, sb_fname."""

BTRFS_SUPER_INFO_OFFSET = 0x10000
BTRFS_MAGIC = b"_BHRfS_M"
btrfs_super_block = Struct("<32x16s16x8s40xQ")
"""fsid, magic, total_bytes."""
