"""SINT routes: a host device's way to interrupt a VP, set its event flags and send it messages.

Routes to one (vp, sint) share one line, because KVM tells EOM to one GSI per
SINT only (S12). The line lives as long as somebody holds it: an open route, or
a message still under way (S19). `RouteTable` counts; its lock is never held
while a line is closed or a callback runs. Everything here may be called from
any thread; only the seam of the SynIC is known.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from hvkvm.abi.hv_synic import (
    HV_EVENT_FLAGS_COUNT,
    HV_MESSAGE_PAYLOAD_BYTE_COUNT,
    HV_SYNIC_SINT_COUNT,
    hv_message,
)
from hvkvm.errors import HvkvmError, RouteError
from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.hyperv.staging import Staging
from hvkvm.hyperv.synic.seam import SintLine, Synic, SynicVp
from hvkvm.runtime.protocols import Deferrer


class _SharedLine:
    """What the routes of one (vp, sint) share. Fields are guarded by the table's lock."""

    __slots__ = ("line", "refs", "routes", "sint", "user", "vp")

    def __init__(self, vp: SynicVp, sint: int, line: SintLine) -> None:
        self.vp = vp
        self.sint = sint
        self.line = line
        self.refs = 0
        self.routes: list[SintRoute] = []
        self.user: SintRoute | None = None
        """The one route with a completion callback."""


class SintRoute:
    """One user's route to SINT `sint` of VP `vp_index`; `RouteTable.open` makes it. Close it when done."""

    __slots__ = ("_closed", "_pulse", "_set_flag", "_shared", "_table", "sint", "staging", "vp_index")

    def __init__(self, table: RouteTable, shared: _SharedLine, staging: Staging | None) -> None:
        self.vp_index = shared.vp.vp_index
        self.sint = shared.sint
        self.staging = staging
        """The staging area, or None on a route without completion callback (S13)."""
        self._table = table
        self._shared = shared
        self._closed = False
        self._pulse = shared.line.pulse
        self._set_flag = shared.vp.set_event_flag

    def pulse(self) -> int:
        """Raise the SINT once: 0 or -errno. A masked SINT swallows it silently (S20)."""
        return -errno.ENXIO if self._closed else self._pulse()

    def post(self, message_type: int, payload: bytes) -> int:
        """Send a message: 0 when accepted, -EAGAIN while an earlier one is under way, -ENXIO when closed.

        After 0 the route's `on_complete(status)` is called once, on the I/O
        loop; see `Staging` for the statuses. `message_type` is 1..2**32-1,
        `payload` at most HV_MESSAGE_PAYLOAD_BYTE_COUNT bytes. Raises ValueError
        for anything else and on a route without completion callback (S21).
        """
        if self.staging is None:
            raise ValueError("posting needs a route that was opened with on_complete")
        if len(payload) > HV_MESSAGE_PAYLOAD_BYTE_COUNT or not 0 < message_type <= 0xFFFFFFFF:
            raise ValueError(
                f"no message can have type {message_type:#x} and {len(payload)} bytes of payload"
            )
        return self.staging.post(hv_message(message_type, payload))

    def retry(self) -> None:
        """Try the message that waits for the guest's EOM again, for a guest that writes it elsewhere."""
        if self.staging is not None:
            self.staging.retry()

    def set_event_flag(self, number: int) -> int:
        """Set an event flag, and raise the SINT if it was clear (S35): 0 or -errno.

        -EINVAL outside 0..HV_EVENT_FLAGS_COUNT-1 (S33), -ENXIO while the guest
        has no event page (S34) or when closed.
        """
        if not 0 <= number < HV_EVENT_FLAGS_COUNT:
            return -errno.EINVAL
        if self._closed:
            return -errno.ENXIO
        status = self._set_flag(self.sint, number)
        return self._pulse() if status == 1 else status

    def close(self) -> None:
        """Give the route up. Idempotent.

        A message that is queued to the vCPU still makes its one attempt; one
        that waits for the guest's EOM completes with -ECANCELED. The line goes
        with its last holder.
        """
        self._table.close_route(self, withdraw=False)


class RouteTable:
    """All routes of a VM."""

    def __init__(self, synic: Synic, io: Deferrer, *, observer: Observer = NULL_OBSERVER) -> None:
        self._synic = synic
        self._io = io
        self._observer = observer
        self._lock = threading.Condition(threading.Lock())
        self._lines: dict[tuple[int, int], _SharedLine] = {}
        self._closed = False

    def open(self, vp_index: int, sint: int, on_complete: Callable[[int], None] | None = None) -> SintRoute:
        """A route to (vp_index, sint). Raises RouteError with the reason, and then nothing stays behind.

        Both numbers may come straight from a guest (S10, S11). A (vp, sint) has
        one user with `on_complete` at a time (S12).
        """
        where = f"SINT {sint} of VP {vp_index}"
        if not 0 <= sint < HV_SYNIC_SINT_COUNT:
            raise RouteError(f"{where}: a VP has SINTs 0 to {HV_SYNIC_SINT_COUNT - 1}")
        vp = self._synic.vp(vp_index)
        if vp is None:
            raise RouteError(f"{where}: no such VP, or it has no SynIC")
        key = (vp_index, sint)
        with self._lock:
            # A line without holders is being closed by somebody. Two lines at once would be two GSIs for one
            # SINT, and KVM might tell the wrong one of an EOM.
            while (shared := self._lines.get(key)) is not None and not shared.refs:
                self._lock.wait()
            if self._closed:
                raise RouteError(f"{where}: this machine is being closed")
            if shared is not None and on_complete is not None and shared.user is not None:
                raise RouteError(f"{where}: another route already receives its completions")
            try:
                if shared is None:
                    line = self._synic.open_line(vp_index, sint, acks=on_complete is not None)
                    shared = self._lines[key] = _SharedLine(vp, sint, line)
                elif on_complete is not None:
                    shared.line.enable_acks()
            except (OSError, HvkvmError) as error:
                raise RouteError(f"{where}: {error}") from error
            staging = None
            if on_complete is not None:
                staging = self._staging(shared, on_complete)
            route = SintRoute(self, shared, staging)
            if staging is not None:
                shared.user = route
            shared.routes.append(route)
            shared.refs += 1
            return route

    def _staging(self, shared: _SharedLine, on_complete: Callable[[int], None]) -> Staging:
        def drop() -> None:
            self._release(shared)

        return Staging(shared.vp, shared.sint, shared.line, self._io, on_complete, drop)

    def close_route(self, route: SintRoute, *, withdraw: bool) -> bool:
        """Close `route` once; False if it was closed. `SintRoute.close` calls this."""
        shared = route._shared
        with self._lock:
            if route._closed:
                return False
            route._closed = True
            shared.routes.remove(route)
            if shared.user is route:
                shared.user = None
        if route.staging is None:
            self._release(shared)
        else:
            route.staging.close(withdraw=withdraw)  # releases behind a message that is under way
        return True

    def _release(self, shared: _SharedLine) -> None:
        with self._lock:
            shared.refs -= 1
            if shared.refs:
                return
        try:
            # Outside the lock: it waits for an ack handler, and does several system calls.
            shared.line.close()
        finally:
            with self._lock:
                self._lines.pop((shared.vp.vp_index, shared.sint), None)
                self._lock.notify_all()

    def close_all(self, why: str | None) -> int:
        """Force every open route closed, withdrawing what it has under way; how many there were (S7).

        `why` ("at reset") goes into one warning a route; None is silent.
        """
        with self._lock:
            routes = [route for shared in self._lines.values() for route in shared.routes]
        closed = 0
        for route in routes:
            if not self.close_route(route, withdraw=True):
                continue
            closed += 1
            if why is not None:
                text = f"the route to SINT {route.sint} of VP {route.vp_index} was still open {why}: closed"
                self._observer.event(Warned("sint-route", text))
        return closed

    def close(self) -> None:
        """Close every route and refuse more. Idempotent. vCPU threads have ended, or soon will."""
        with self._lock:
            self._closed = True
        self.close_all(None)
        with self._lock:
            # Held by messages whose completion was queued to a loop that never ran it.
            left = [shared for shared in self._lines.values() if shared.refs]
            for shared in left:
                del self._lines[shared.vp.vp_index, shared.sint]
        for shared in left:
            shared.line.close()

    def snapshot(self) -> list[dict[str, object]]:
        """Each (vp, sint) in use: who holds it, and how far its messages are. Any thread."""
        with self._lock:
            return [
                {
                    "vp": s.vp.vp_index,
                    "sint": s.sint,
                    "routes": len(s.routes),
                    "holders": s.refs,
                    "messages": [r.staging.state.value for r in s.routes if r.staging is not None],
                }
                for s in self._lines.values()
            ]
