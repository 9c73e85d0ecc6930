"""Everything in a VHDX file looked at: what opening it does not, because it would take too long."""

from __future__ import annotations

from hvkvm.block.vhdx import layout
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.layout import MIB, PARTIALLY_PRESENT, STATE_MASK


def check_vhdx(image: VhdxImage) -> list[str]:
    """What is worth to know of an image that is open and sound. ImageDamaged for one that is not."""
    notes = []
    if image.replayed:
        notes.append(f"its log has {image.replayed} entries to replay: it was not closed in order")
    for at, size, signature, name in (
        *((at, layout.HEADER_BYTES, layout.HEADER_SIGNATURE, "header") for at in layout.HEADER_OFFSETS),
        *(
            (at, layout.REGION_TABLE_BYTES, layout.REGION_SIGNATURE, "region table")
            for at in layout.REGION_TABLE_OFFSETS
        ),
    ):
        raw = image.source.pread(at, size)
        if raw[:4] != signature or not layout.is_sealed(raw):
            notes.append(f"the {name} at byte {at:#x} is damaged; the other one is sound")
    image.bat.check_overlaps()
    used = sum(length for _offset, length, _index in image.bat.present())
    geometry = image.geometry
    if geometry.has_parent:
        block = 0
        while block < geometry.blocks:
            if absent := image.bat.absent(block):
                block += absent
                continue
            if image.bat.get(geometry.payload_index(block)) & STATE_MASK == PARTIALLY_PRESENT:
                for _run in image.bitmaps.runs(block, 0, min(geometry.block_size, MIB)):
                    break
            block += 1
    taken = layout.HEADER_SECTION_BYTES + image.header.log_length + image.bat.region.length + MIB
    unused = image.source.size() - used - taken
    if unused > 0 and not image.metadata.fixed:
        notes.append(
            f"{unused // MIB} MiB of the file belong to no block; hvkvm disk compact gives them back"
        )
    return notes
