"""VHDX images: what is written is read, in every kind of file, and by another program's reader, too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest
from disk_asker import page_buffer, read
from hypothesis import example, given
from hypothesis import strategies as st

from hvkvm.block.host_file import HostFile
from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.vhdx import log_writer
from hvkvm.block.vhdx.crc32c import crc32c
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.layout import TIB
from hvkvm.block.vhdx.locator import ParentLocator, find_parent
from hvkvm.errors import ImageError

MIB = 1 << 20
READ_ONLY = ImageOptions(read_only=True)


def made(path: Path, size: int, **options: object) -> VhdxImage:
    """A new file, opened."""
    create_vhdx(path, VhdxOptions(size, **options))  # type: ignore[arg-type]
    return VhdxImage(path)


def scribble(image: VhdxImage, model: bytearray, random: Random, steps: int) -> None:
    """Write, zero, discard and flush at random, in `model` alike; every read must agree."""
    sector, size = image.sector_size, len(model)
    for _ in range(steps):
        offset = random.randrange(size // sector) * sector
        n = min(random.choice((1, 2, 8, 128, MIB // sector + 3)) * sector, size - offset)
        kind = random.random()
        if kind < 0.5:
            data = random.randbytes(n)
            image.writev(offset, [memoryview(data)], fua=random.random() < 0.1)
            model[offset : offset + n] = data
        elif kind < 0.65:
            if random.random() < 0.3:  # a whole block, which may not be in the file
                block = image.geometry.block_size
                offset = offset // block * block
                n = min(block, size - offset)
            image.write_zeroes(offset, n, may_unmap=random.random() < 0.5)
            model[offset : offset + n] = bytes(n)
        elif kind < 0.75:
            image.flush()
        else:
            assert read(image, offset, n) == model[offset : offset + n]


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing", "grandchild"])
def test_what_is_written_is_read_also_by_the_next_opener(tmp_path: Path, kind: str, sector_size: int) -> None:
    random = Random(f"{kind} {sector_size}")
    size = 12 * MIB + 5 * sector_size
    model = bytearray(size)
    path, parents = tmp_path / "disk.vhdx", []
    options: dict[str, object] = {"block_size": MIB, "sector_size": sector_size, "fixed": kind == "fixed"}
    if kind in ("differencing", "grandchild"):
        for name in ("a.vhdx", "b.vhdx")[: 1 if kind == "differencing" else 2]:
            parent = tmp_path / name
            above = made(
                parent,
                size,
                parent=parents[-1] if parents else None,
                block_size=2 * MIB,
                sector_size=sector_size,
            )
            scribble(above, model, random, 30)
            above.close()
            parents.append(parent)
        options["parent"] = parents[-1]
    before = [parent.read_bytes() for parent in parents]
    image = made(path, size, **options)
    for _ in range(3):
        scribble(image, model, random, 40)
        assert read(image, 0, size) == model
        image.close()
        image = VhdxImage(path)
        assert read(image, 0, size) == model
        for extent in image.extents(0, size):
            if not extent.data:
                assert not any(model[extent.offset : extent.offset + extent.length])
    image.close()
    assert [parent.read_bytes() for parent in parents] == before


@given(st.lists(st.tuples(st.binary(max_size=80), st.integers(0, 600)), max_size=5), st.integers(0, 5000))
@example([(b"", 127), (b"\1", 128), (b"\0\1\0", 129), (b"", 127), (b"\2", 0)], 127)
@example([(b"", 600), (b"\0", 0), (b"\2", 0)], 0)
def test_the_checksum_is_that_of_its_definition(parts: list[tuple[bytes, int]], zeros: int) -> None:
    data = b"".join(part + bytes(n) for part, n in parts) + bytes(zeros)
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_the_checksums_published_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(
    ("size", "block", "sector"), [(64 * TIB, 256 * MIB, 4096), (60 * TIB, 64 * MIB, 512)]
)
def test_the_largest_disks(tmp_path: Path, size: int, block: int, sector: int) -> None:
    path = tmp_path / "big.vhdx"
    image = made(path, size, block_size=block, sector_size=sector)
    for offset in (0, size // 2, size - sector):
        image.writev(offset, [page_buffer(sector, b"%d " % offset)])
    image.close()
    image = VhdxImage(path)
    for offset in (0, size // 2, size - sector):
        assert read(image, offset, sector).startswith(b"%d " % offset)
    image.close()
    assert os.stat(path).st_blocks * 512 < 32 * MIB


def test_more_metadata_than_one_log_entry_takes(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    image = made(path, 1 << 40, block_size=MIB)
    places = [number * 512 * MIB for number in range(2 * log_writer.BATCH + 7)]
    for number, place in enumerate(places):
        image.writev(place, [page_buffer(512, b"%d " % number)])
    image.flush()
    image.close_files()  # as a crash would
    image = VhdxImage(path)
    assert image.replayed == 1
    for number, place in enumerate(places):
        assert read(image, place, 512).startswith(b"%d " % number)
    image.close()


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_without_the_page_cache(tmp_path: Path, sector_size: int) -> None:
    size = 6 * MIB
    path = tmp_path / "disk.vhdx"
    create_vhdx(path, VhdxOptions(size, block_size=MIB, sector_size=sector_size))
    try:
        image = VhdxImage(path, ImageOptions(cache="none"))
    except ImageError as error:
        pytest.skip(str(error))
    model = bytearray(size)
    scribble(image, model, Random(sector_size), 60)
    image.close()
    image = VhdxImage(path, ImageOptions(cache="none", read_only=True))
    assert read(image, 0, size) == model
    image.close()


def test_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.vhdx"
    allocated: list[int] = []
    monkeypatch.setattr(HostFile, "allocate", lambda _file, _at, length: allocated.append(length))
    for fixed in (False, True):
        path.unlink(missing_ok=True)
        image = made(path, 4 * MIB, block_size=MIB, fixed=fixed)
        image.writev(0, [page_buffer(512, b"first")])
        allocated.clear()
        image.resize(10 * MIB)
        assert allocated == [MIB] * 6 * fixed
        assert image.size == 10 * MIB
        image.close_files()  # as a crash would: a size that the guest was told of stays
        image = VhdxImage(path)
        assert image.size == 10 * MIB
        image.resize(10 * MIB)
        image.writev(10 * MIB - 512, [page_buffer(512, b"last")])
        image.close()
        image = VhdxImage(path)
        assert image.size == 10 * MIB
        assert read(image, 10 * MIB - 512, 512).startswith(b"last")
        assert read(image, 4 * MIB, MIB) == bytes(MIB)
        for size, why in ((MIB, "cannot become smaller"), (10 * MIB + 1, "not a multiple"), (TIB, "no room")):
            with pytest.raises(ImageError, match=why):
                image.resize(size)
        image.close()


def test_a_parent_that_is_not_the_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    parent, child = tmp_path / "parent.vhdx", tmp_path / "sub" / "child.vhdx"
    made(parent, 4 * MIB).close()
    image = made(child, 0, parent=parent)
    assert image.size == 4 * MIB
    with pytest.raises(ImageError, match="another program uses it"):
        VhdxImage(parent)
    image.close()
    parent.rename(tmp_path / "elsewhere.vhdx")
    with pytest.raises(ImageError, match=r"its parent .*parent.vhdx is not there"):
        VhdxImage(child)
    VhdxImage(child, parent=tmp_path / "elsewhere.vhdx").close()
    (tmp_path / "elsewhere.vhdx").rename(parent)
    image = VhdxImage(parent)
    image.writev(0, [page_buffer(512, b"changed")])
    image.close()
    with pytest.raises(ImageError, match="was written to since, or is another disk"):
        VhdxImage(child)
    VhdxImage(parent).close()  # which nobody has open any more


def test_a_parent_with_other_sectors_is_refused(tmp_path: Path) -> None:
    parent, child, guid = tmp_path / "parent.vhdx", tmp_path / "child.vhdx", b"0123456789abcdef"
    create_vhdx(parent, VhdxOptions(4 * MIB, sector_size=4096, data_write_guid=guid))
    create_vhdx(child, VhdxOptions(0, parent=parent, sector_size=4096))
    parent.unlink()
    create_vhdx(parent, VhdxOptions(4 * MIB, sector_size=512, data_write_guid=guid))
    with pytest.raises(ImageError, match=r"parent.vhdx has sectors of another size"):
        VhdxImage(child)
    VhdxImage(parent).close()


@pytest.mark.parametrize("what", ["write", "write_zeroes", "discard", "resize"])
def test_whatever_changes_a_file_says_so_before(tmp_path: Path, what: str) -> None:
    """By new GUIDs, which its children know it by."""
    path = tmp_path / "disk.vhdx"
    image = made(path, 4 * MIB, block_size=MIB)
    image.writev(0, [page_buffer(MIB, b"data")])
    image.close()
    image = VhdxImage(path)
    before = image.header
    image.flush()
    assert image.flusher._log.head == before, "a flush alone changes nothing"
    if what == "write":
        image.writev(0, [page_buffer(512, b"new")])
    elif what == "resize":
        image.resize(5 * MIB)
    else:
        getattr(image, what)(0, 4096)
    image.close_files()
    after = VhdxImage(path, READ_ONLY)
    assert after.header.data_write_guid != before.data_write_guid
    assert after.header.file_write_guid != before.file_write_guid
    after.close()


@pytest.mark.parametrize(("fixed", "discard"), [(True, True), (False, False), (False, True)])
def test_space_is_given_back_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixed: bool, discard: bool
) -> None:
    path = tmp_path / "disk.vhdx"
    made(path, 4 * MIB, block_size=MIB, fixed=fixed).close()
    image = VhdxImage(path, ImageOptions(discard=discard))
    image.writev(0, [page_buffer(MIB, b"data")])
    punched, zeroed = [], []
    monkeypatch.setattr(HostFile, "punch", lambda _file, _at, length: punched.append(length))
    monkeypatch.setattr(HostFile, "zero", lambda _file, _at, _n, may_unmap: zeroed.append(may_unmap))
    image.discard(4096, 8192)
    image.write_zeroes(4096, 8192)
    image.write_zeroes(4096, 8192, may_unmap=False)
    assert punched == [8192] * (discard and not fixed)
    assert zeroed == [discard and not fixed, False]
    image.close()


def test_a_disk_that_is_its_own_parent_ends(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.vhdx", tmp_path / "child.vhdx"
    guid = b"0123456789abcdef"
    create_vhdx(parent, VhdxOptions(4 * MIB, data_write_guid=guid))
    create_vhdx(child, VhdxOptions(0, parent=parent, data_write_guid=guid))
    shutil.copy(child, parent)
    with pytest.raises(ImageError, match="a circle of them"):
        VhdxImage(child, READ_ONLY)


def test_a_reader_replays_in_memory_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    image = made(path, 8 * MIB, block_size=MIB)
    image.writev(3 * MIB, [page_buffer(512, b"flushed")])
    image.flush()
    image.close_files()
    # As if the metadata had not come to its place: the BAT's first page as it was.
    bat = image.bat.region.offset
    with path.open("r+b") as file:
        file.seek(bat)
        file.write(bytes(4096))
    before = path.read_bytes()
    image = VhdxImage(path, READ_ONLY)
    assert image.replayed == 1
    assert read(image, 3 * MIB, 512).startswith(b"flushed")
    image.close()
    assert path.read_bytes() == before
    image = VhdxImage(path)
    assert read(image, 3 * MIB, 512).startswith(b"flushed")
    image.close()
    image = VhdxImage(path, READ_ONLY)
    assert image.replayed == 0
    image.close()


def test_bad_wishes_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    for options, why in (
        (VhdxOptions(0), "a disk of 0 bytes"),
        (VhdxOptions(65 * TIB), "up to 64T"),
        (VhdxOptions(1000), "a multiple of 512"),
        (VhdxOptions(MIB, block_size=3 * MIB), "a power of two from 1M to 256M"),
        (VhdxOptions(MIB, block_size=512 * MIB), "a power of two from 1M to 256M"),
        (VhdxOptions(MIB, sector_size=2048), "choose 512 or 4096"),
    ):
        with pytest.raises(ImageError, match=why):
            create_vhdx(path, options)
        assert not path.exists()
    made(path, MIB).close()
    with pytest.raises(ImageError, match="File exists"):
        create_vhdx(path, VhdxOptions(MIB))
    with pytest.raises(ImageError, match="leave out sector=4096"):
        open_image(str(path), ImageOptions(sector_size=4096))


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed (package qemu-utils)")
class TestWithQemu:
    """QEMU's VHDX is none of ours; it has no differencing files and no sectors of 4096 bytes."""

    @staticmethod
    def qemu_img(*arguments: object) -> str:
        done = subprocess.run(
            ["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @pytest.mark.parametrize("kind", ["fixed", "dynamic", "dirty log"])
    @pytest.mark.parametrize("block", [1, 64])
    def test_qemu_reads_ours(self, tmp_path: Path, kind: str, block: int) -> None:
        path, raw = tmp_path / "ours.vhdx", tmp_path / "copy.raw"
        size = 70 * MIB
        model = bytearray(size)
        image = made(path, size, block_size=block * MIB, fixed=kind == "fixed")
        scribble(image, model, Random(kind), 40)
        image.flush()
        if kind == "dirty log":
            image.close_files()
            with path.open("r+b") as file:  # the BAT did not come to its place
                file.seek(image.bat.region.offset)
                file.write(bytes(4096))
            self.qemu_img("check", "-r", "all", path)
        else:
            image.close()
        self.qemu_img("check", path)
        assert json.loads(self.qemu_img("info", "--output=json", path))["virtual-size"] == size
        self.qemu_img("convert", "-O", "raw", path, raw)
        assert raw.read_bytes() == model

    @pytest.mark.parametrize("kind", ["fixed", "dynamic"])
    def test_we_read_and_write_qemus(self, tmp_path: Path, kind: str) -> None:
        path, raw = tmp_path / "theirs.vhdx", tmp_path / "source.raw"
        random = Random(kind)
        model = bytearray(40 * MIB)
        for place in range(0, len(model), 5 * MIB):
            model[place : place + 9000] = random.randbytes(9000)
        raw.write_bytes(model)
        self.qemu_img("convert", "-O", "vhdx", "-o", f"subformat={kind},block_size=2M", raw, path)
        image = VhdxImage(path)
        assert read(image, 0, image.size) == model
        scribble(image, model, random, 60)
        image.close()
        self.qemu_img("check", path)
        self.qemu_img("convert", "-O", "raw", path, raw)
        assert raw.read_bytes() == model


def test_a_parent_whose_name_is_too_long_is_not_there(tmp_path: Path) -> None:
    """The name is of a file that anybody made: the next one is tried."""
    child, parent = tmp_path / "child.vhdx", tmp_path / "parent.vhdx"
    parent.touch()
    named = ParentLocator((), ("n" * 300, ".\\parent.vhdx"))
    assert find_parent(child, named) == parent
    assert find_parent(child, named._replace(paths=("n" * 300,))) is None
