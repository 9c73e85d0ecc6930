"""A kernel fd with an owner: closed once, whoever asks and however often.

Base of `Kvm`, `Vm` and `Vcpu`. Closing belongs to the thread that owns the
machine's lifetime; no vCPU may be inside KVM_RUN on the fd by then.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import TypeVar

_Self = TypeVar("_Self", bound="Handle")


class Handle:
    """Owns one fd; a context manager; `fd` is -1 once closed, so that late use fails with EBADF."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def close(self) -> None:
        """Close the fd; again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.fd < 0 else f"fd {self.fd}"
        return f"<{type(self).__name__} {state}>"
