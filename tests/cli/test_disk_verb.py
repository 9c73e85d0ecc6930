"""`hvkvm disk`: images made, copied, checked and compacted; every complaint is one line with a remedy."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from resource import RLIMIT_FSIZE, setrlimit

import pytest
from running_vm import command_line

from hvkvm.block.open_image import open_image
from hvkvm.cli import disk, main, progress

MIB = 1 << 20


def facts(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert main(["disk", "info", "--json", str(path)]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    random = Random(1)
    with path.open("wb") as file:
        for place in (0, 5 * MIB, 17 * MIB + 4096):
            file.seek(place)
            file.write(random.randbytes(300_000))
        file.truncate(40 * MIB)
    return path


def test_create_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.vhdx"
    assert main(["disk", "create", str(path), "64G", "--block-size", "1M", "--sector-size", "4096"]) == 0
    found = facts(path, capsys)
    assert (found["type"], found["size"], found["block_size"], found["sector_size"]) == (
        "dynamic", 64 << 30, MIB, 4096,
    )  # fmt: skip
    child = tmp_path / "child.vhdx"
    assert main(["disk", "create", str(child), "--parent", str(path)]) == 0
    assert facts(child, capsys)["parent"] == str(path)
    assert main(["disk", "info", str(child)]) == 0
    assert "size: 64 GiB (68719476736 bytes)" in capsys.readouterr().out
    fixed = tmp_path / "fixed.vhdx"
    assert main(["disk", "create", str(fixed), "4M", "--type", "fixed", "--block-size", "1M"]) == 0
    assert facts(fixed, capsys)["type"] == "fixed"
    plain = tmp_path / "disk.img"
    assert main(["disk", "create", str(plain), "3M"]) == 0
    assert plain.stat().st_size == 3 * MIB


def test_convert_there_and_back(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vhdx, back, fixed = tmp_path / "a.vhdx", tmp_path / "b.raw", tmp_path / "c.vhdx"
    assert main(["disk", "convert", str(raw), str(vhdx), "--block-size", "1M"]) == 0
    assert main(["disk", "check", str(vhdx)]) == 0
    assert capsys.readouterr().out.endswith("sound\n")
    assert os.stat(vhdx).st_blocks * 512 < 16 * MIB
    assert main(["disk", "convert", str(vhdx), str(fixed), "--type", "fixed"]) == 0
    assert main(["disk", "convert", str(fixed), str(back)]) == 0
    assert back.read_bytes() == raw.read_bytes()
    assert main(["disk", "convert", str(raw), str(tmp_path / "large.vhdx"), "--size", "1G"]) == 0
    assert facts(tmp_path / "large.vhdx", capsys)["size"] == 1 << 30


def test_compact(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vhdx = tmp_path / "a.vhdx"
    assert main(["disk", "convert", str(raw), str(vhdx), "--block-size", "1M"]) == 0
    assert main(["disk", "create", str(tmp_path / "child.vhdx"), "--parent", str(vhdx)]) == 0
    image = open_image(str(tmp_path / "child.vhdx"))
    image.writev(0, [memoryview(bytes(MIB))])
    image.close()
    # What the file has without need: a block of zeros, and the space of one that was never recorded.
    zeroed = open_image(str(tmp_path / "a.vhdx"))
    guid = zeroed.header.data_write_guid  # type: ignore[attr-defined]
    zeroed.flusher.keep_data_guid = True  # type: ignore[attr-defined]
    zeroed.writev(30 * MIB, [memoryview(bytes(MIB))])
    zeroed.close()
    with vhdx.open("r+b") as file:
        file.truncate(vhdx.stat().st_size + 8 * MIB)
    capsys.readouterr()
    assert main(["disk", "check", str(vhdx)]) == 0
    assert "MiB of the file belong to no block" in capsys.readouterr().out
    before = vhdx.stat().st_size
    assert main(["disk", "compact", str(vhdx)]) == 0
    assert vhdx.stat().st_size <= before - 9 * MIB
    again = open_image(str(vhdx))
    assert again.header.data_write_guid == guid  # type: ignore[attr-defined]
    again.close()
    # Its child is its child, and keeps its own zeros.
    assert main(["disk", "compact", str(tmp_path / "child.vhdx")]) == 0
    assert main(["disk", "convert", str(tmp_path / "child.vhdx"), str(tmp_path / "child.raw")]) == 0
    assert (tmp_path / "child.raw").read_bytes() == bytes(MIB) + raw.read_bytes()[MIB:]
    plain = tmp_path / "plain.raw"
    plain.write_bytes(raw.read_bytes())
    assert main(["disk", "compact", str(plain)]) == 0
    assert plain.read_bytes() == raw.read_bytes()
    assert os.stat(plain).st_blocks * 512 < 8 * MIB
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("verb", ["convert raw", "convert vhdx", "compact vhdx"])
def test_a_disk_that_fills_up_is_named_and_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """What is written is a part of a piece, and the next write takes nothing: views of the piece are left."""
    source = tmp_path / f"source.{'vhdx' if verb.startswith('compact') else 'raw'}"
    plain = tmp_path / "plain.raw"
    plain.write_bytes(Random(1).randbytes(2 * MIB))
    if verb.startswith("compact"):
        assert main(["disk", "convert", str(plain), str(source)]) == 0
        words, named = ["disk", "compact", str(source)], source
    else:
        plain.rename(source)
        named = tmp_path / f"target.{verb.split()[1]}"
        words = ["disk", "convert", str(source), str(named)]
    before = sorted(tmp_path.iterdir())
    does, calls = os.pwritev, []

    def part(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if not calls and sum(map(len, buffers)) < MIB:
            return does(fd, buffers, offset, flags)
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return does(fd, [buffers[0][:4096]], offset, flags)

    monkeypatch.setattr(os, "pwritev", part)
    capsys.readouterr()
    assert main(words) == 2
    assert len(calls) > 1
    assert capsys.readouterr().err.splitlines()[-1] == f"hvkvm: {named}: No space left on device"
    assert sorted(tmp_path.iterdir()) == before


def test_a_source_that_cannot_be_read_is_not_taken_for_the_target(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    assert main(["disk", "convert", str(raw), str(tmp_path / "target.raw")]) == 2
    line = "hvkvm: the source cannot be read at byte 0x0: Input/output error"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_compacted_disk_may_have_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 250 + ".vhdx")
    assert main(["disk", "create", str(path), "8M"]) == 0
    assert main(["disk", "compact", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_check_names_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.vhdx"
    assert main(["disk", "create", str(path), "64M"]) == 0
    with path.open("r+b") as file:
        file.seek((3 << 20) + 8)
        file.write(b"\x05")
    assert main(["disk", "check", str(path)]) == 1
    assert "BAT entry 1 at byte 0x300008: state 5" in capsys.readouterr().err


def test_a_vhdx_that_has_lost_its_first_bytes_is_damaged_and_no_raw_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.vhdx"
    assert main(["disk", "create", str(path), "64M"]) == 0
    with path.open("r+b") as file:
        file.write(bytes(8))
    assert main(["disk", "check", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hvkvm: {path}: file type identifier at byte 0x0: not vhdxfile, but ")
    assert said.endswith("if it is a raw disk, say that its format is raw\n")
    assert main(["disk", "info", str(path)]) == 2
    assert main(["disk", "convert", str(path), str(tmp_path / "copy.raw")]) == 2
    assert main(["disk", "info", "--format", "raw", str(path)]) == 0


@pytest.mark.parametrize("verb", ["info", "create", "convert", "check", "compact"])
def test_the_help_says_by_what_a_format_is_chosen(verb: str) -> None:
    text = " ".join(disk.verb_parser(verb).format_help().split())
    by_name = "--format {raw,vhdx} what it is to be (vhdx by the name .vhdx, else raw)"
    by_content = "--format {raw,vhdx} what it is (its first bytes)"
    assert (by_name if verb in ("create", "convert") else by_content) in text
    assert ("--source-format {raw,vhdx} what SOURCE is (its first bytes)" in text) == (verb == "convert")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create", "new.raw"], "SIZE is missing"),
        (["create", "new.raw", "12x"], "a number of bytes, or one with K, M, G or T"),
        (["create", "new.raw", "1000"], "a multiple of 512"),
        (["create", "new.raw", "1M", "--parent", "there.raw"], "--parent: only a VHDX has one"),
        (["create", "new.raw", "1M", "--type", "fixed"], "--type fixed: only a VHDX has one"),
        (["convert", "there.raw", "new.raw", "--block-size", "1M"], "--block-size: only a VHDX has one"),
        (["create", "new.vhdx", "--parent", "there.raw"], "this is no VHDX"),
        (["create", "there.raw", "1M"], "File exists"),
        (["create", "nowhere/new.vhdx", "1M"], "No such file or directory"),
        (["convert", "there.raw", "there.raw"], "File exists"),
        (["convert", "gone.raw", "new.raw"], "gone.raw: No such file"),
        (["convert", "there.raw", "new.raw", "--size", "1K"], "say no less"),
        (["info", "gone.raw"], "No such file"),
        (["info"], "FILE"),
        (["info", ""], "FILE: empty; name a path"),
        (["create", "", "1M"], "FILE: empty; name a path"),
        (["create", "new.vhdx", "1M", "--parent", ""], "--parent: empty; name a path"),
        (["create", "new.vhdx", "1M", "--block-size", ""], "--block-size : say a number of bytes"),
        (["convert", "there.raw", ""], "TARGET: empty; name a path"),
        (["convert", "there.raw", "new.raw", "--size", ""], "--size : say a number of bytes"),
        (["convert", "there.raw", "new.raw", "--size", "5000001"], "--size 5000001: say a multiple of 512"),
        (["explode"], "choose info, create, convert, check, compact"),
        (["convert", "nbd:nobody", "new.raw"], "say nbd:unix:PATH or nbd:HOST:PORT"),
    ],
)
def test_bad_wishes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.raw").write_bytes(bytes(MIB))
    assert main(["disk", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.raw"]


def test_a_copy_that_fails_leaves_nothing(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hvkvm.block.copy.copy", interrupted)
    assert main(["disk", "convert", str(raw), str(tmp_path / "new.vhdx")]) == 130
    assert list(tmp_path.iterdir()) == [raw]


SIGNALLED = """
import os, signal, sys
from importlib import import_module
module, function, number, *words = sys.argv[1:]
setattr(import_module(module), function, lambda *_: os.kill(os.getpid(), int(number)))
from hvkvm.cli import main
sys.exit(main(["disk", *words]))
"""
"""A signal to itself where the file is begun, and its contents are still to come."""
COPY = ("hvkvm.block.copy", "copy")


def signalled(where: tuple[str, str], number: signal.Signals, *words: object) -> int:
    """The exit status of `hvkvm disk` with that signal in place of a function."""
    command = [sys.executable, "-c", SIGNALLED, *where, str(int(number)), *map(str, words)]
    return subprocess.run(command, check=False, timeout=100).returncode


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_a_signal_ends_leaves_nothing(
    tmp_path: Path, raw: Path, number: signal.Signals, status: int
) -> None:
    new, disk = tmp_path / "new.vhdx", tmp_path / "disk.vhdx"
    assert main(["disk", "create", str(disk), "4M"]) == 0
    before = disk.read_bytes()
    assert signalled(COPY, number, "convert", raw, new) == status
    assert signalled(COPY, number, "convert", raw, tmp_path / "new.raw") == status
    assert signalled(("hvkvm.block.vhdx.create", "_write"), number, "create", new, "4M") == status
    assert signalled(("hvkvm.block.vhdx.compact", "_copy_blocks"), number, "compact", disk) == status
    assert sorted(tmp_path.iterdir()) == [disk, raw]
    assert disk.read_bytes() == before


def test_a_copy_under_nohup_outlives_its_terminal(tmp_path: Path, raw: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signalled(COPY, signal.SIGHUP, "convert", raw, tmp_path / "new.raw") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_half_of_a_copy_is_ever_found_at_its_name(tmp_path: Path, raw: Path) -> None:
    new = tmp_path / "new.vhdx"
    assert signalled(COPY, signal.SIGKILL, "convert", raw, new) == -signal.SIGKILL
    assert not new.exists()
    assert main(["disk", "convert", str(raw), str(new)]) == 0, "what is left of the first is not in its way"


@pytest.mark.parametrize("links", [True, False])
def test_a_target_that_comes_during_the_copy_is_left_alone(
    tmp_path: Path,
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    links: bool,
) -> None:
    def refused(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as FAT does

    if not links:
        monkeypatch.setattr(os, "link", refused)
    assert main(["disk", "convert", str(raw), str(tmp_path / "first.raw")]) == 0
    assert (tmp_path / "first.raw").read_bytes() == raw.read_bytes()
    new = tmp_path / ("n" * 251 + ".raw")
    monkeypatch.setattr("hvkvm.block.copy.copy", lambda *_: new.write_bytes(b"another's"))
    assert main(["disk", "convert", str(raw), str(new)]) == 2
    assert capsys.readouterr().err == f"hvkvm: {new}: File exists\n"
    assert new.read_bytes() == b"another's"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "first.raw", new, raw]


def test_a_name_that_was_taken_first_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a file system without hard links, where the image cannot be put there either."""

    def refuse(number: int) -> Callable[..., None]:
        def call(*_arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(os, "replace", refuse(errno.EIO))
    assert main(["disk", "create", str(tmp_path / "new.raw"), "1M"]) == 2
    assert "Input/output error" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    with progress.Progress("copying") as told:
        told(1, 100)
        now[0] += 1.9
        told(10, 100)
        assert capsys.readouterr().err == ""
        now[0] += 0.2
        told(50, 100)
        told(51, 100)
    assert capsys.readouterr().err == "hvkvm: copying: 50 %, 2 s left\n"


class Takes:
    """A standard error that takes so many texts, and then none."""

    def __init__(self, terminal: bool, texts: int) -> None:
        self.terminal, self.left, self.tried = terminal, texts, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.tried += 1
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("texts", [0, 1])
def test_progress_that_cannot_be_told_ends_no_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raw: Path, terminal: bool, texts: int
) -> None:
    for name in ("QUIET_SECONDS", "REDRAW_SECONDS", "LINE_SECONDS"):
        monkeypatch.setattr(progress, name, -1.0)
    errors = Takes(terminal, texts)
    monkeypatch.setattr("sys.stderr", errors)
    target = tmp_path / "new.raw"
    assert main(["disk", "convert", str(raw), str(target)]) == 0
    assert target.read_bytes() == raw.read_bytes()
    assert errors.tried == texts + 1, "it is not tried again"


def test_sizes() -> None:
    assert [disk.size_of(text, "SIZE") for text in ("7", "1k", "2M", "3G", "4T")] == [
        7, 1 << 10, 2 << 20, 3 << 30, 4 << 40,
    ]  # fmt: skip
    assert [disk.human(n) for n in (5, 1536, 3 << 40)] == ["5 bytes", "1.5 KiB", "3 TiB"]


@pytest.mark.parametrize("size", ["9" * 5000, "99999999999999999488", "8388608T", "99999999T"], ids=len)
def test_no_size_is_larger_than_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    for name in ("disk.raw", "disk.vhdx"):
        assert main(["disk", "create", str(tmp_path / name), size]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"hvkvm: SIZE {size[:20]}"[: 13 + len(size)])
        assert "larger than any file can be; say less than 8388608T\n" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sector", ["-512", "1", "0", "1024", "x"])
def test_a_sector_has_512_or_4096_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sector: str
) -> None:
    assert main(["disk", "create", str(tmp_path / "disk.raw"), "1M", "--sector-size", sector]) == 2
    assert "--sector-size: invalid choice" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["disk.raw", "disk.vhdx"])
def test_an_image_that_cannot_be_made_is_not_left_behind(tmp_path: Path, name: str) -> None:
    words = command_line("disk", "create", tmp_path / name, "1M")
    limit = partial(setrlimit, RLIMIT_FSIZE, (1 << 16, 1 << 16))
    result = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (result.returncode, result.stderr) == (2, f"hvkvm: {tmp_path / name}: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"content")
    assert main(["disk", "create", str(path), "1M"]) == 2
    assert capsys.readouterr().err == f"hvkvm: {path}: File exists\n"
    assert path.read_bytes() == b"content"


def test_a_child_cannot_name_a_parent_that_is_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / os.fsdecode(b"p\xff.vhdx")
    fds = len(os.listdir("/proc/self/fd"))
    assert main(["disk", "create", str(parent), "4M"]) == 0
    assert main(["disk", "create", str(tmp_path / "child.vhdx"), "--parent", str(parent)]) == 2
    assert "whose name is no UTF-8; rename it\n" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [parent.name]
    assert len(os.listdir("/proc/self/fd")) == fds
