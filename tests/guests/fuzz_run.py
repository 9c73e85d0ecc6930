"""Runs sequences of steps against the bus, looks after each step, and shortens what fails.

Run by itself it replays a seed or a sequence: `python tests/guests/fuzz_run.py SEED [LENGTH]`.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from pprint import pformat
from random import Random

from fuzz_bus import Bench, Step
from fuzz_steps import Steps

from hvkvm.abi.vmbus import MAX_RELID, VMBUS_EVENT_CONNECTION_ID
from hvkvm.devices.synth.ic import MAX_WAITING
from hvkvm.devices.synth.keyboard import TURN_EVENTS
from hvkvm.devices.synth.vsock import MAX_CONNECTIONS
from hvkvm.devices.synth.vsock_connections import TURN_PACKETS
from hvkvm.observe.bus_text import bus_lines
from hvkvm.vmbus.channel_io import BUDGET
from hvkvm.vmbus.gpadl import MAX_GPADLS, MAX_UNFINISHED, MAX_VALUES
from hvkvm.vmbus.host import TURN_MESSAGES
from hvkvm.vmbus.inbox import MAX_INBOX
from hvkvm.vmbus.outbox import MAX_OUTBOX
from hvkvm.vmbus.server import MAX_TL_CONNECTS

LENGTH = 60
CALLS_A_CHANNEL = 4
"""Deferred calls that a channel may have waiting: its turn, its start, its end, one more for a stream."""
GROWTH_BYTES = 8 << 10
"""Most that the second half of a grind may leave behind."""
FAULTS = ("device failed", "service failed")
"""Reports of mistakes that are the host's own."""


def look(bench: Bench) -> None:
    """AssertionError for a queue that grew beyond its bound, or a device that failed."""
    host, vsock = bench.loop.host, bench.vsock
    server = host.server
    channels = len(server.channels.all)

    def at_most(what: str, count: int, bound: int) -> None:
        assert count <= bound, f"{what}: {count}, and at most {bound} are right"

    for kind in FAULTS:
        assert kind not in server.reports.counts, f"{kind}: {host.snapshot()['ended']}"
    at_most("channels", channels, MAX_RELID)  # one that is rescinded goes when the guest releases it
    at_most("messages of the guest", len(host.inbox), MAX_INBOX)
    at_most("messages for the guest", len(host.outbox), MAX_OUTBOX + channels + MAX_UNFINISHED)
    at_most(
        "deferred calls", len(bench.loop.deferred), 16 + CALLS_A_CHANNEL * (6 + len(vsock.connections.live))
    )
    live = len(vsock.connections.live) + len(vsock._callers) + MAX_TL_CONNECTS
    at_most("timers", bench.io.timers + sum(t.active for t in bench.loop.timers), 8 + 2 * live)
    at_most("GPADLs", len(server.channels.gpadls), MAX_GPADLS)
    at_most("unfinished GPADLs", server.channels.gpadls.unfinished, MAX_UNFINISHED)
    at_most("page numbers", server.channels.gpadls.values, MAX_VALUES)
    at_most("connects", len(server.tl_connects), MAX_TL_CONNECTS)
    at_most("connections", len(vsock.connections.live), MAX_CONNECTIONS)
    at_most("sockets for programs", len(vsock.connections.handed), len(vsock.connections.live))
    at_most("kinds of complaints", len(server.reports.counts), 32)
    at_most("lines told", len(bench.loop.notes.events), 600)
    at_most("readers", len(bench.io.readers), 2)
    for device in bench.components:
        at_most(f"requests of {device.NAME}", len(device._waiting), MAX_WAITING + 1)
    own = sum(channel.connection_id != VMBUS_EVENT_CONNECTION_ID for channel in host.devices._open)
    doorbells = own + bool(server.interrupt_page)
    assert len(bench.loop.synic.events) == doorbells, "doorbells and open channels differ"
    assert set(host.devices._open) <= set(server.channels.all), "a channel that is gone is open"
    assert set(host.devices._devices) <= set(server.channels.all), (
        "a device of a channel that is gone is kept"
    )
    assert {c for c in server.channels.all if not c.withdrawn} <= set(host.devices._devices), (
        "a channel has no device"
    )
    # Fairness in turns: what one callback takes is bounded, so whoever is behind it waits for so much.
    at_most("packets in one turn", bench.most_packets, BUDGET + max(BUDGET, TURN_EVENTS, TURN_PACKETS) + 1)
    at_most("messages in one turn", bench.most_messages, TURN_MESSAGES)
    assert bus_lines(host.snapshot())
    assert vsock.describe()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(steps: Sequence[Step], folder: Path) -> None:
    """Take these steps on a new bench. Any exception is a finding."""
    fds = open_fds()
    bench = Bench(folder / "vsock")
    try:
        for step in steps:
            bench.do(step)
            look(bench)
        bench.rest()
        look(bench)
        bench.recover()
        look(bench)
    finally:
        bench.close()
    assert open_fds() == fds, f"{open_fds() - fds} fds are left"
    assert bench.io.timers == 0, f"{bench.io.timers} timers are left"


def grind(seed: int, folder: Path, rounds: int = 8, length: int = LENGTH) -> None:
    """The same steps again and again on one bench, a reset between them: memory must not grow."""
    steps = Steps(Random(seed)).sequence(length)
    bench = Bench(folder / "vsock")
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(rounds):
            for step in steps:
                bench.do(step)
            bench.settle()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        bench.close()
    # The first rounds fill caches, and counters that get a digit.
    grown = sizes[-1] - sizes[rounds // 2]
    assert grown < GROWTH_BYTES, f"seed {seed}, length {length}: {grown} bytes more after {rounds}: {sizes}"


def failure(steps: Sequence[Step], folder: Path) -> str:
    """What came of it, in short; empty if all is well."""
    try:
        run(steps, folder)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = next((f for f in reversed(frames) if "hvkvm/" in f.filename), frames[-1])
        return f"{type(error).__name__} at {Path(at.filename).name}:{at.name}: {str(error)[:300]}"
    return ""


def kind_of(text: str) -> str:
    """What two failures have in common if they are one: all but the numbers."""
    return "".join(c for c in text if not c.isdigit())[:80]


def shortest(steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    """Leave out whatever is not needed, in pieces that get smaller."""
    kept = list(steps)
    size = len(kept) // 2
    while size:
        at = 0
        while at < len(kept):
            without = kept[:at] + kept[at + size :]
            if fails(without):
                kept = without
            else:
                at += size
        size //= 2
    return kept


def fuzz(seed: int, folder: Path, length: int = LENGTH) -> None:
    """One sequence. AssertionError with the seed, and the shortest sequence that fails in the same way."""
    steps = Steps(Random(seed)).sequence(length)
    text = failure(steps, folder)
    if not text:
        return
    kind = kind_of(text)
    kept = shortest(steps, lambda some: kind_of(failure(some, folder)) == kind)
    text = failure(kept, folder) or text
    raise AssertionError(f"seed {seed}, length {length}: {text}\nSTEPS = {pformat(kept, width=100)}")


def main(arguments: list[str]) -> None:
    """Replay."""
    with tempfile.TemporaryDirectory() as name:
        fuzz(int(arguments[0]), Path(name), int(arguments[1]) if len(arguments) > 1 else LENGTH)
    print("nothing")


if __name__ == "__main__":
    main(sys.argv[1:])
