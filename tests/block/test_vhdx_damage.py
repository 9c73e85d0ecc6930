"""VHDX files that are damaged or lie: one error that names a structure and its offset, and nothing changed.

Mutations that change nothing that is looked at are no damage: then the file opens, and reads without harm.
HVKVM_VHDX_MUTATIONS says how many; `make soak` takes many more.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from random import Random

import pytest
from disk_asker import page_buffer

from hvkvm.block import host_file
from hvkvm.block.image import ImageOptions
from hvkvm.block.vhdx import layout
from hvkvm.block.vhdx.create import BAT_OFFSET, VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.errors import ImageDamaged, ImageError

MIB = 1 << 20
SIZE = 8 * MIB
LOG = MIB
METADATA = 2 * MIB
BAT = BAT_OFFSET
MUTATIONS = int(os.environ.get("HVKVM_VHDX_MUTATIONS", "80"))


def sample(path: Path, kind: str) -> None:
    """A small file with data; "dirty": whose log must be replayed, "child": with a parent."""
    parent = None
    if kind == "child":
        parent = path.with_name("parent.vhdx")
        create_vhdx(parent, VhdxOptions(SIZE, block_size=MIB))
    create_vhdx(path, VhdxOptions(SIZE, block_size=MIB, parent=parent))
    image = VhdxImage(path)
    for place in (0, 3 * MIB, 5 * MIB):
        image.writev(place, [page_buffer(4096, b"data at %d " % place)])
        image.flush()
    if kind == "clean":
        image.close()
        return
    image.close_files()
    if kind == "dirty":
        with path.open("r+b") as file:
            file.seek(BAT)
            file.write(bytes(4096))


@pytest.fixture(params=["clean", "dirty", "child"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "disk.vhdx"
    sample(path, request.param)
    return path


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def resealed(path: Path, offset: int, n: int, at: int, data: bytes) -> None:
    """Change a structure of `n` bytes and make its checksum right again."""
    with path.open("r+b") as file:
        file.seek(offset)
        raw = bytearray(file.read(n))
        raw[at : at + len(data)] = data
        file.seek(offset)
        file.write(layout.seal(bytes(raw)))


def both_headers(at: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for offset in layout.HEADER_OFFSETS:
            resealed(path, offset, 4096, at, data)

    return change


def both_tables(at: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for offset in layout.REGION_TABLE_OFFSETS:
            resealed(path, offset, 65536, at, data)

    return change


def item(number: int, at: int, data: bytes) -> Callable[[Path], None]:
    """Change the entry of a metadata item, or with `at` of 32 and more the item itself."""

    def change(path: Path) -> None:
        entry = METADATA + 32 + 32 * number
        if at < 32:
            poke(path, entry + at, data)
            return
        with path.open("rb") as file:
            file.seek(entry + 16)
            offset = struct.unpack("<I", file.read(4))[0]
        poke(path, METADATA + offset + at - 32, data)

    return change


def torn(offsets: tuple[int, ...]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for at in offsets:
            poke(path, at + 20, b"x")

    return change


def entry(index: int, value: int) -> Callable[[Path], None]:
    return lambda path: poke(path, BAT + 8 * index, value.to_bytes(8, "little"))


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


DAMAGES: list[tuple[str, Callable[[Path], None], str, int, str]] = [
    ("no signature", lambda path: poke(path, 0, b"x"), "file type identifier", 0, "no VHDX"),
    ("both headers torn", torn(layout.HEADER_OFFSETS), "header", 65536, "checksum"),
    ("version 2", both_headers(66, b"\2\0"), "header", 0, "version 2"),
    ("no next header", both_headers(8, b"\xff" * 8), "header", 0, "leaves none for the next"),
    ("log version", both_headers(48, bytes(15) + b"\1" + b"\7\0"), "header", 0, "log version 7"),
    ("log in the headers", both_headers(72, u64(0)), "header", 0, "behind the headers"),
    ("log that is odd", both_headers(72, u64(MIB + 512)), "header", 0, "whole MiB"),
    ("log beyond the file", both_headers(68, u32(1 << 31)), "log", LOG, "beyond the file"),
    ("log without entries", both_headers(48, b"\1" * 16), "log", LOG, "no entry is whole"),
    ("both tables torn", torn(layout.REGION_TABLE_OFFSETS), "region table", 192 << 10, "checksum"),
    ("too many regions", both_tables(8, u32(3000)), "region table", 192 << 10, "3000 entries"),
    (
        "a region upon the log",
        both_tables(16 + 16, u64(LOG)),
        "region table entry",
        (192 << 10) + 16,
        "lies upon the log",
    ),
    (
        "a region beyond",
        both_tables(16 + 16, u64(1 << 50)),
        "region table entry",
        (192 << 10) + 16,
        "inside the file",
    ),
    (
        "an unknown region",
        both_tables(16, b"\7" * 16),
        "region table entry",
        (192 << 10) + 16,
        "nothing is known",
    ),
    (
        "a region twice",
        both_tables(48, layout.BAT_REGION),
        "region table entry",
        (192 << 10) + 48,
        "there twice",
    ),
    ("no BAT", both_tables(8, u32(0)), "region table", 192 << 10, "the BAT is missing"),
    ("no metadata", lambda path: poke(path, METADATA, b"x"), "metadata table", METADATA, "no signature"),
    (
        "too many items",
        lambda path: poke(path, METADATA + 10, b"\xff\xff"),
        "metadata table",
        METADATA,
        "65535 entries",
    ),
    ("an unknown item", item(1, 0, b"\7" * 16), "metadata entry", METADATA + 64, "nothing is known"),
    ("an item of another size", item(1, 20, u32(9)), "metadata entry", METADATA + 64, "9 bytes, not 8"),
    ("an item outside", item(1, 16, u32(MIB)), "metadata entry", METADATA + 64, "outside of its region"),
    ("an item in the table", item(1, 16, u32(64)), "metadata entry", METADATA + 64, "outside of its region"),
    ("an item twice", item(2, 0, layout.VIRTUAL_DISK_SIZE), "metadata entry", METADATA + 96, "there twice"),
    ("an odd block size", item(0, 32, u32(3 * MIB)), "file parameters", METADATA + 65536, "power of two"),
    ("a tiny block size", item(0, 32, u32(4096)), "file parameters", METADATA + 65536, "power of two"),
    ("an odd disk size", item(1, 32, u64(1000)), "virtual disk size", METADATA + 65544, "multiple of 512"),
    ("a huge disk", item(1, 32, u64(1 << 50)), "virtual disk size", METADATA + 65544, "up to 64 TiB"),
    ("an odd sector size", item(3, 32, u32(1024)), "logical sector size", 0, "neither 512 nor 4096"),
    (
        "a parent that is not named",
        item(0, 36, u32(2)),
        "metadata table",
        METADATA,
        "parent locator is missing",
    ),
    ("a BAT that is too small", item(1, 32, u64(1 << 45)), "BAT", BAT, "too few"),
    ("a state that is none", entry(7, 5), "BAT entry 7", BAT + 56, "state 5"),
    ("reserved bits", entry(7, 0x46), "BAT entry 7", BAT + 56, "reserved bits"),
    ("a block in the log", entry(7, LOG | 6), "BAT entry 7", BAT + 56, "upon the part of the file"),
    ("a block in the headers", entry(7, 6), "BAT entry 7", BAT + 56, "upon the part of the file"),
    ("a block beyond the file", entry(7, 1 << 40 | 6), "BAT entry 7", BAT + 56, "beyond the end"),
    ("an empty file", cut(0), "file type identifier", 0, "no VHDX"),
    ("a file cut in the headers", cut(65_600), "header", 65536, "beyond the end"),
    ("a file cut in the log", cut(LOG + 4096), "log", LOG, "beyond the file"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[0])
def test_each_damage_has_its_name(tmp_path: Path, damage: tuple) -> None:  # type: ignore[type-arg]
    _name, change, structure, offset, what = damage
    path = tmp_path / "disk.vhdx"
    sample(path, "clean")
    change(path)
    before = path.read_bytes()
    for options in (ImageOptions(), ImageOptions(read_only=True)):
        with pytest.raises(ImageDamaged, match=what) as caught:
            VhdxImage(path, options)
        assert caught.value.structure == structure
        if offset:
            assert caught.value.offset == offset
        assert f"at byte {caught.value.offset:#x}" in str(caught.value)
        assert path.read_bytes() == before


def test_two_blocks_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    sample(path, "clean")
    with path.open("rb") as file:
        file.seek(BAT)
        first = int.from_bytes(file.read(8), "little")
    entry(7, first)(path)
    with pytest.raises(
        ImageDamaged, match=r"BAT entry 7 at byte 0x300038: lies at .*, upon the block of entry 0"
    ):
        VhdxImage(path)


def test_one_torn_header_or_table_is_no_harm(tmp_path: Path) -> None:
    for at in (*layout.HEADER_OFFSETS, *layout.REGION_TABLE_OFFSETS):
        path = tmp_path / f"{at}.vhdx"
        sample(path, "clean")
        poke(path, at + 16, b"\xff" * 64)
        image = VhdxImage(path)
        view = page_buffer(4096)
        image.readv(3 * MIB, [view])
        assert bytes(view).startswith(b"data at 3145728")
        image.close()


def test_damage_that_a_running_disk_meets_is_its_result(tmp_path: Path, asker) -> None:  # type: ignore[no-untyped-def]
    """A BAT too large to be checked at once is checked as it is read."""
    from hvkvm.block.request import Op, Status

    path = tmp_path / "large.vhdx"
    create_vhdx(path, VhdxOptions(1 << 38, block_size=MIB))
    entry(200_000, 1 << 40 | 6)(path)
    disk = asker.disk(VhdxImage(path))
    block = 200_000 - 200_000 // 4097
    assert asker.ask(disk, Op.READ, 0, page_buffer(4096)).status is Status.OK
    result = asker.ask(disk, Op.READ, block * MIB, page_buffer(4096))
    assert result.status is Status.DAMAGED
    assert "BAT entry 200000 at byte" in result.detail


CHUNK = 64 << 10
ZONES = ((0, 320 << 10), (LOG, LOG + (128 << 10)), (METADATA, METADATA + (128 << 10)), (BAT, BAT + 4096))
"""Where `mutate` may change something: only these have to be written anew for the next one."""


def mutate(raw: bytearray, random: Random) -> int:
    """Change a few bytes where structures are; half of the time with the checksums made right again.

    The size that the file is to have: one in ten is cut.
    """
    log_used = LOG, LOG + 6 * 8192
    places = (
        (0, 16), (65536, 65536 + 96), (131072, 131072 + 96), log_used, log_used,
        (196608, 196608 + 96), (262144, 262144 + 96),
        (METADATA, METADATA + 256), (METADATA + 65536, METADATA + 65536 + 400), (BAT, BAT + 100),
    )  # fmt: skip
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        first, end = random.choice(places)
        at = random.randrange(first, end)
        kind = random.random()
        if kind < 0.4:
            raw[at] ^= 1 << random.randrange(8)
        elif kind < 0.6:
            raw[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind < 0.85:
            at -= at % 8
            raw[at : at + 8] = random.choice((0, 1, MIB, 1 << 31, 1 << 32, 1 << 47, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
        else:
            source = random.randrange(*random.choice(places))
            raw[at : at + 16] = raw[source : source + 16]
    if random.random() < 0.6:
        for at, n in ((65536, 4096), (131072, 4096), (196608, 65536), (262144, 65536)):
            raw[at : at + n] = layout.seal(bytes(raw[at : at + n]))
        for at in range(*log_used, 4096):
            length = int.from_bytes(raw[at + 8 : at + 12], "little")
            if raw[at : at + 4] == b"loge" and 4096 <= length <= 65536:
                raw[at : at + length] = layout.seal(bytes(raw[at : at + length]))
    return random.randrange(0, len(raw)) if random.random() < 0.1 else len(raw)


class Mutated:
    """A file that is mutated again and again: each time only what a mutation may touch is written and read.

    What somebody else has changed elsewhere stays, and is found when all of it is looked at.
    """

    def __init__(self, path: Path, original: bytes) -> None:
        self.path = path
        self._original = original
        self._has = bytearray(original)
        self._chunks = [
            (at, original[at : at + CHUNK])
            for at in range(0, len(original), CHUNK)
            if any(original[at : at + CHUNK])
        ]
        self.renew()

    def again(self, random: Random) -> None:
        """Make it another mutation of the original."""
        has, original = self._has, self._original
        for first, end in ZONES:
            has[first:end] = original[first:end]
        before, self._size = self._size, mutate(has, random)
        with self.path.open("r+b", buffering=0) as file:
            for first, end in ZONES:
                os.pwrite(file.fileno(), has[first:end], first)
            if before < len(original):
                os.pwrite(file.fileno(), memoryview(has)[before:], before)
            file.truncate(self._size)

    def is_as_it_was(self, *, wholly: bool = False) -> bool:
        """Whether nobody has written to it since; "wholly" looks at all that is not in ZONES, too."""
        if self.path.stat().st_size != self._size:
            return False
        with self.path.open("rb", buffering=0) as file:
            for first, end in ((0, self._size),) if wholly else ZONES:
                last = min(end, self._size)
                if first < last and os.pread(file.fileno(), last - first, first) != self._has[first:last]:
                    return False
        return True

    def renew(self) -> None:
        """Somebody was allowed to write to it, anywhere."""
        self._size = len(self._original)
        for first, end in ZONES:
            self._has[first:end] = self._original[first:end]
        with self.path.open("wb", buffering=0) as file:
            for at, chunk in self._chunks:
                os.pwrite(file.fileno(), chunk, at)
            file.truncate(self._size)


def test_mutated_files_are_one_error_and_stay_as_they_are(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(os.environ.get("HVKVM_VHDX_SEED", "mutations"))
    changed = file.with_name("changed.vhdx")
    mutated = Mutated(changed, file.read_bytes())
    outcomes = {"damaged": 0, "refused": 0, "opened": 0}
    view = page_buffer(65536)
    monkeypatch.setattr(host_file.os, "fdatasync", lambda _fd: None)
    # Most of what is summed is the same from one mutation to the next, and summing is most of the time.
    monkeypatch.setattr(layout, "crc32c", lru_cache(256)(layout.crc32c))
    for number in range(MUTATIONS):
        mutated.again(random)
        try:
            image = VhdxImage(changed, ImageOptions(read_only=number % 2 == 0))
        except ImageDamaged as error:
            outcomes["damaged"] += 1
            assert error.structure
            assert error.offset >= 0
            assert mutated.is_as_it_was(), error
        except ImageError as error:
            # No parent of that name, a file too large for this host: not damage of a structure.
            outcomes["refused"] += 1
            assert str(changed) in str(error) or "parent" in str(error)
            assert mutated.is_as_it_was(), error
        else:
            outcomes["opened"] += 1
            with suppress(ImageError):
                for place in range(0, min(image.size, SIZE) - 65536, MIB):
                    image.readv(place, [view])
            with suppress(ImageError, OSError):
                image.close()
            if number % 2 == 0:
                assert mutated.is_as_it_was(), number
            else:
                mutated.renew()
        if number % 64 == 0:
            assert mutated.is_as_it_was(wholly=True), number
    assert mutated.is_as_it_was(wholly=True)
    assert outcomes["damaged"], outcomes
    assert outcomes["opened"], outcomes
