"""A program that writes to a disk as fast as it can, and says what was flushed: to be killed.

    disk_writer.py IMAGE SEED [BYTES]

Write number k goes to the sector that `sector_of(k)` says, and says k in every byte group. Each line of
output is a number: all writes up to it were flushed, but for those that a line "no space K" has named.
With BYTES no file may become larger, as on a host whose disk is full. `check` tells what an image has lost.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from functools import partial
from random import Random

from hvkvm.block.disk import Disk
from hvkvm.block.image import Image
from hvkvm.block.open_image import open_image
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.workers import Workers

SIZE = 64 << 20
SECTOR = 512
BATCH = 16
SPACE = 24 << 20
"""Only this much of the disk is written to, so that sectors are written again."""


def sector_of(seed: int, k: int) -> int:
    return Random(seed * 1_000_003 + k).randrange(SPACE // SECTOR)


def stamp(k: int) -> bytes:
    return k.to_bytes(8, "little") * (SECTOR // 8)


def main(name: str, seed: int, most_bytes: int | None = None) -> None:
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    loop = IoLoop()
    loop.start()
    disk = Disk(open_image(name), Workers(loop), loop)
    number = 0

    def one_round() -> None:
        nonlocal number
        left = BATCH
        came = threading.Event()

        def done(numbers: list[int], result: Result) -> None:
            nonlocal left
            if result.status is Status.NO_SPACE and most_bytes is not None:
                for k in numbers:
                    print(f"no space {k}")
            else:
                assert result.status is Status.OK, result
            left -= 1
            if not left:
                disk.submit(Request(Op.FLUSH, 0, (), flushed))

        def flushed(result: Result) -> None:
            assert result.status is Status.OK, result
            came.set()

        # Writes of one batch are in flight together, so no two go to one sector: the last is done for all.
        places: dict[int, list[int]] = {}
        while len(places) < BATCH:
            number += 1
            places.setdefault(sector_of(seed, number), []).append(number)
        left = len(places)
        requests = [
            Request(Op.WRITE, sector * SECTOR, [memoryview(stamp(numbers[-1]))], partial(done, numbers))
            for sector, numbers in places.items()
        ]
        loop.call_soon(lambda: [disk.submit(request) for request in requests])
        came.wait()
        print(number, flush=True)

    while True:
        one_round()


def check(
    image: Image, seed: int, flushed: int, begun: int, failed: frozenset[int] = frozenset()
) -> list[str]:
    """What was flushed up to write `flushed` and is not there, or what nobody wrote up to `begun`.

    Writes that have `failed` may be there or not.
    """
    least: dict[int, int] = {}
    most: dict[int, set[int]] = {}
    for k in range(1, begun + 1):
        sector = sector_of(seed, k)
        if k <= flushed and k not in failed:
            least[sector] = k
        most.setdefault(sector, {0}).add(k)
    view = memoryview(bytearray(SECTOR))
    wrong = []
    for sector, known in most.items():
        image.readv(sector * SECTOR, [view])
        found = int.from_bytes(view[:8], "little")
        if bytes(view) != stamp(found) or found not in known or found < least.get(sector, 0):
            wrong.append(f"sector {sector}: {found}, flushed was {least.get(sector, 0)}")
    return wrong


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:]))
