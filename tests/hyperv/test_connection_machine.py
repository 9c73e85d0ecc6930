"""Any order of adding, removing and calling connections answers as two dictionaries would (S37, S42)."""

from __future__ import annotations

import errno

from fake_kvm import FakeVm, ManualReaders
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.hyperv.connections import Connections
from hvkvm.hyperv.synic.kernel_line import KernelSignalPath

CONN = st.one_of(st.integers(0, 3), st.sampled_from([0xFFFFFF, 0x1000000]))
LAST = 0xFFFFFF


class ConnectionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.io = ManualReaders()
        self.vm = FakeVm()
        self.messages: dict[int, int] = {}
        self.events: dict[int, int] = {}
        self.owner = 0
        self.posted: list[int] = []
        self.signalled: dict[int, int] = {}

    @initialize(kernel=st.booleans())
    def choose_path(self, kernel: bool) -> None:
        self.kernel = kernel
        path = KernelSignalPath(self.vm) if kernel else None  # type: ignore[arg-type]
        self.connections = Connections(self.io, path)

    @rule(conn=CONN)
    def add_message(self, conn: int) -> None:
        self.owner += 1

        def handler(message: hv_post_message_input, owner: int = self.owner) -> int:
            self.posted.append(owner)
            return owner & 0xFF

        expected = -errno.EINVAL if conn > LAST else -errno.EEXIST if conn in self.messages else 0
        assert self.connections.add_message(conn, handler) == expected
        if expected == 0:
            self.messages[conn] = self.owner

    @rule(conn=CONN)
    def remove_message(self, conn: int) -> None:
        expected = -errno.ENOENT if self.messages.pop(conn, None) is None else 0
        assert self.connections.remove_message(conn) == expected

    @rule(conn=st.integers(0, 3), top=st.integers(0, 255))
    def post(self, conn: int, top: int) -> None:
        owner = self.messages.get(conn)
        before = len(self.posted)
        status = self.connections.post(hv_post_message_input(connection_id=conn | top << 24))
        if owner is None:
            assert status == HvStatus.INVALID_CONNECTION_ID
            assert len(self.posted) == before
        else:
            assert status == owner & 0xFF
            assert self.posted[before:] == [owner]

    @rule(conn=CONN)
    def add_event(self, conn: int) -> None:
        self.owner += 1

        def callback(owner: int = self.owner) -> None:
            self.signalled[owner] = self.signalled.get(owner, 0) + 1

        expected = -errno.EINVAL if conn > LAST else -errno.EEXIST if conn in self.events else 0
        assert self.connections.add_event(conn, callback) == expected
        if expected == 0:
            self.events[conn] = self.owner

    @rule(conn=CONN)
    def remove_event(self, conn: int) -> None:
        expected = -errno.ENOENT if self.events.pop(conn, None) is None else 0
        assert self.connections.remove_event(conn) == expected

    @rule(conn=CONN, times=st.integers(1, 3))
    def signal(self, conn: int, times: int) -> None:
        owner = self.events.get(conn)
        before = dict(self.signalled)
        for _ in range(times):
            status = self.connections.signal(conn)
            assert status == (HvStatus.INVALID_CONNECTION_ID if owner is None else 0)
        self.io.run()
        if owner is not None:
            before[owner] = before.get(owner, 0) + 1
        assert self.signalled == before

    @invariant()
    def kvm_knows_what_the_table_knows(self) -> None:
        assert set(self.vm.connections) == (set(self.events) if getattr(self, "kernel", False) else set())
        assert len(self.io.readers) == len(self.events)

    def teardown(self) -> None:
        if hasattr(self, "connections"):
            self.connections.close()
            assert self.io.readers == {}
            assert self.vm.connections == {}


TestConnections = ConnectionMachine.TestCase
TestConnections.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
