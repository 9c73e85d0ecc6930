"""The one doorbell of a guest that speaks VMBus 0.13 or 1.1; its interrupt page says which channel rang.

Owner: `channel_devices.ChannelDevices`, on the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi.vmbus import VMBUS_EVENT_CONNECTION_ID
from hvkvm.vmbus.interrupt_page import InterruptPage
from hvkvm.vmbus.open_channel import SynicUser
from hvkvm.vmbus.pages import Ram


class SharedDoorbell:
    """`rang(relid)` is called for each bit that the guest has set, whether or not there is such a channel."""

    def __init__(self, synic: SynicUser, memory: Ram, rang: Callable[[int], object]) -> None:
        self._synic = synic
        self._memory = memory
        self._rang = rang
        self.page: InterruptPage | None = None
        """The connection's, if its version has one."""
        self.held = False
        """At rest: bits stay, since every ring is looked into afterwards."""

    def open(self, gpa: int) -> None:
        """Heed the interrupt page at `gpa`; there is none yet. `open_channel.OPEN_FAILURES`."""
        page = InterruptPage(self._memory, gpa)
        status = self._synic.connections.add_event(VMBUS_EVENT_CONNECTION_ID, self._look)
        if status:
            raise OSError(-status, f"doorbell {VMBUS_EVENT_CONNECTION_ID:#x}")
        self.page = page

    def close(self) -> None:
        """The connection is over. Idempotent."""
        if self.page is not None:
            self.page = None
            self._synic.connections.remove_event(VMBUS_EVENT_CONNECTION_ID)

    def _look(self) -> None:
        if self.page is not None and not self.held:
            for relid in self.page.take():
                self._rang(relid)
