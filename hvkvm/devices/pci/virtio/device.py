"""What a virtio device is to its transport. No code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hvkvm.devices.pci.virtio.ring import Chain


class Device(Protocol):
    """What is behind the transport. Owner: the I/O loop, but for `config`, which any thread reads."""

    kind: int
    class_code: int
    features: int
    """Offered beside those of the transport."""
    queue_sizes: tuple[int, ...]
    config: bytes

    def perform(self, chain: Chain, done: Callable[[int], object]) -> None:
        """Carry a request out; `done(written)` once, here or later. Nothing is raised."""
        ...

    def flush_answers(self) -> None:
        """Answer now what can be: the end of a turn."""
        ...

    def drain(self, done: Callable[[], object]) -> None:
        """`done()` on the loop once no worker uses guest memory."""
        ...

    def inspect(self) -> dict[str, object]: ...
