"""Everything that a VHDX file says of itself, read and checked before anything is written to it."""

from __future__ import annotations

from pathlib import Path

from hvkvm.block.host_file import HostFile
from hvkvm.block.image import ImageOptions
from hvkvm.block.vhdx import layout
from hvkvm.block.vhdx.bat import Bat
from hvkvm.block.vhdx.header import Header, read_header
from hvkvm.block.vhdx.log import Replay, read_log
from hvkvm.block.vhdx.patched import PatchedFile
from hvkvm.block.vhdx.regions import Metadata, Region, read_metadata, read_regions
from hvkvm.errors import ImageError
from hvkvm.tuples import NamedTuple


class Structures(NamedTuple):
    """`source` is the file as it is once `replay` is done."""

    header: Header
    replay: Replay | None
    source: HostFile | PatchedFile
    metadata: Metadata
    bat: Bat


def read_structures(path: Path, file: HostFile, options: ImageOptions) -> Structures:
    """Read them. ImageDamaged; ImageError for options that do not fit; OSError."""
    head = read_header(path, file)
    replay = read_log(path, file, head)
    source: HostFile | PatchedFile = file
    if replay is not None:
        source = PatchedFile(file, replay.sectors, replay.zeroed, replay.size)
    bat_region, metadata_region = read_regions(path, source, head)
    metadata = read_metadata(path, source, metadata_region)
    sector_size = metadata.geometry.sector_size
    if options.sector_size not in (0, sector_size):
        has = f"its sectors have {sector_size} bytes"
        raise ImageError(f"{path}: {has}; leave out sector={options.sector_size}")
    if file.alignment > sector_size:
        needs = f"O_DIRECT needs sectors of {file.alignment} bytes here"
        raise ImageError(f"{path}: {needs}, it has {sector_size}; leave out cache=none")
    taken = [
        Region(0, layout.HEADER_SECTION_BYTES),
        Region(head.log_offset, head.log_length),
        bat_region,
        metadata_region,
    ]
    return Structures(head, replay, source, metadata, Bat(path, source, bat_region, metadata.geometry, taken))
