"""Starting a thread where the host may have none to give (RLIMIT_NPROC, a cgroup's pids.max, memory)."""

from __future__ import annotations

import threading

from hvkvm.errors import HostExhausted


def start_thread(thread: threading.Thread) -> None:
    """Start `thread`, once (RuntimeError). HostExhausted when none can be had; then it never runs."""
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        if thread.ident is not None:
            raise
        raise HostExhausted(
            f"no thread for {thread.name}: {error or 'out of memory'}; end other programs, or raise"
            " `ulimit -u` or the control group's pids.max"
        ) from error
