"""VHDX files of ours as libvhdi reads them: with parents and sectors of 4096 bytes too, which QEMU lacks.

Needs Debian's python3-libvhdi, a module of the distribution's own Python.
"""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx
from hvkvm.block.vhdx.image import VhdxImage
from hvkvm.block.vhdx.layout import TIB

MIB = 1 << 20
PYTHON = "/usr/bin/python3"
READER = """
import hashlib, sys
import pyvhdi

def opened(path):
    file = pyvhdi.file()
    file.open(path)
    return file

image, parent = opened(sys.argv[1]), sys.argv[2]
if parent:
    kept = opened(parent)
    image.set_parent(kept)
total = hashlib.sha256()
for place, size in (map(int, word.split("+")) for word in sys.argv[3:]):
    image.seek(place)
    total.update(image.read_buffer(size))
print(image.get_media_size(), total.hexdigest())
"""


@pytest.fixture(scope="module", autouse=True)
def libvhdi() -> None:
    here = Path(PYTHON).exists()
    if (
        not here
        or subprocess.run([PYTHON, "-c", "import pyvhdi"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no libvhdi here: apt-get install python3-libvhdi")


def as_libvhdi_reads(path: Path, parent: Path | None, *ranges: tuple[int, int]) -> tuple[int, str]:
    """The disk's size, and the SHA-256 of all `ranges` of a place and a size."""
    words = [f"{place}+{size}" for place, size in ranges]
    line = [PYTHON, "-c", READER, str(path), str(parent or ""), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    size, digest = done.stdout.split()
    return int(size), digest


def write_some(image: VhdxImage, model: bytearray, random: Random) -> None:
    """Patches all over the disk, some of zeros, a block of which the data is thrown away."""
    sector = image.sector_size
    for _ in range(40):
        n = sector * random.randrange(1, 60)
        place = random.randrange((len(model) - n) // sector) * sector
        data = random.randbytes(n)
        if random.random() < 0.2:
            data = bytes(n)
            image.write_zeroes(place, n)
        else:
            image.writev(place, [memoryview(data)])
        model[place : place + n] = data


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_it_reads_what_we_wrote(tmp_path: Path, kind: str, block: int, sector: int) -> None:
    size = 70 * MIB
    random, model = Random(f"{kind} {block} {sector}"), bytearray(size)
    path, parent = tmp_path / "disk.vhdx", None
    if kind == "differencing":
        parent = tmp_path / "parent.vhdx"
        create_vhdx(parent, VhdxOptions(size, block_size=block * MIB, sector_size=sector))
        image = VhdxImage(parent)
        write_some(image, model, random)
        image.close()
    fixed = kind == "fixed"
    create_vhdx(
        path, VhdxOptions(size, block_size=block * MIB, sector_size=sector, fixed=fixed, parent=parent)
    )
    image = VhdxImage(path)
    write_some(image, model, random)
    image.close()
    assert as_libvhdi_reads(path, parent, (0, size)) == (size, sha256(model).hexdigest())


def test_it_reads_a_disk_of_60_tib(tmp_path: Path) -> None:
    path, size = tmp_path / "huge.vhdx", 60 * TIB
    create_vhdx(path, VhdxOptions(size, block_size=64 * MIB))
    image = VhdxImage(path)
    wanted, places = sha256(), (0, size // 2, size - 4096)
    for place in places:
        data = f"{place}".encode().ljust(4096, b".")
        image.writev(place, [memoryview(data)])
        wanted.update(data)
    image.close()
    assert as_libvhdi_reads(path, None, *((place, 4096) for place in places)) == (size, wanted.hexdigest())
