"""An interrupt line for devices that a test polls."""

from __future__ import annotations


class UnconnectedLine:
    """A line that leads nowhere."""

    def pulse(self) -> None:
        """Do nothing."""
