"""The interface of network backends, and of layers on them: a port with a cable that can be pulled."""

from __future__ import annotations

from typing import Protocol

from hvkvm.net.port import Port


class Wire(Port, Protocol):
    """See `net.base.BasePort`."""

    @property
    def up(self) -> bool:
        """Whether it carries frames."""
        ...

    def plug(self, plugged: bool) -> None:
        """Have the cable plugged in, or pulled out. On the loop."""
        ...
