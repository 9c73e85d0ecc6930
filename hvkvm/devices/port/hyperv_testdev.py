"""hyperv-testdev: the port by which kvm-unit-tests drive SINT routes and connections.

One 32-bit port. A written value packs sint (bits 7:0), vp_index (15:8), the
command (23:16) and conn_id (31:24); reads give 0. The protocol is QEMU's
hyperv_testdev; there a bad request ends the VMM by an assertion and a message
of exactly 240 bytes does too, here the one is counted and reported, and the
other echoed.

Requests run on the writing vCPU's thread, one at a time under the device's
lock; message handlers on the posting vCPU's thread; completions and event
callbacks on the I/O loop. The latter never take the device's lock, because
removing a connection waits for them.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from hvkvm.abi.board import HYPERV_TESTDEV_PORT, HYPERV_TESTDEV_SIZE
from hvkvm.abi.hv_synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT, hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.devices.port.complaints import Complaints
from hvkvm.devices.port.testdev_state import Connection, Echo, Target, TestdevState
from hvkvm.errors import HvkvmError
from hvkvm.events import NULL_OBSERVER, Observer

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus
    from hvkvm.hyperv.partition import Partition
    from hvkvm.hyperv.sint_route import SintRoute

HV_TEST_DEV_SINT_ROUTE_CREATE = 1
HV_TEST_DEV_SINT_ROUTE_DESTROY = 2
HV_TEST_DEV_SINT_ROUTE_SET_SINT = 3
HV_TEST_DEV_MSG_CONN_CREATE = 4
HV_TEST_DEV_MSG_CONN_DESTROY = 5
HV_TEST_DEV_EVT_CONN_CREATE = 6
HV_TEST_DEV_EVT_CONN_DESTROY = 7

_LAST_CONN_ID = 0xFF
MAX_ROUTES = 1024
"""Plain routes a guest may hold. Connections need no bound: their ids have 8 bits."""


class _MessageEcho:
    """A message connection: what the guest posts comes back on the connection's own SINT."""

    def __init__(self, testdev: HypervTestdev, conn_id: int) -> None:
        self._testdev = testdev
        self._conn_id = conn_id
        self._lock = threading.Lock()
        self._sending: tuple[int, bytes] | None = None
        self._closed = False
        self.route: SintRoute | None = None

    def handle(self, message: hv_post_message_input) -> HvStatus:
        """Echo `message`: INSUFFICIENT_BUFFERS while the one before is under way. Posting vCPU's thread."""
        size = min(message.payload_size, HV_MESSAGE_PAYLOAD_BYTE_COUNT)
        echo = message.message_type, bytes(memoryview(message.payload)[:size])
        with self._lock:
            # The staging area is free a moment before `complete` forgets the message.
            if self._sending is not None:
                return HvStatus.INSUFFICIENT_BUFFERS
            status = self._post(echo)
        if status == -errno.EAGAIN:
            return HvStatus.INSUFFICIENT_BUFFERS
        return HvStatus.INVALID_HYPERCALL_INPUT if status else HvStatus.SUCCESS

    def _post(self, echo: tuple[int, bytes]) -> int:
        if self.route is None or self._closed or not echo[0]:
            return -errno.EINVAL
        self._sending = echo  # before posting: the completion may come before post returns
        status = self.route.post(*echo)
        if status:
            self._sending = None
        return status

    def complete(self, status: int) -> None:
        """The guest has the message, or never will. I/O loop."""
        if status and not self._closed:
            self._testdev.complaints.add(f"connection {self._conn_id:#x}: message not delivered, {-status}")
        with self._lock:
            self._sending = None

    def save(self) -> Echo | None:
        """What the guest has not got yet. At rest: what was written to its slot has completed by then."""
        return None if self._sending is None else Echo(self._conn_id, *self._sending)

    def load(self, echo: Echo) -> None:
        """Go on with it."""
        with self._lock:
            self._post((echo.message_type, echo.payload))

    def close(self) -> None:
        self._closed = True
        if self.route is not None:
            self.route.close()


class HypervTestdev:
    """The device. Routes and connections that the guest left are gone after `close` or `reset`."""

    def __init__(self, partition: Partition, observer: Observer = NULL_OBSERVER) -> None:
        self.complaints = Complaints(observer, "hyperv-testdev")
        self._partition = partition
        self._lock = threading.Lock()
        self._routes: list[SintRoute] = []
        self._messages: dict[int, _MessageEcho] = {}
        self._events: dict[int, SintRoute] = {}

    def attach(self, bus: PortBus, port: int = HYPERV_TESTDEV_PORT) -> None:
        """Claim the port; ConfigError when taken."""
        bus.add(port, HYPERV_TESTDEV_SIZE, self)

    def read(self, offset: int, size: int) -> int:
        """Always 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Do one request. A bad one is counted in `complaints`."""
        if offset or size != HYPERV_TESTDEV_SIZE:
            self.complaints.add(f"a {size}-byte write at offset {offset}: only 32-bit writes are requests")
            return
        sint, vp_index, command, conn_id = value.to_bytes(4, "little")
        try:
            with self._lock:
                problem = self._do(command, vp_index, sint, conn_id)
        except (HvkvmError, OSError) as error:
            problem = str(error)
        if problem is not None:
            self.complaints.add(f"request {value:#010x}: {problem}")

    def _do(self, command: int, vp_index: int, sint: int, conn_id: int) -> str | None:
        """Run a command; what was wrong with it, or None. Unknown commands do nothing, as in QEMU."""
        if command == HV_TEST_DEV_SINT_ROUTE_CREATE:
            if len(self._routes) >= MAX_ROUTES:
                return f"there are {MAX_ROUTES} routes already"
            self._routes.append(self._partition.open_route(vp_index, sint))
        elif command in (HV_TEST_DEV_SINT_ROUTE_DESTROY, HV_TEST_DEV_SINT_ROUTE_SET_SINT):
            for route in self._routes:
                if (route.vp_index, route.sint) == (vp_index, sint):
                    break
            else:
                return f"no route to SINT {sint} of VP {vp_index}"
            if command == HV_TEST_DEV_SINT_ROUTE_SET_SINT:
                return _failure(route.pulse())
            self._routes.remove(route)
            route.close()
        elif command == HV_TEST_DEV_MSG_CONN_CREATE:
            return self._create_message(vp_index, sint, conn_id)
        elif command == HV_TEST_DEV_EVT_CONN_CREATE:
            return self._create_event(vp_index, sint, conn_id)
        elif command == HV_TEST_DEV_MSG_CONN_DESTROY:
            return None if self._destroy_message(conn_id) else f"no message connection {conn_id:#x}"
        elif command == HV_TEST_DEV_EVT_CONN_DESTROY:
            return None if self._destroy_event(conn_id) else f"no event connection {conn_id:#x}"
        return None

    def _create_message(self, vp_index: int, sint: int, conn_id: int) -> str | None:
        if conn_id in self._messages:
            return f"message connection {conn_id:#x} exists"
        echo = _MessageEcho(self, conn_id)
        echo.route = self._partition.open_route(vp_index, sint, echo.complete)
        status = self._partition.connections.add_message(conn_id, echo.handle)
        if status:
            echo.close()
        else:
            self._messages[conn_id] = echo
        return _failure(status)

    def _create_event(self, vp_index: int, sint: int, conn_id: int) -> str | None:
        if conn_id in self._events:
            return f"event connection {conn_id:#x} exists"
        route = self._partition.open_route(vp_index, sint)

        def signalled() -> None:
            status = route.set_event_flag(conn_id)
            if status < 0:
                self.complaints.add(f"event connection {conn_id:#x}: flag not set, {-status}")

        status = -errno.EIO
        try:
            status = self._partition.connections.add_event(conn_id, signalled)
        finally:
            if status:
                route.close()
        if not status:
            self._events[conn_id] = route
        return _failure(status)

    def _destroy_message(self, conn_id: int) -> bool:
        echo = self._messages.pop(conn_id, None)
        if echo is None:
            return False
        self._partition.connections.remove_message(conn_id)  # returns when no vCPU is in the handler any more
        echo.close()
        return True

    def _destroy_event(self, conn_id: int) -> bool:
        route = self._events.pop(conn_id, None)
        if route is None:
            return False
        self._partition.connections.remove_event(conn_id)
        route.close()
        return True

    def save(self) -> TestdevState:
        """The guest's routes and connections. Only while the machine is at rest."""
        messages, events = sorted(self._messages.items()), sorted(self._events.items())
        echoes = [echo.save() for _, echo in messages]
        return TestdevState(
            tuple(_target(route) for route in self._routes),
            tuple(Connection(conn_id, _target(echo.route)) for conn_id, echo in messages if echo.route),
            tuple(Connection(conn_id, _target(route)) for conn_id, route in events),
            tuple(echo for echo in echoes if echo is not None),
        )

    def load(self, state: TestdevState) -> None:
        """Make them again. ValueError for what no guest can have made. Only while the machine is at rest."""
        requests = [(HV_TEST_DEV_SINT_ROUTE_CREATE, target, 0) for target in state.routes]
        requests += [(HV_TEST_DEV_MSG_CONN_CREATE, made.target, made.conn_id) for made in state.messages]
        requests += [(HV_TEST_DEV_EVT_CONN_CREATE, made.target, made.conn_id) for made in state.events]
        for command, target, conn_id in requests:
            try:
                if not 0 <= conn_id <= _LAST_CONN_ID:
                    raise ValueError(f"connection {conn_id:#x} is none of its own")
                problem = self._do(command, target.vp_index, target.sint, conn_id)
            except HvkvmError as error:
                raise ValueError(str(error)) from None
            if problem is not None:
                raise ValueError(problem)
        for echo in state.waiting:
            made = self._messages.get(echo.conn_id)
            right = 0 < echo.message_type <= 0xFFFFFFFF and len(echo.payload) <= HV_MESSAGE_PAYLOAD_BYTE_COUNT
            if made is None or not right:
                raise ValueError(f"no message can wait on connection {echo.conn_id:#x}")
            made.load(echo)

    def reset(self) -> None:
        """Give up every route and connection: before the SynIC resets (S7). Any thread."""
        with self._lock:
            for conn_id in list(self._messages):
                self._destroy_message(conn_id)
            for conn_id in list(self._events):
                self._destroy_event(conn_id)
            for route in self._routes:
                route.close()
            self._routes.clear()

    close = reset


def _target(route: SintRoute) -> Target:
    return Target(route.vp_index, route.sint)


def _failure(status: int) -> str | None:
    return None if not status else errno.errorcode.get(-status, str(status))
