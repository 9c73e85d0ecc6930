"""What the host may not have for a machine: files, memory, threads; said in one line, with the remedy.

Called by the thread that builds the machine.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from hvkvm.errors import ConfigError, HostExhausted, exhausted

_PER_VCPU = 4
"""KVM's vCPU and its map, and the two SynIC pages."""
_PER_MACHINE = 64
_TO_SPARE = 1024
"""Channels of VMBus and connections of vsock have some each."""
_TO_SPARE_PER_VCPU = 8


def make_room_for_files(cpus: int) -> None:
    """Raise the soft limit of open files as far as a machine of `cpus` may need it.

    ConfigError where the hard one is too low to build it. A limit that leaves
    less than all that the guest may ever ask for is no error: what it asks for is
    refused then.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    needed = _open_files() + _PER_MACHINE + cpus * _PER_VCPU
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"--cpus {cpus}: needs {needed} open files, and this process may have {hard} (`ulimit -Hn`);"
            " raise that limit, or choose fewer"
        )
    wanted = needed + _TO_SPARE + cpus * _TO_SPARE_PER_VCPU
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:  # the kernel's own limit, or a sandbox
            if soft < needed:
                raise ConfigError(
                    f"--cpus {cpus}: needs {needed} open files, and this process may have {soft}, which"
                    f" cannot be raised ({error}); raise `ulimit -n`, or choose fewer"
                ) from error


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 3


@contextmanager
def named_when_exhausted() -> Iterator[None]:
    """Turn what the host says when it has no more of something into HostExhausted; the rest passes."""
    try:
        yield
    except (OSError, MemoryError) as error:
        what = exhausted(error)
        if what is None:
            raise
        raise HostExhausted(f"the host has no more to give: {what}") from error
