"""The log of a hostile VHDX: whatever it says, it is read once; what it changes is what its order says."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from hvkvm.block.host_file import HostFile
from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.layout import HEADER_OFFSETS, LOG_SIGNATURE, MIB, SECTOR, log_entry_header
from hvkvm.block.vhdx.log import Entry, _active, _Changes
from hvkvm.block.vhdx.patched import PatchedFile
from hvkvm.errors import ImageDamaged

GUID = b"\1" * 16


def test_entries_that_all_claim_the_whole_log_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.vhdx"
    create_vhdx(path, VhdxOptions(8 * MIB))
    image = VhdxImage(path)
    head: Header = image.header
    image.close()
    with path.open("r+b") as file:
        for slot in range(len(HEADER_OFFSETS)):
            one = head._replace(slot=slot, sequence=head.sequence + 8 + slot, log_guid=GUID)
            file.seek(one.offset)
            file.write(one.pack())
        for at in range(0, head.log_length, SECTOR):
            file.seek(head.log_offset + at)
            fields = (LOG_SIGNATURE, 0, head.log_length, at, 1 + at, 1000, 0, GUID, 0, 0)
            file.write(log_entry_header.pack(*fields))
    pread, total = HostFile.pread, 0

    def counted(self: HostFile, offset: int, n: int) -> bytes:
        nonlocal total
        data = pread(self, offset, n)
        total += len(data)
        return data

    monkeypatch.setattr(HostFile, "pread", counted)
    with pytest.raises(ImageDamaged, match="no entry is whole"):
        VhdxImage(path)
    assert total < 3 * head.log_length


def active_by_trying(entries: dict[int, Entry], log_length: int) -> list[Entry]:
    """As the format's description has it: from each tail forward, the newest head first."""
    for head in sorted(entries.values(), key=lambda one: -one.sequence):
        chain: list[Entry] = []
        entry = entries.get(head.tail)
        while entry is not None and (not chain or entry.sequence == chain[-1].sequence + 1):
            chain.append(entry)
            if entry is head:
                return chain
            entry = entries.get((entry.at + entry.length) % log_length)
    return []


def test_the_entries_that_count() -> None:
    for seed in range(200):
        check_active(Random(seed))


def check_active(random: Random) -> None:
    sectors = random.randrange(1, 24)
    entries: dict[int, Entry] = {}
    at, sequence = 0, random.randrange(1, 40)
    while at < sectors:
        length = min(random.randrange(1, 4), sectors - at)
        if random.random() < 0.85:
            tail = random.randrange(sectors) * SECTOR
            entries[at * SECTOR] = Entry(at * SECTOR, length * SECTOR, tail, sequence, 0, 0, b"", 0)
        at += length
        sequence = sequence + 1 if random.random() < 0.85 else random.randrange(1, 40)
    log_length = sectors * SECTOR
    if len({one.sequence for one in entries.values()}) == len(entries):  # else either may be the newest
        assert _active(entries, log_length) == active_by_trying(entries, log_length)


@pytest.mark.parametrize("seed", range(20))
def test_later_changes_win_wherever_they_overlap(tmp_path: Path, seed: int) -> None:
    random, size = Random(seed), 40
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * size * SECTOR)
    model = bytearray(path.read_bytes())
    changes = _Changes()
    for _ in range(60):
        at, n = random.randrange(size), random.randrange(1, 8)
        n = min(n, size - at)
        if random.random() < 0.5:
            data = random.randbytes(1) * SECTOR
            changes.write(at * SECTOR, data)
            model[at * SECTOR : (at + 1) * SECTOR] = data
        else:
            changes.zero(at * SECTOR, n * SECTOR)
            model[at * SECTOR : (at + n) * SECTOR] = bytes(n * SECTOR)
    ends = [0]
    for offset, length in changes.zeroed:
        assert offset > ends[-1] or offset == ends[-1] == 0, "ranges that meet are one"
        ends.append(offset + length)
    file = HostFile(path, read_only=True)
    patched = PatchedFile(file, changes.sectors, changes.zeroed, 0)
    for _ in range(50):
        offset = random.randrange(size * SECTOR)
        n = random.randrange(1, 5 * SECTOR)
        assert patched.pread(offset, n) == model[offset : offset + n]
        covered = any(model[at] != 0xFF for at in range(offset, min(offset + n, len(model))))
        assert patched.patches(offset, n) or not covered
    file.close()
