"""Whether UEFI firmware may find something to boot on a disk, and by what one can tell.

Only tables are looked at, not what is in a file system: whether there is a boot loader, firmware finds out.
The image is hostile; every read is bounded. Reads block; any thread that may.
"""

from __future__ import annotations

from hvkvm.abi import on_disk
from hvkvm.block.image import Image
from hvkvm.block.partitions import mbr_entries, partitions, read_at

_MOST_SECTIONS = on_disk.ISO_SECTOR // on_disk.EL_TORITO_ENTRY_SIZE


def bootable(image: Image) -> str:
    """What firmware can start from, in words that follow "has"; empty for nothing. OSError, ImageError."""
    table = partitions(image)
    if any(part.type == on_disk.GPT_EFI_SYSTEM for part in table or ()):
        return "an EFI system partition (GPT)"
    # A hybrid ISO's MBR may have entries that make no table.
    entries = mbr_entries(image, 0) or []
    if _is_fat(image):
        return "a FAT file system"
    if any(kind == on_disk.MBR_TYPE_EFI for _flag, kind, _first, _count in entries):
        return "an EFI system partition (MBR)"
    if _el_torito_efi(image):
        return "an EFI boot image (El Torito)"
    if any(kind in on_disk.MBR_TYPES_FAT for _flag, kind, _first, _count in entries):
        return "a FAT partition (MBR)"
    if any(flag == on_disk.MBR_BOOT_INDICATOR and kind for flag, kind, _first, _count in entries):
        return "a boot flag in its MBR, of which UEFI makes use only if there is an EFI program, too"
    return ""


def _is_fat(image: Image) -> bool:
    """Whether the whole disk is one FAT file system, as on a stick without partitions."""
    sector = read_at(image, 0, 512)
    return (
        sector[on_disk.MBR_SIGNATURE_AT :] == on_disk.MBR_SIGNATURE
        and sector[:1] in on_disk.FAT_JUMPS
        and any(sector[at : at + 3] == b"FAT" for at in on_disk.FAT_TYPES_AT)
    )


def _el_torito_efi(image: Image) -> bool:
    """Whether the boot catalogue of an ISO has something for EFI."""
    record = read_at(image, on_disk.EL_TORITO_AT, on_disk.ISO_SECTOR)
    if not record.startswith(on_disk.EL_TORITO_MAGIC) or len(record) < on_disk.ISO_SECTOR:
        return False
    at = on_disk.EL_TORITO_CATALOG_AT
    catalogue = read_at(
        image, int.from_bytes(record[at : at + 4], "little") * on_disk.ISO_SECTOR, on_disk.ISO_SECTOR
    )
    if len(catalogue) < on_disk.ISO_SECTOR:
        return False
    header = on_disk.el_torito_header
    first, platform, _ = header.unpack_from(catalogue)
    if first != on_disk.EL_TORITO_VALIDATION:
        return False
    if platform == on_disk.EL_TORITO_PLATFORM_EFI:
        return True
    place = (
        2  # behind the validation and the initial entry, sections: a header, and as many entries as it says
    )
    while place < _MOST_SECTIONS:
        kind, platform, count = header.unpack_from(catalogue, place * on_disk.EL_TORITO_ENTRY_SIZE)
        if kind not in on_disk.EL_TORITO_SECTIONS:
            return False
        if platform == on_disk.EL_TORITO_PLATFORM_EFI:
            return True
        place += 1 + count
    return False
