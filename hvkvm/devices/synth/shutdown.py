"""Shutdown: the host asks the guest to power off or reboot, cleanly.

Owner: the I/O loop.
"""

from __future__ import annotations

from hvkvm.abi import ic, vmbus
from hvkvm.devices.synth.ic import IntegrationComponent, Reply, Wanted

_FLAGS = {
    "power-off": ic.SD_FLAG_FORCE,
    "reboot": ic.SD_FLAG_REBOOT | ic.SD_FLAG_FORCE,
    "hibernate": ic.SD_FLAG_HIBERNATE,
}
_REASON_PLANNED = 0x80000000
TIMEOUT_SECONDS = 60


class Shutdown(IntegrationComponent):
    """The guest answers at once and acts behind it."""

    NAME = "shutdown"
    INTERFACE = vmbus.HV_SHUTDOWN_GUID
    MESSAGE_VERSIONS = ((1, 0), (3, 0), (3, 1), (3, 2))

    def request(self, what: str, reply: Reply | None = None, wanted: Wanted | None = None) -> bool:
        """Ask for "power-off", "reboot" or "hibernate". ValueError else.

        False when no driver is there, or too many requests wait for it. `wanted` as in `ask`.
        """
        flags = _FLAGS.get(what)
        if flags is None:
            raise ValueError(f"{what}: choose {', '.join(_FLAGS)}")
        body = ic.shutdown_msg_data.pack(_REASON_PLANNED, TIMEOUT_SECONDS, flags, b"")
        return self.ask(ic.ICMSGTYPE_SHUTDOWN, body, reply, wanted)
