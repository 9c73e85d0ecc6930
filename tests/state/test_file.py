"""The file of a saved machine: whole or not there, holes kept, and nothing of it believed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.block.host_file import HostFile
from hvkvm.errors import CapabilityMissing, StateError
from hvkvm.state import file as state_file
from hvkvm.state.codec import plain
from hvkvm.state.compressed import Packer
from hvkvm.state.file import FORMAT, RAM_OFFSET, Saved, Writer
from hvkvm.state.manifest import Extent, Manifest, SavedConfig

PAGE = 4096
RAM = 64 * PAGE
SOAK = bool(os.environ.get("HVKVM_SOAK"))


class Part(NamedTuple):
    value: int
    page: bytes


CONFIG = SavedConfig("/vmlinuz", "", 1, 64 * PAGE, "none", "auto", (), "off", "6.0", True)
MANIFEST = Manifest("0.1.0", 1000.5, "demo", CONFIG, ())
PARTS = {"vCPUs": Part(7, b"x" * 100)}


def written(path: Path, ram: bytes = b"", size: int = RAM) -> Path:
    with Writer(path, size) as writer:
        writer.write_ram(0, ram.ljust(size, b"\0"))
        writer.commit(MANIFEST, PARTS)
    return path


def ram_of(saved: Saved) -> bytes:
    return os.pread(saved.fd, saved.ram_size, RAM_OFFSET)


def test_ram_and_parts_come_back(tmp_path: Path) -> None:
    ram = random.Random(1).randbytes(PAGE) + bytes(PAGE * 20) + b"end".ljust(PAGE, b"\0")
    with Saved(written(tmp_path / "vm", ram)) as saved:
        assert ram_of(saved) == ram.ljust(RAM, b"\0")
        assert saved.state(Part, "vCPUs") == PARTS["vCPUs"]
        assert saved.manifest._replace(extents=()) == MANIFEST
        assert [extent[:2] for extent in saved.manifest.extents] == [(0, PAGE), (21 * PAGE, PAGE)]
        saved.verify()
        with pytest.raises(StateError, match="the state of the VMBus is missing"):
            saved.state(Part, "VMBus")


@given(st.sets(st.integers(0, RAM // PAGE - 1)), st.integers(1, 9))
def test_holes_stay_holes(tmp_path_factory: pytest.TempPathFactory, pages: set[int], chunk: int) -> None:
    path = tmp_path_factory.mktemp("holes") / "vm"
    ram = bytearray(RAM)
    for page in pages:
        ram[page * PAGE + page] = 1
    with Writer(path, RAM) as writer:
        for at in range(0, RAM, chunk * PAGE):
            writer.write_ram(at, bytes(ram[at : at + chunk * PAGE]))
        writer.commit(MANIFEST, PARTS)
    with Saved(path) as saved:
        assert ram_of(saved) == ram
        assert sum(extent.size for extent in saved.manifest.extents) == len(pages) * PAGE
        saved.verify()


@pytest.mark.parametrize("compress", [False, True])
def test_ram_in_many_pieces_is_written_in_fewer(
    compress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every other page of some GiB was zero, the list of pieces was longer than a reader takes."""
    if compress:
        try:
            Packer("test")
        except CapabilityMissing as error:
            pytest.skip(str(error))
    chunk = 16 * PAGE
    ram = bytearray((b"x" * PAGE + bytes(PAGE)) * (RAM // PAGE // 2))
    ram[chunk : 2 * chunk] = bytes(chunk)
    monkeypatch.setattr(state_file, "MANY_EXTENTS", 5)
    with Writer(tmp_path / "vm", RAM, compress=compress) as writer:
        for at in range(0, RAM, chunk):
            writer.write_ram(at, bytes(ram[at : at + chunk]))
        writer.commit(MANIFEST, PARTS)
    with Saved(tmp_path / "vm") as saved:
        assert ram_of(saved) == ram
        extents = [(one.offset // PAGE, one.size // PAGE) for one in saved.manifest.extents]
    assert extents == [*((page, 1) for page in range(0, 16, 2)), (32, 15), (48, 15)]


def test_what_was_saved_keeps_its_name_in_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes were stable and the name was not: a VM that `save --end` had ended could be gone."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"{old} is {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", renamed)
    path = written(tmp_path / "vm")
    file, rename, folder = done
    assert (rename, folder) == (f"{file} is {path}", str(tmp_path))


def test_what_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said that it was saved, and was lost."""
    path = written(tmp_path / "vm")
    before = path.read_bytes()
    monkeypatch.setattr(state_file, "MAX_MANIFEST", 300)
    with pytest.raises(StateError, match=r"^\d+ bytes beside its RAM, of which 300 could be read again$"):
        written(path, b"x")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["vm"]


def test_what_is_not_committed_leaves_nothing_and_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "vm")
    before = path.read_bytes()
    files = len(os.listdir("/proc/self/fd"))
    with Writer(path, RAM) as writer:
        writer.write_ram(0, b"x" * PAGE)
    assert os.listdir(tmp_path) == ["vm"]
    assert len(os.listdir("/proc/self/fd")) <= files
    assert path.read_bytes() == before


def test_a_link_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path / "vm"))
    with Writer(tmp_path / "link", RAM) as writer:
        writer.write_ram(0, b"2" * RAM)
        writer.commit(MANIFEST, PARTS)
    assert (tmp_path / "link").is_symlink()
    with Saved(tmp_path / "vm") as saved:
        assert ram_of(saved) == b"2" * RAM


def test_a_file_that_became_a_disk_while_it_was_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"data")
    with Writer(path, RAM) as writer:
        image = HostFile(path, read_only=True)
        with pytest.raises(OSError, match="is the image of a disk that is in use"):
            writer.commit(MANIFEST, PARTS)
        image.close()
    assert path.read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_two_that_write_the_same_file_do_not_write_into_one(tmp_path: Path) -> None:
    """They may be threads, or runs in containers that have the same process id."""
    path = tmp_path / ("v" * 250)  # of 255 that a name may have
    with Writer(path, RAM) as first:
        first.write_ram(0, b"1" * RAM)
        with Writer(path, RAM) as second:
            second.write_ram(0, b"2" * PAGE)
            first.commit(MANIFEST, PARTS)
            with Saved(path) as saved:
                saved.verify()
                assert ram_of(saved) == b"1" * RAM
            second.commit(MANIFEST, PARTS)
    with Saved(path) as saved:
        assert ram_of(saved) == (b"2" * PAGE).ljust(RAM, b"\0")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vm"

    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"), Writer(path, RAM) as writer:
        writer.write_ram(0, b"x" * PAGE)
    assert os.listdir(tmp_path) == []


def patch(at: int, data: bytes) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        raw[at : at + len(data)] = data

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bytearray.clear, "not a saved VM"),
        (patch(0, b"KVM"), "not a saved VM"),
        (patch(16, bytes([FORMAT + 1])), f"saved in format {FORMAT + 1}, and this hvkvm reads {FORMAT}"),
        (patch(24, b"\1"), "its header is damaged"),
        (lambda raw: raw.pop(), "it was cut or added to"),
        (lambda raw: raw.append(0), "it was cut or added to"),
        (patch(RAM_OFFSET + RAM + 5, b"#"), "its manifest is damaged"),
    ],
)
def test_a_file_that_is_not_whole_gets_one_line(tmp_path: Path, change: Any, words: str) -> None:
    path = written(tmp_path / "vm", b"x" * PAGE)
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)
    with pytest.raises(StateError) as caught:
        Saved(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert path.read_bytes() == raw


def made_up(path: Path, *, text: bytes | None = None, **header: int) -> Path:
    """A file of two pages of RAM, with `text` as manifest and `header` in its fields; all checksums right."""
    written(path, b"x" * 2 * PAGE)
    raw = path.read_bytes()
    names = ("magic", "version", "flags", "ram_size", "at", "length", "size", "checksum")
    fields = dict(zip(names, state_file._header.unpack_from(raw), strict=True))
    text = raw[RAM_OFFSET + RAM :] if text is None else text
    fields |= {"length": len(text), "size": RAM_OFFSET + RAM + len(text)} | header
    fields["checksum"] = state_file.checksum(text)
    head = state_file._header.pack(*fields.values())
    path.write_bytes((head + state_file.checksum(head)).ljust(RAM_OFFSET + RAM, b"\0") + text)
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"ram_size": 0, "at": RAM_OFFSET}, "its header makes no sense"),
        ({"ram_size": 1 << 40, "at": RAM_OFFSET + (1 << 40)}, "its header makes no sense"),
        ({"ram_size": RAM - 1, "at": RAM_OFFSET + RAM - 1}, "its header makes no sense"),
        ({"at": RAM_OFFSET + RAM - PAGE}, "its header makes no sense"),
        ({"length": 5}, "its header makes no sense"),
        ({"flags": 2}, "saved in format"),
        ({"text": b"{"}, "its manifest cannot be read"),
        ({"text": b"[" * 100_000}, "its manifest cannot be read"),
        ({"text": b"[]"}, "its manifest has a part missing"),
        ({"text": b'{"parts": {}}'}, "manifest"),
    ],
)
def test_a_file_that_somebody_made_up_gets_one_line(
    tmp_path: Path, header: dict[str, Any], words: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StateError, match=words):
        Saved(made_up(tmp_path / "vm", **header))
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    "extents",
    [
        [(0, 0)],
        [(0, -PAGE)],
        [(-PAGE, PAGE)],
        [(1, PAGE)],
        [(0, PAGE + 1)],
        [(RAM, PAGE)],
        [(RAM - PAGE, 2 * PAGE)],
        [(0, 2 * PAGE), (PAGE, PAGE)],
        [(PAGE, PAGE), (0, PAGE)],
        [(0, PAGE), (0, PAGE)],
    ],
)
def test_pieces_of_ram_that_cannot_be_are_refused(tmp_path: Path, extents: list[tuple[int, int]]) -> None:
    manifest = MANIFEST._replace(extents=tuple(Extent(at, size, 0, size) for at, size in extents))
    text = json.dumps({"manifest": plain(manifest), "parts": {}}).encode()
    with pytest.raises(StateError, match="its pieces of RAM do not lie one behind the other"):
        Saved(made_up(tmp_path / "vm", text=text))


def test_pieces_of_ram_up_to_its_end_are_taken(tmp_path: Path) -> None:
    extents = (Extent(0, PAGE, 0, PAGE), Extent(PAGE, RAM - PAGE, 0, RAM - PAGE))
    for stored, good in ((PAGE, True), (PAGE - 1, False)):
        manifest = MANIFEST._replace(extents=(extents[0]._replace(stored=stored), extents[1]))
        text = json.dumps({"manifest": plain(manifest), "parts": {}}).encode()
        path = made_up(tmp_path / "vm", text=text)
        if good:
            Saved(path).close()
        else:
            with pytest.raises(StateError, match="do not lie one behind the other"):
                Saved(path)


def test_damaged_ram_is_found_by_verify(tmp_path: Path) -> None:
    path = written(tmp_path / "vm", b"x" * 3 * PAGE)
    with open(path, "r+b") as out:
        out.seek(RAM_OFFSET + PAGE)
        out.write(b"y")
    with Saved(path) as saved, pytest.raises(StateError, match="guest RAM at 0x0\\+0x3000 is damaged"):
        saved.verify()


@pytest.mark.parametrize("path", ["/dev/null", "/", "/proc/self/mem", "missing"])
def test_what_is_no_file_gets_one_line(path: str) -> None:
    with pytest.raises(StateError):
        Saved(Path(path))


def test_mutated_files_are_refused_or_mean_the_same(tmp_path: Path) -> None:
    """Flips, cuts and moved pieces, also with checksums put right again behind them."""
    random_ = random.Random(11)
    path = written(tmp_path / "vm", random_.randbytes(2 * PAGE), 4 * PAGE)
    whole = path.read_bytes()
    head, text = whole[:4096], whole[RAM_OFFSET + 4 * PAGE :]
    for _ in range(100_000 if SOAK else 2_000):
        new_head, new_text = bytearray(head), bytearray(text)
        for _ in range(random_.randint(1, 3)):
            target = random_.choice((new_head, new_text, new_text))
            limit = 100 if target is new_head else len(target)
            at = random_.randrange(limit)
            if random_.random() < 0.5:
                target[at] ^= 1 << random_.randrange(8)
            else:
                piece = bytes(target[at : at + random_.randint(1, 30)])
                at = random_.randrange(limit)
                target[at : at + len(piece)] = piece
        with_sums = random_.random() < 0.8
        if with_sums:
            fields = list(state_file._header.unpack_from(new_head))
            fields[5:8] = len(new_text), RAM_OFFSET + 4 * PAGE + len(new_text), state_file.checksum(new_text)
            packed = state_file._header.pack(*fields)
            new_head[: len(packed) + 32] = packed + state_file.checksum(packed)
        with open(path, "r+b") as out:
            out.write(new_head)
            out.seek(RAM_OFFSET + 4 * PAGE)
            out.write(new_text)
            out.truncate()
        try:
            with Saved(path) as saved:
                state = saved.state(Part, "vCPUs")
                assert isinstance(state, Part)
                assert isinstance(state.value, int)
        except StateError as error:
            assert str(error).count("\n") == 0
