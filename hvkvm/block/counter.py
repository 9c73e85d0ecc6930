"""What a disk did of one kind of request."""

from __future__ import annotations


class Counter:
    """Requests, bytes, failures, seconds from submit to done (of those that were not done at once)."""

    __slots__ = ("bytes", "failed", "requests", "seconds")

    def __init__(self) -> None:
        self.requests = self.bytes = self.failed = 0
        self.seconds = 0.0

    def inspect(self) -> dict[str, object]:
        """By these names."""
        seconds = round(self.seconds, 6)
        return {"requests": self.requests, "bytes": self.bytes, "failed": self.failed, "seconds": seconds}
