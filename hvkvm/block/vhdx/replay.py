"""Replays a VHDX's log into its file, once the log and all behind it were found sound."""

from __future__ import annotations

from os import urandom

from hvkvm.block.host_file import HostFile
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.layout import NO_GUID
from hvkvm.block.vhdx.log import Replay


def apply_replay(file: HostFile, head: Header, replay: Replay) -> Header:
    """Put what the log holds in its place, stable, then say that it is empty; the new header. OSError.

    A crash in here leaves the log as it was, and the next one replays it again.
    """
    size = file.size()
    if size < replay.size:
        file.truncate(replay.size)  # first, as it may be more than this host takes
    for offset, length in replay.zeroed:
        if offset < size:  # beyond its end are zeros already
            file.zero(offset, min(length, size - offset), may_unmap=True)
    for offset, data in replay.sectors.items():
        file.pwrite(offset, data)
    file.sync()
    after = head.next(log_guid=NO_GUID, file_write_guid=urandom(16))
    file.pwrite(after.offset, after.pack())
    file.sync()
    return after
