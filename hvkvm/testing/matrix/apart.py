"""What the cases of a matrix cannot share, since they run side by side.

A file that several of them write is one of each, with the case's number in its name: so every case has its
recording. What else only one machine at a time can have is an error, which names the key and a remedy.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.nic_spec import NicSpec, forwards_of
from hvkvm.testing.matrix.cases import Case


def apart(cases: Sequence[Case], file: str, *, alone: bool = False) -> list[Case]:
    """The cases, each with files of its own; `file` is the matrix's name in errors. ConfigError.

    `alone`: one runs at a time, so that they may share what is not a file to keep.
    """
    taken = Counter(what for case in cases for what in set(_taken(case.config)))
    for (key, value, why), count in taken.items():
        if count > 1 and not alone:
            raise ConfigError(
                f"{file}: {key}: {value} is given to {count} cases, and {why};"
                " leave it out, give it to one of them, or run them with --jobs 1"
            )
    written = Counter(what for case in cases for what in set(_written(case.config)))
    paths = {path for _key, path in written}
    shared = {path for (_key, path), count in written.items() if count > 1}
    for key, path in written:
        if path in shared and _is_pipe(path) and not alone:
            raise ConfigError(
                f"{file}: {key}: {path} is a pipe, and several cases write to it; name a file,"
                " or run them with --jobs 1"
            )
    shared = {path for path in shared if _is_file(path)}
    return [_with_own_files(case, shared, paths, file) for case in cases]


def _taken(config: MachineConfig) -> Iterator[tuple[str, str, str]]:
    """Key, value and reason of what only one machine at a time can have."""
    if config.vsock is not None:
        yield "vsock", str(config.vsock), "each makes this socket"
    if config.firmware_vars is not None:
        yield "firmware_vars", str(config.firmware_vars), "each writes it"
    if config.control == "auto" and config.name:
        yield "name", config.name, "each makes a control socket of this name"
    elif config.control not in ("auto", "off"):
        yield "control", config.control, "each makes this socket"
    for nic in config.nets:
        yield from _taken_by(nic)


def _taken_by(nic: NicSpec) -> Iterator[tuple[str, str, str]]:
    if nic.listen is not None:
        yield "nets listen", str(nic.listen), "each makes this socket"
    if nic.tap:
        yield "nets tap", nic.tap, "one at a time can have this interface"
    if nic.name:
        yield "nets name", nic.name, "each makes this interface"
    for protocol, address, port, _guest in forwards_of(nic):
        yield "nets forward", f"{protocol}:{address}:{port}", "one at a time can have this port"


def _written(config: MachineConfig) -> Iterator[tuple[str, Path]]:
    """Key and path of the files that a machine makes anew."""
    for record in config.record:
        yield "record", record.file
    if config.timeline is not None:
        yield "timeline", config.timeline
    for nic in config.nets:
        if nic.pcap is not None:
            yield "nets pcap", nic.pcap


def _with_own_files(case: Case, shared: set[Path], taken: set[Path], file: str) -> Case:
    def own(path: Path) -> Path:
        if path not in shared:
            return path
        found = path.with_name(f"{path.stem}-{case.number}{path.suffix}")
        if found in taken:
            raise ConfigError(
                f"{file}: {path} of case {case.number} is {found}, which is given, too; name another"
            )
        return found

    config = case.config
    changes = {
        "record": tuple(one._replace(file=own(one.file)) for one in config.record),
        "timeline": config.timeline and own(config.timeline),
        "nets": tuple(nic._replace(pcap=nic.pcap and own(nic.pcap)) for nic in config.nets),
    }
    return case._replace(config=config._replace(**changes))  # type: ignore[arg-type]


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError:  # whoever writes it makes it, or says why not
        return None


def _is_pipe(path: Path) -> bool:
    mode = _mode(path)
    return mode is not None and stat.S_ISFIFO(mode)


def _is_file(path: Path) -> bool:
    """Whether it is a file or will be one; a device such as /dev/null may be shared."""
    mode = _mode(path)
    return mode is None or stat.S_ISREG(mode)
