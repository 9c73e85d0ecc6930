"""A VHDX that is compacted reads as before, with its parent and its children, its mode and its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk_asker import page_buffer, read

from hvkvm.block.vhdx.compact import compact_vhdx
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.layout import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, STATE_MASK, ZERO
from hvkvm.errors import ImageError

MIB = 1 << 20
BLOCKS = 5


def made(path: Path, **options: object) -> VhdxImage:
    create_vhdx(path, VhdxOptions(BLOCKS * MIB, block_size=MIB, **options))  # type: ignore[arg-type]
    return VhdxImage(path)


def compacted(path: Path) -> None:
    compact_vhdx(VhdxImage(path), lambda _done, _all: None)


def test_zeros_of_a_child_hide_what_its_parent_has(tmp_path: Path) -> None:
    parent, child, grandchild = (tmp_path / f"{name}.vhdx" for name in ("parent", "child", "grandchild"))
    image = made(parent)
    image.writev(0, [page_buffer(BLOCKS * MIB, b"p")])
    image.close()
    image = made(child, parent=parent)
    image.write_zeroes(MIB, MIB)
    image.writev(MIB + 8192, [page_buffer(512, b"full")])  # in the file from end to end, nearly all zeros
    image.writev(2 * MIB + 4096, [page_buffer(512, b"part")])
    image.writev(2 * MIB + 65536, [page_buffer(4096)])  # zeros, sector by sector
    image.write_zeroes(3 * MIB, MIB)
    states = [image.bat.get(image.geometry.payload_index(block)) & STATE_MASK for block in range(BLOCKS)]
    assert states == [NOT_PRESENT, FULLY_PRESENT, PARTIALLY_PRESENT, ZERO, NOT_PRESENT]
    before = read(image, 0, BLOCKS * MIB)
    image.close()
    made(grandchild, parent=child).close()
    compacted(child)
    image = VhdxImage(child)
    assert read(image, 0, BLOCKS * MIB) == before
    image.close()
    image = VhdxImage(grandchild)  # which knows its parent by what is in it
    assert read(image, 0, BLOCKS * MIB) == before
    image.close()


def test_it_keeps_its_mode_and_its_new_bytes_are_stable_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.vhdx"
    image = made(path)
    image.writev(0, [page_buffer(2 * MIB, b"d")])
    image.write_zeroes(0, MIB)
    image.close()
    path.chmod(0o600)
    done: list[str] = []
    fdatasync, fsync, rename = os.fdatasync, os.fsync, os.rename

    def watched(sync: object, fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)  # type: ignore[operator]

    def renamed(old: Path, new: Path) -> None:
        done.append(f"{old} is {new}")
        rename(old, new)

    monkeypatch.setattr(os, "fdatasync", lambda fd: watched(fdatasync, fd))
    monkeypatch.setattr(os, "fsync", lambda fd: watched(fsync, fd))
    monkeypatch.setattr(os, "rename", renamed)
    modes: set[int] = set()

    def progress(_done: int, _all: int) -> None:
        modes.update(one.stat().st_mode & 0o777 for one in tmp_path.iterdir())

    compact_vhdx(VhdxImage(path), progress)
    assert modes == {0o600}, "nobody else may read what is in it, under whatever name"
    *_written, file, is_renamed, folder = [one for one in done if one != str(path)]
    assert (is_renamed, folder) == (f"{file} is {path}", str(tmp_path))
    assert path.stat().st_mode & 0o777 == 0o600
    image = VhdxImage(path)  # nobody has it open any more
    assert read(image, 0, 2 * MIB) == bytes(MIB) + b"d" * MIB
    image.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have a file that is another user's")
def test_it_stays_its_owners_or_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of another user's, compacted by root, was root's: the other could not open it any more."""
    path = tmp_path / "disk.vhdx"
    made(path).close()
    os.chown(path, 1234, 2345)
    path.chmod(0o2640)
    compacted(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 2345, 0o2640)

    def refuse(*_words: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    refused(path, r"this user cannot leave it to its owner and group \(1234:2345\); compact it as its owner")


def test_one_with_more_names_is_left_alone(tmp_path: Path) -> None:
    """One name had the new file, the others the old one: two disks from then on."""
    path = tmp_path / "disk.vhdx"
    made(path).close()
    (tmp_path / "other.vhdx").hardlink_to(path)
    refused(path, r"the file has 2 names \(hard links\).*make a compact copy by `hvkvm disk convert`")


def refused(path: Path, why: str) -> None:
    before = path.stat(), path.read_bytes(), sorted(path.parent.iterdir())
    image = VhdxImage(path)
    with pytest.raises(ImageError, match=why):
        compact_vhdx(image, lambda _done, _all: None)
    image.close()
    after = path.stat(), path.read_bytes(), sorted(path.parent.iterdir())
    assert (after[0].st_ino, after[1:]) == (before[0].st_ino, before[1:])


def test_one_that_cannot_be_put_in_its_place_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.vhdx"
    made(path).close()
    before = path.read_bytes()

    def full(_old: Path, _new: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    image = VhdxImage(path)
    with pytest.raises(OSError, match="No space left"):
        compact_vhdx(image, lambda _done, _all: None)
    image.close()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_fixed_one_keeps_its_space(tmp_path: Path) -> None:
    image = made(tmp_path / "disk.vhdx", fixed=True)
    with pytest.raises(ImageError, match="a fixed disk keeps its space"):
        compact_vhdx(image, lambda _done, _all: None)
    image.close()
    assert len(list(tmp_path.iterdir())) == 1
