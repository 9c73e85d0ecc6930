"""A machine's Linux kernel log: `observe.kernel_log`, told which page tables its vCPUs run under.

Any thread but a vCPU's or the I/O loop's: it asks the vCPUs' threads, and searches RAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hvkvm.errors import HvkvmError
from hvkvm.observe.kernel_log import Line, NoKernelLog, read

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.machine.platform import Platform
    from hvkvm.runtime.vcpu_thread import VcpuThread

ANSWER_SECONDS = 1.0


def kernel_log(platform: Platform) -> list[Line]:
    """See `observe.kernel_log.read`. NoKernelLog."""
    return read(platform.memory, _page_tables(platform.threads))


def last_lines(platform: Platform, count: int, console: Sequence[str]) -> list[str]:
    """The log's last `count` lines; none where there is no log, or where `console` has the last of them."""
    try:
        log = kernel_log(platform)
    except NoKernelLog:
        return []
    if not log or any(log[-1].text in line for line in console):
        return []
    return [str(line) for line in log[-count:]]


def _page_tables(threads: Iterable[VcpuThread]) -> Iterator[int]:
    """CR3 of each vCPU whose thread answers; of one whose thread has ended too."""
    for thread in threads:
        try:
            if thread.join(0):
                yield _cr3(thread.vcpu)
            else:
                yield thread.call(_cr3, thread.vcpu, timeout=ANSWER_SECONDS)
        except (HvkvmError, TimeoutError):
            continue  # it only helps to choose


def _cr3(vcpu: Vcpu) -> int:
    return int(vcpu.sregs().cr3)
