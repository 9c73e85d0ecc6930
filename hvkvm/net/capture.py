"""Frames written to a pcapng file while they go by, which Wireshark and tcpdump read, also while it grows.

Each frame is a block, and each batch one write, so that a reader finds whole blocks. Frames are as the NIC
and the wire exchange them: one whose checksum is left to somebody else has a partial one there, one not yet
cut is long. A host that can take no more ends the capture, and the guest's network goes on. Writes go to the
page cache, or to a FIFO that a reader has open. The file keeps what it held until the loop runs.

Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time_ns

from hvkvm.abi import pcapng
from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.given_file import open_to_write
from hvkvm.net.between import Between
from hvkvm.net.port import Frame, frame_bytes
from hvkvm.net.wire import Wire

MAX_VIEWS = 1024
"""IOV_MAX."""


class Capture(Between):
    """Writes what goes over `below` to `path`, from its start on. ConfigError if it cannot be."""

    def __init__(self, below: Wire, path: Path, name: str, *, observer: Observer = NULL_OBSERVER) -> None:
        super().__init__(below)
        self.path = path
        self.frames_written = 0
        self.failure = ""
        self._observer = observer
        self._file = open_to_write(path, "--net pcap=", 0o600)
        described = pcapng.interface_description(pcapng.LINKTYPE_ETHERNET, name)
        self._header: list[bytes | memoryview] = [pcapng.section_header("hvkvm"), described]

    def link(self, up: bool) -> None:
        """See `Receiver.link`. It is the first call once the loop runs: now the file is the run's."""
        header, self._header = self._header, []
        if header:
            self._write(header, anew=True)
        super().link(up)

    def send(self, frames: Sequence[Frame], queue: int = 0) -> int:
        """See `Port.send`. What was taken is written."""
        taken = self.below.send(frames, queue)
        self._record(frames[:taken], pcapng.OUTBOUND)
        return taken

    def frames(self, frames: Sequence[Frame]) -> int:
        """See `Receiver.frames`. What was taken is written."""
        taken = super().frames(frames)
        self._record(frames[:taken], pcapng.INBOUND)
        return taken

    def close(self) -> None:
        """See `Port.close`."""
        super().close()
        self._file.close()

    def inspect(self) -> Mapping[str, object]:
        """See `Port.inspect`."""
        shown = {**super().inspect(), "pcap": str(self.path), "pcap_frames": self.frames_written}
        return {**shown, "pcap_failure": self.failure} if self.failure else shown

    def _record(self, frames: Sequence[Frame], direction: int) -> None:
        if self._file.fd < 0 or not frames:
            return
        now = time_ns()
        views: list[bytes | memoryview] = []
        for frame in frames:
            before, behind = pcapng.around_packet(0, now, frame_bytes(frame), direction=direction)
            views += [before, *frame[1:], behind]
        self.frames_written += len(frames)
        self._write(views)

    def _write(self, views: list[bytes | memoryview], *, anew: bool = False) -> None:
        whole = [b"".join(views)] if len(views) > MAX_VIEWS else views
        try:
            if anew:
                self._file.begin()
            count = os.writev(self._file.fd, whole)
            if count < sum(map(len, whole)):
                raise OSError(None, "took a part of it only")
        except OSError as error:
            self.failure = error.strerror or str(error)
            self._file.close()
            text = f"{self.path}: {self.failure}; the capture has ended, the network goes on"
            self._observer.event(Warned("net-pcap", text))
