"""Raw images: opened, locked, punched, with O_DIRECT and without; and what a failed fsync means."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from random import Random
from tempfile import NamedTemporaryFile

import pytest
from disk_asker import page_buffer, read

from hvkvm.block import file_now, host_file
from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.overlay import OverlayImage
from hvkvm.block.raw import RawImage
from hvkvm.errors import ImageError

MIB = 1 << 20


def direct(file: Path) -> RawImage:
    try:
        return RawImage(file, ImageOptions(cache="none", sector_size=4096))
    except ImageError as error:
        pytest.skip(str(error))


def test_o_direct_takes_buffers_that_lie_anywhere(file: Path) -> None:
    image = direct(file)
    data = file.read_bytes()
    odd = page_buffer(3 * 4096)
    pieces = [odd[1:4097], page_buffer(4096), odd[4098:6146], odd[7000:9048]]
    assert image.readv(4096, pieces) == 12288
    assert b"".join(pieces) == data[4096 : 4096 + 12288]
    for piece in pieces:
        piece[:] = bytes(reversed(piece))
    assert image.writev(0, pieces, fua=True) == 12288
    image.close()
    assert file.read_bytes() == b"".join(pieces) + data[12288:]


@pytest.mark.parametrize("which", ["preadv", "pwritev"])
def test_o_direct_that_fails_halfway_is_the_host_s_error(
    file: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """The first call does a part of it, as on a disk that fills up, and the second one nothing."""
    image = direct(file)
    does, calls = getattr(os, which), []

    def part(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(does(fd, [buffers[0][:4096]], offset, flags))

    monkeypatch.setattr(os, which, part)
    odd = [page_buffer(3 * 4096)[1:8193]]
    with pytest.raises(OSError, match="No space left"):
        (image.readv if which == "preadv" else image.writev)(0, odd)
    calls.clear()
    if which == "preadv":
        with pytest.raises(OSError, match="No space left"):
            image.file.pread(1, 8000)
    assert len(calls) == 2 * (which == "preadv")
    monkeypatch.undo()
    image.close()


def test_sectors_smaller_than_o_direct_can_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct(file).close()
    monkeypatch.setattr(host_file.HostFile, "_find_alignment", lambda _self: 4096)
    with pytest.raises(ImageError, match="say sector=4096, or leave out cache=none"):
        RawImage(file, ImageOptions(cache="none"))


def test_discard_and_zeroes_give_space_back(file: Path) -> None:
    image = RawImage(file)
    before = os.stat(file).st_blocks
    image.discard(65536, 65536)
    image.write_zeroes(256 * 1024, 512 * 1024)
    image.write_zeroes(0, 512, may_unmap=False)
    assert read(image, 256 * 1024, 512 * 1024) == bytes(512 * 1024)
    assert read(image, 0, 512) == bytes(512)
    assert os.stat(file).st_blocks < before
    found = image.extents(0, MIB)
    assert found[0].offset == 0
    assert sum(extent.length for extent in found) == MIB
    assert any(not extent.data for extent in found)
    image.close()


def test_discard_can_be_left_out(file: Path) -> None:
    image = RawImage(file, ImageOptions(discard=False))
    before = file.read_bytes()
    image.discard(0, MIB)
    image.close()
    assert file.read_bytes() == before


def test_a_host_without_holes_writes_zeros(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_file.HostFile, "_fallocate", lambda *_arguments: False)
    image = RawImage(file)
    image.write_zeroes(512, 3 * 65536)
    assert read(image, 512, 3 * 65536) == bytes(3 * 65536)
    image.close()


def test_after_one_failed_fsync_no_flush_succeeds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = RawImage(file)

    def failing(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(host_file.os, "fdatasync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            image.flush()
    with pytest.raises(OSError, match="may be lost"):
        image.flush()
    with pytest.raises(OSError, match="may be lost"):
        image.writev(0, [page_buffer(512)], fua=True)
    assert image.writev(0, [page_buffer(512)]) == 512
    image.close()


def test_a_second_writer_is_refused_and_readers_share(file: Path) -> None:
    writer = RawImage(file)
    with pytest.raises(ImageError, match="another program uses it"):
        RawImage(file)
    with pytest.raises(ImageError, match="another program writes to it"):
        RawImage(file, ImageOptions(read_only=True))
    writer.close()
    readers = [RawImage(file, ImageOptions(read_only=True)) for _ in range(2)]
    with pytest.raises(ImageError, match="another program uses it"):
        RawImage(file)
    for reader in readers:
        reader.close()
    RawImage(file).close()


def test_the_lock_goes_with_a_process_that_is_killed(file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hvkvm.block.raw import RawImage\n"
        "image = RawImage(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(ImageError, match="another program uses it"):
            RawImage(file)
        child.kill()
        child.wait()
    RawImage(file).close()


def test_bad_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        open_image(str(tmp_path / "none"))
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        RawImage(Path("/dev/null"))
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(1000))
    with pytest.raises(ImageError, match="end 488 bytes into a sector of 512"):
        RawImage(odd)
    with pytest.raises(ImageError, match="choose 512 or 4096"):
        open_image(str(odd), ImageOptions(sector_size=1024))
    with pytest.raises(ImageError, match="choose writeback or none"):
        open_image(str(odd), ImageOptions(cache="unsafe"))
    with pytest.raises(ImageError, match="format floppy is not known"):
        open_image(str(odd), ImageOptions(format="floppy"))


def test_a_guest_cannot_make_its_raw_disk_something_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"vhdxfile".ljust(4096, b"\0"))
    with pytest.raises(ImageError, match="say which format it has, vhdx or raw"):
        open_image(str(disk))
    open_image(str(disk), ImageOptions(format="raw")).close()
    disk.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    with pytest.raises(ImageError, match="serve it with qemu-nbd"):
        open_image(str(disk))


def test_a_snapshot_leaves_the_base_alone_and_nothing_behind(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    model = bytearray(data)
    folder = tmp_path / "temporary"
    folder.mkdir()
    image = OverlayImage(RawImage(file, ImageOptions(read_only=True)), str(folder))
    random = Random(3)
    for _ in range(300):
        offset = random.randrange(0, MIB // 512) * 512
        n = min(random.choice((512, 4096, 30 * 512, 256 * 1024)), MIB - offset)
        kind = random.random()
        if kind < 0.5:
            stuff = random.randbytes(n)
            assert image.writev(offset, [memoryview(stuff)]) == n
            model[offset : offset + n] = stuff
        elif kind < 0.7:
            image.write_zeroes(offset, n)
            model[offset : offset + n] = bytes(n)
        else:
            assert read(image, offset, n) == model[offset : offset + n]
            view = page_buffer(n)
            if image.readv_now(offset, [view]) == n:
                assert view == model[offset : offset + n]
    image.flush()
    assert read(image, 0, MIB) == model
    assert sum(extent.length for extent in image.extents(0, MIB)) == MIB
    assert list(folder.iterdir()) == []
    image.close()
    assert file.read_bytes() == data


def test_a_file_in_memory_is_read_and_written_without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    shm = Path("/dev/shm")
    if (
        subprocess.run(["stat", "-fc", "%T", shm], capture_output=True, text=True, check=True).stdout
        != "tmpfs\n"
    ):
        pytest.skip("no tmpfs at /dev/shm")
    monkeypatch.setattr(file_now, "SLOW_SECONDS", 1000.0)
    with NamedTemporaryFile(dir=shm) as file:
        file.write(b"\1" * 8192)
        file.flush()
        image = RawImage(Path(file.name))
        view = page_buffer(4096)
        assert image.readv_now(4096, [view]) == 4096
        assert view == b"\1" * 4096
        assert image.readv_now(8192, [view]) == 0
        assert image.writev_now(0, [page_buffer(4096, b"\2")]) == 4096
        assert Path(file.name).read_bytes() == b"\2" * 4096 + b"\1" * 4096
        monkeypatch.setattr(file_now, "SLOW_SECONDS", -1.0)
        for _ in range(3):
            assert image.readv_now(4096, [view]) == 4096, "a slow read may have waited for a processor"
        monkeypatch.setattr(file_now, "PAUSE", 0.0)
        assert image.writev_now(4096, [view]) == 4096
        monkeypatch.setattr(file_now, "PAUSE", 1e9)
        assert image.writev_now(4096, [view]) == 4096
        assert image.writev_now(4096, [view]) == 0, "no more for a while after a slow write"
        blocks = count()
        monkeypatch.setattr(file_now, "_blocks_read", lambda: next(blocks))
        assert image.readv_now(4096, [view]) == 4096
        assert image.readv_now(4096, [view]) == -1, "the loop would wait for the swap again and again"
        image.close()


def test_a_snapshot_without_a_place_says_so(file: Path) -> None:
    with pytest.raises(ImageError, match=r"no temporary file in /proc/none: .* set TMPDIR"):
        OverlayImage(RawImage(file, ImageOptions(read_only=True)), "/proc/none")
    RawImage(file).close()
