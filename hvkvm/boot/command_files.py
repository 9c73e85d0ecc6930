"""What runs a command in a guest, with its files, as an archive.

Why: a copy of a warm guest is handed this alone, and then needs nothing of what makes a whole
`initramfs`. Pure but for reading files; any thread.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvkvm import given_file
from hvkvm.abi.guest_command import CommandIo, place_of
from hvkvm.boot import cpio, guest_scripts
from hvkvm.errors import BootError

OWN = frozenset({"init", "begin", "command", "session", "launch", "terminal"})
"""Where our own scripts are that run a command: a file of somebody's there would take their place.
Who gives one for a program of ours in /bin means to."""


def orders(
    command: Sequence[str] | None,
    *,
    files: Mapping[str, bytes | Path] | None = None,
    command_io: CommandIo = "console",
    vsock: bool = False,
    terminal_type: str | None = None,
) -> bytes:
    """The archive that an init built with `awaits` unpacks, to run `command`.

    Arguments and BootError are those of `initramfs.build`.
    """
    begin = programs(command, command_io, vsock=vsock, terminal_type=terminal_type)
    return pack_files(files or {}, begin)


def pack_files(files: Mapping[str, bytes | Path], programs: Mapping[str, str] | None = None) -> bytes:
    """An archive of `files` as `initramfs.build` takes them and of executable `programs`. BootError.

    With `programs` no file may lie where one of ours does.
    """
    entries = [
        cpio.regular(name, text.encode(errors="surrogateescape"), 0o755)
        for name, text in (programs or {}).items()
    ]
    for name in files if programs is not None else ():
        if place_of(name) in OWN:
            raise BootError(f"--file {name}: hvkvm's own script is there; give it another path in the guest")
    entries += [_file(name, source) for name, source in files.items()]
    return cpio.pack(cpio.with_parents(entries))


def programs(
    command: Sequence[str] | None, command_io: CommandIo, *, vsock: bool, terminal_type: str | None
) -> dict[str, str]:
    """What runs `command`, by its guest paths; `begin` is where the init goes on."""
    line = f"exec {shlex.join(command)}" if command else "echo 'hvkvm: a shell; exit ends the guest'\nexec sh"
    if command_io == "terminal" and command and terminal_type:
        line = f"export TERM={shlex.quote(terminal_type)}\n{line}"
    programs = {"command": f"{line}\n"}
    if not command or command_io == "console":
        programs |= {"begin": guest_scripts.CONSOLE_BEGIN, "session": guest_scripts.CONSOLE_SESSION}
    elif command_io == "terminal":
        programs |= {
            "begin": guest_scripts.SERIAL_BEGIN,
            "session": guest_scripts.TERMINAL_SESSION,
            "terminal": guest_scripts.TERMINAL,
        }
    else:
        programs |= {
            "begin": guest_scripts.VSOCK_BEGIN if vsock else guest_scripts.SERIAL_BEGIN,
            "session": guest_scripts.STREAM_SESSION,
            "launch": guest_scripts.LAUNCH,
        }
    return programs


def _file(name: str, source: bytes | Path) -> cpio.Entry:
    if isinstance(source, bytes):
        return cpio.regular(name, source)
    data = read(source)
    return cpio.regular(name, data, stat.S_IMODE(os.stat(source).st_mode))


def read(path: Path) -> bytes:
    """Its content. BootError."""
    try:
        return given_file.read(path)
    except OSError as error:
        raise BootError(f"{path}: {error.strerror}; check the path") from error
