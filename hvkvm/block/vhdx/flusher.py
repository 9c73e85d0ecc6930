"""When what of a VHDX becomes stable: the first write, each flush, and the end.

Data first, then the log with what changed of the metadata, then the metadata in its place. So a crash at any
moment leaves the metadata of one flush or of the next, and data that is stable where that metadata says. What
changed in more pages than a log entry takes is several entries, each stable and in its place before the next:
then a crash may leave the first of the next flush's, in an order (`Bat`) in which they are sound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from os import urandom

from hvkvm.block.host_file import HostFile
from hvkvm.block.vhdx.header import Header
from hvkvm.block.vhdx.log_writer import BATCH, LogWriter
from hvkvm.block.vhdx.pages import Pages


class Flusher:
    """Of `file`, whose metadata are `pages`; `end()` is the size up to which blocks were given out.

    Workers call, several at once; one flush at a time is under way, and serves all that were called before it
    began.
    """

    def __init__(self, file: HostFile, head: Header, pages: Pages, end: Callable[[], int]) -> None:
        self.keep_data_guid = False
        """The data will be what it is, as for `compact`: children of this disk stay its children."""
        self._file = file
        self._pages = pages
        self._end = end
        self._log = LogWriter(file, head)
        self._writing = False
        self._lock = threading.Lock()
        self._begun = self._covered = 0

    @property
    def writing(self) -> bool:
        """Whether the first write has begun, and so the file says that it changes. Any thread."""
        return self._writing

    def begin(self) -> None:
        """Before the first write since it was opened: new GUIDs say that the file, and its data, change."""
        if self._writing:
            return
        with self._lock:
            if self._writing:
                return
            end = self._end()
            if self._file.size() < end:  # a log entry promises whole MiB
                self._file.truncate(end)
            data_guid = self._log.head.data_write_guid if self.keep_data_guid else urandom(16)
            self._log.write_header(file_write_guid=urandom(16), data_write_guid=data_guid)
            self._writing = True

    def flush(self) -> None:
        """Make stable what was written before. OSError; then it is not, and a later flush tries it again."""
        if not self._writing:
            return
        wanted = self._begun + 1
        with self._lock:
            if self._covered >= wanted:
                return  # one that began since this was called has done it
            self._begun += 1
            taken = self._pages.take_dirty()
            end = self._end()
            try:
                self._file.sync()  # the data, and the place of what the flush before this one logged
                for at in range(0, len(taken), BATCH):
                    if at:
                        self._file.sync()
                    self._log.commit(taken[at : at + BATCH], end)
            except BaseException:
                self._pages.settled(taken, failed=True)
                raise
            self._pages.settled(taken)
            self._covered = self._begun

    def close(self) -> None:
        """Flush, and say that the log is empty. OSError."""
        if self._writing:
            self.flush()
            self._file.sync()
            self._log.close()
