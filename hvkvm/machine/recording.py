"""Has a machine's bus recorded and its run drawn, where the configuration asks for it.

Made by `assembly` when its parts are there and before vCPUs run; closed when they have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from hvkvm import __version__
from hvkvm.errors import ConfigError, Stopped
from hvkvm.events import Warned

if TYPE_CHECKING:
    from pathlib import Path

    from hvkvm.machine.board import Board
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.disk_shelf import DiskShelf
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.nics import Nics
    from hvkvm.machine.platform import Platform


def watch(
    platform: Platform,
    hyperv: Hyperv,
    board: Board,
    bus: Bus | None,
    shelf: DiskShelf | None,
    nics: Nics | None,
    stack: ExitStack,
) -> None:
    """Record and draw whatever the configuration names a file for. ConfigError."""
    config = platform.config
    if config.record:
        record(platform, hyperv, bus, stack)
    if config.timeline is not None:
        draw(platform, board, bus, config.timeline, stack, partial(moved, shelf, nics))


def record(platform: Platform, hyperv: Hyperv, bus: Bus | None, stack: ExitStack) -> None:
    """Open the files that `--record` names. ConfigError."""
    from hvkvm.record.recorder import Recorder

    config = platform.config
    for spec in config.record:
        if bus is None:
            raise ConfigError(f"--record {spec.file}: there is no bus to record; add --vmbus on")
        facts = {
            "hvkvm": __version__,
            "cpus": config.cpus,
            "memory": config.memory,
            "vmbus_max_version": config.vmbus_max_version,
            "synic": hyperv.offered.synic,
            "depth": spec.depth,
            "devices": list(bus.devices),
        }
        recorder = Recorder(spec.file, spec.depth, facts, observer=platform.observer)
        stack.callback(recorder.close)
        bus.host.listen(recorder)
        if hyperv.partition is not None:
            hyperv.partition.hypercalls.listeners.append(recorder.hypercall)


def moved(shelf: DiskShelf | None, nics: Nics | None) -> dict[str, int]:
    """Bytes that each disk and NIC has moved so far, by its name and the direction. Any thread."""
    found: dict[str, int] = {}
    for name, one in {} if shelf is None else shelf.attached.items():
        if one.disk is not None:
            found.update({f"{name} {op.value}": count.bytes for op, count in one.disk.counters.items()})
    for nic in () if nics is None else list(nics.nics.values()):
        found[f"{nic.name} sent"] = nic.device.send.counters.bytes
        found[f"{nic.name} received"] = nic.device.receive.counters.bytes
    return found


def draw(
    platform: Platform,
    board: Board,
    bus: Bus | None,
    path: Path,
    stack: ExitStack,
    moved: Callable[[], dict[str, int]],
) -> None:
    """Collect what `--timeline` draws, and write it when the machine is closed. ConfigError."""
    from hvkvm.kvm.exit_names import exit_name
    from hvkvm.record.timeline import Timeline

    try:
        file = stack.enter_context(path.open("w"))
    except OSError as error:
        raise ConfigError(f"--timeline {path}: {error.strerror}; name a file that can be written") from None
    timeline = Timeline(monotonic())
    timeline.mark("building")
    if bus is not None:
        bus.host.listen(timeline)

    def sample() -> None:
        timeline.mark("kernel")
        lines = board.tail.lines()
        if lines:
            timeline.mark("console")
        if any(line.startswith("hvkvm: init ") for line in lines[:200]):
            timeline.mark("init")
        timeline.sample(
            [
                {exit_name(reason): count for reason, count in list(thread.exit_counts.items())}
                for thread in platform.threads
            ],
            moved(),
        )
        try:
            platform.io.call_later(timeline.interval, sample)
        except Stopped:
            return

    def write() -> None:
        from hvkvm.record.timeline_files import chrome, svg

        timeline.finish()
        try:
            if path.suffix == ".json":
                import json

                json.dump(chrome(timeline), file)
            else:
                file.write(svg(timeline))
            file.flush()
        except OSError as error:
            platform.observer.event(Warned("timeline", f"{path}: {error.strerror}; there is no picture"))

    stack.callback(write)
    platform.io.call_soon(sample)
