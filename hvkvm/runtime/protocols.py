"""What other modules need of the I/O loop and of a vCPU's thread, each protocol with one such need.

A class names in its constructor what it uses and no more, so tests can give it that and no more.
`io_loop.IoLoop` has all of the loop's, `vcpu_thread.VcpuThread` is a `VpThread`. The promises
(order, threads, what Stopped means) are theirs and stand there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu


class TimerHandle(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> object:
        """Do not call back any more; synchronous."""


class ReaderHandle(Protocol):
    """What `add_reader` returns."""

    def remove(self) -> object:
        """Watch no more; synchronous."""


class Deferrer(Protocol):
    """Runs something soon."""

    def call_soon(
        self, fn: Callable[..., object], *args: Any, cancelled: Callable[[], object] | None = None
    ) -> object: ...


class Delayer(Protocol):
    """Runs something later."""

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> TimerHandle: ...


class Watcher(Protocol):
    """Watches file descriptors."""

    def add_reader(self, fd: int, callback: Callable[[], object]) -> ReaderHandle: ...


class TimedWatcher(Delayer, Watcher, Protocol):
    """Watches file descriptors, and does something later."""


class EdgeWatcher(Protocol):
    """Watches eventfds edge-triggered too, and so without reading them."""

    def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> ReaderHandle: ...


class Rounds(Deferrer, Protocol):
    """Tells its rounds apart."""

    @property
    def rounds(self) -> int: ...


class Loop(Rounds, Delayer, Watcher, Protocol):
    """All of it."""

    def in_loop(self) -> bool:
        """Whether the caller runs on it; nobody does once it has ended."""


CallLater = Callable[..., TimerHandle]
"""`Delayer.call_later` alone: call_later(seconds, fn, *args)."""


class VpThread(Protocol):
    """The thread of a vCPU."""

    @property
    def vcpu(self) -> Vcpu: ...

    def submit(
        self, fn: Callable[..., object], *args: Any, cancelled: Callable[[], object] | None = None
    ) -> object: ...
