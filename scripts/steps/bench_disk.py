"""Measures a disk natively, with no guest: requests a second through `Disk.submit` and back.

    .venv/bin/python scripts/steps/bench_disk.py IMAGE [--cache none] [--only "random read"]

IMAGE is written to. One submitter on the I/O loop, as a device is. `strace -f -c` before it counts system
calls.
"""

from __future__ import annotations

import argparse
import threading
from mmap import mmap
from random import Random
from time import perf_counter
from typing import NamedTuple

from hvkvm.block.disk import WIDTH, Disk
from hvkvm.block.image import ImageOptions
from hvkvm.block.open_image import open_image
from hvkvm.block.request import Op, Request, Result, Status
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.workers import Workers

PAGE = 4096


class Run(NamedTuple):
    """One measurement: `total` requests of `size` bytes, `depth` of them in flight."""

    name: str
    op: Op
    size: int
    depth: int
    total: int
    random: bool


RUNS = [
    Run(f"{how} {op.value}, {size >> 10} KiB, depth {depth}", op, size, depth, total, how == "random")
    for how, size, depth, total in (
        ("random", PAGE, 1, 6000),
        ("random", PAGE, 8, 12000),
        ("random", PAGE, 32, 20000),
        ("sequential", 1 << 20, 4, 800),
    )
    for op in (Op.READ, Op.WRITE)
]


def measure(disk: Disk, loop: IoLoop, run: Run) -> float:
    """Seconds that it took."""
    blocks = disk.size // run.size
    random = Random(1)
    order = [(random.randrange(blocks) if run.random else n % blocks) * run.size for n in range(run.total)]
    memory = [[memoryview(mmap(-1, PAGE)) for _ in range(run.size // PAGE)] for _ in range(run.depth)]
    begun = done = 0
    ended = threading.Event()

    def go(slot: int) -> None:
        nonlocal begun
        if begun == run.total:
            return
        begun += 1

        def finished(result: Result) -> None:
            nonlocal done
            assert result.status is Status.OK, result
            done += 1
            if done == run.total:
                ended.set()
            go(slot)

        disk.submit(Request(run.op, order[begun - 1], memory[slot], finished))

    start = perf_counter()
    loop.call_soon(lambda: [go(slot) for slot in range(run.depth)])
    ended.wait()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("--cache", choices=("writeback", "none"), default="writeback")
    parser.add_argument("--width", type=int, default=WIDTH, help="workers at once")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    options = parser.parse_args()
    loop = IoLoop()
    loop.start()
    workers = Workers(loop)
    disk = Disk(
        open_image(options.image, ImageOptions(cache=options.cache)), workers, loop, width=options.width
    )
    for run in RUNS:
        if options.only in run.name:
            seconds = measure(disk, loop, run)
            rate, bytes_a_second = run.total / seconds, run.total * run.size / seconds
            print(f"{run.name:36} {rate:9.0f} requests/s  {bytes_a_second / 1e6:7.0f} MB/s")
    closed = threading.Event()
    loop.call_soon(disk.close, lambda _result: closed.set())
    closed.wait()
    workers.close()
    loop.stop()


if __name__ == "__main__":
    main()
