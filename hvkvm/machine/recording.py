"""Has a machine's bus recorded and its run drawn, where the configuration asks for it.

Made by `assembly` when its parts are there and before vCPUs run, started once they do, closed when they
have ended. `Records.unwritten` says then what could not be written. Until the start the files keep what they
held, and a picture's until it is written: a run that cannot begin takes nothing from its user.
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
from hvkvm.given_file import open_to_write, write_in_time

if TYPE_CHECKING:
    from pathlib import Path

    from hvkvm.machine.board import Board
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.disk_shelf import DiskShelf
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.nics import Nics
    from hvkvm.machine.platform import Platform
    from hvkvm.record.recorder import Recorder

WRITE_SECONDS = 10.0
"""How long the reader of a pipe may take for a picture at the end."""


class Records:
    """The recordings and the picture of a run. Owner: the thread that makes and closes the machine."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []
        self.no_picture = ""
        """Why there is no picture; empty where there is one, or none was asked for."""
        self.started = False

    def start(self) -> None:
        """The machine runs: from here on the files are the run's. HostExhausted."""
        self.started = True
        for recorder in self.recorders:
            recorder.start()

    @property
    def unwritten(self) -> list[str]:
        """What could not be written, each with its file and the reason, once the machine is closed."""
        found = [recorder.unwritten for recorder in self.recorders]
        return [text for text in (*found, self.no_picture) if text]


def watch(
    platform: Platform,
    hyperv: Hyperv,
    board: Board,
    bus: Bus | None,
    shelf: DiskShelf | None,
    nics: Nics | None,
    stack: ExitStack,
) -> Records:
    """Record and draw whatever the configuration names a file for. ConfigError."""
    config = platform.config
    records = Records()
    if config.record:
        record(platform, hyperv, bus, stack, records)
    if config.timeline is not None:
        draw(platform, board, bus, config.timeline, stack, records, partial(moved, shelf, nics))
    return records


def record(platform: Platform, hyperv: Hyperv, bus: Bus | None, stack: ExitStack, records: Records) -> None:
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
        records.recorders.append(recorder)
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
    records: Records,
    moved: Callable[[], dict[str, int]],
) -> None:
    """Collect what `--timeline` draws, and write it when the machine is closed. ConfigError."""
    from hvkvm.kvm.exit_names import exit_name
    from hvkvm.record.timeline import Timeline

    file = open_to_write(path, "--timeline ")
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
            if not records.started:
                return
            if path.suffix == ".json":
                import json

                text = json.dumps(chrome(timeline))
            else:
                text = svg(timeline)
            file.begin()  # not before: a run that is killed leaves the picture that was there
            write_in_time(file.fd, text.encode("utf-8", "backslashreplace"), WRITE_SECONDS)
        except OSError as error:
            records.no_picture = f"{path}: {error.strerror}; there is no picture"
            platform.observer.event(Warned("timeline", records.no_picture))
        finally:
            file.close()

    stack.callback(write)
    platform.io.call_soon(sample)
