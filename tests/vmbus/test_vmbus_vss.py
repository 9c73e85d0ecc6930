"""Freeze and thaw against a guest's driver and daemon in the loopback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from struct import pack, unpack_from
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hvkvm.abi import ic, vss
from hvkvm.devices.synth.ic import MAX_WAITING
from hvkvm.devices.synth.vss import RETRIES, Vss, VssReply
from hvkvm.testing.ic_driver import IcDriver
from hvkvm.testing.vmbus_loopback import Loopback

LEFT = VssReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED, "the guest left without an answer")
NOBODY = VssReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED)


class Daemon:
    """Freezes and thaws as hv_vss_daemon does; `status` is its next answers'."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.frozen = False
        self.operations: list[int] = []

    def __call__(self, body: bytes) -> tuple[int, bytes | None]:
        operation = body[0]
        assert len(body) >= 12
        self.operations.append(operation)
        if self.status == 0 and operation in (vss.VSS_OP_FREEZE, vss.VSS_OP_THAW):
            self.frozen = operation == vss.VSS_OP_FREEZE
        if operation == vss.VSS_OP_HOT_BACKUP:
            return self.status, pack("<B7xI", operation, vss.VSS_HBU_NO_AUTO_RECOVERY)
        return self.status, None


class Guest:
    """A device and its driver, negotiated, and the replies by what was asked."""

    def __init__(self, loop: Any, *, negotiate: bool = True, clock: Clock | None = None) -> None:
        self.device = Vss(clock.call_later if clock else None)
        self.driver = IcDriver(loop, self.device, (5, 0))
        self.told: list[tuple[str, VssReply]] = []
        if negotiate:
            self.driver.negotiate()

    def ask(self, *methods: str) -> None:
        for method in methods:
            getattr(self.device, method)(lambda reply, method=method: self.told.append((method, reply)))
        self.driver.loop.run()

    @property
    def said(self) -> list[tuple[str, int]]:
        """What was told since the last look, statuses only."""
        told, self.told = self.told, []
        return [(method, reply.status) for method, reply in told]


@pytest.fixture
def guest(loopback: Any) -> Guest:
    return Guest(loopback())


def test_a_guest_is_frozen_and_thawed(guest: Guest) -> None:
    daemon = Daemon()
    for _ in range(2):
        guest.ask("freeze")
        assert (guest.device.state, guest.device.frozen) == ("freezing", False)
        guest.driver.serve(daemon)
        assert (guest.device.state, guest.device.frozen) == ("frozen", True)
        guest.ask("thaw")
        assert (guest.device.state, guest.device.frozen) == ("thawing", True)
        guest.driver.serve(daemon)
        assert (guest.device.state, guest.device.frozen) == ("thawed", False)
        assert guest.said == [("freeze", 0), ("thaw", 0)]
    assert daemon.operations == [vss.VSS_OP_FREEZE, vss.VSS_OP_THAW] * 2


def test_the_request_is_as_linux_reads_it(guest: Guest) -> None:
    guest.ask("freeze")
    (payload,) = guest.driver.requests()
    assert unpack_from("<HHHHHH", payload, 8) == (3, 0, ic.ICMSGTYPE_VSS, 5, 0, 12)
    assert payload[28:40] == b"\5" + bytes(11)


def test_whether_it_can_be_backed_up_is_told(guest: Guest) -> None:
    guest.ask("check")
    guest.driver.serve(Daemon())
    assert guest.told == [("check", VssReply(0, flags=vss.VSS_HBU_NO_AUTO_RECOVERY))]
    assert guest.device.state == "thawed"


def test_a_second_freeze_is_refused(guest: Guest) -> None:
    daemon = Daemon()
    guest.ask("freeze", "freeze")
    assert guest.told == [
        ("freeze", VssReply(ic.HV_ERROR_BUSY, "the guest is freezing; thaw it first")),
    ]
    guest.driver.serve(daemon)
    guest.ask("freeze")
    assert guest.told[2][1].text == "busy: the guest is frozen; thaw it first"
    guest.ask("thaw", "freeze")
    guest.driver.serve(daemon)
    assert (daemon.operations, daemon.frozen) == ([vss.VSS_OP_FREEZE, vss.VSS_OP_THAW], False)


def test_a_thaw_overtakes_nothing_and_two_are_one(guest: Guest) -> None:
    daemon = Daemon()
    guest.ask("freeze", "thaw", "thaw")
    guest.driver.serve(daemon)
    assert daemon.operations == [vss.VSS_OP_FREEZE, vss.VSS_OP_THAW]
    assert guest.said == [("freeze", 0), ("thaw", 0), ("thaw", 0)]
    assert guest.device.state == "thawed"


def test_a_thaw_may_be_asked_of_a_thawed_guest(guest: Guest) -> None:
    """Somebody else may have frozen it: a host program before us."""
    daemon = Daemon()
    guest.ask("thaw")
    guest.driver.serve(daemon)
    assert (guest.said, daemon.operations) == ([("thaw", 0)], [vss.VSS_OP_THAW])


def test_a_freeze_that_fails_is_thawed_by_itself(guest: Guest) -> None:
    daemon = Daemon(ic.HV_E_FAIL)
    guest.ask("freeze")
    guest.driver.serve(daemon)
    assert guest.told == [("freeze", VssReply(ic.HV_E_FAIL))]
    assert guest.told[0][1].text == "the guest failed"
    assert daemon.operations == [vss.VSS_OP_FREEZE, vss.VSS_OP_THAW]
    assert (guest.device.state, guest.device.frozen) == ("thawed", False)
    guest.ask("freeze")
    daemon.status = 0
    guest.driver.serve(daemon)
    assert guest.device.frozen


def test_a_thaw_that_fails_leaves_it_frozen_and_may_be_asked_again(guest: Guest) -> None:
    daemon = Daemon()
    guest.ask("freeze")
    guest.driver.serve(daemon)
    daemon.status = ic.HV_E_FAIL
    guest.ask("thaw")
    guest.driver.serve(daemon)
    assert (guest.device.state, guest.device.frozen) == ("frozen", True)
    daemon.status = 0
    guest.ask("thaw")
    guest.driver.serve(daemon)
    assert (guest.device.state, daemon.frozen) == ("thawed", False)
    assert guest.said == [("freeze", 0), ("thaw", ic.HV_E_FAIL), ("thaw", 0)]


@pytest.mark.parametrize("answered", [0, 1, 2], ids=["freezing", "frozen", "thawing"])
def test_a_guest_that_left_frozen_is_thawed_when_it_is_back(guest: Guest, answered: int) -> None:
    daemon = Daemon()
    guest.ask("freeze")
    if answered:
        guest.driver.serve(daemon)
    if answered == 2:
        guest.ask("thaw")
    daemon.operations.clear()
    guest.driver.close()
    asked = ("freeze", "thaw")[answered == 2]
    assert guest.told[-1] == ((asked, LEFT) if answered != 1 else ("freeze", VssReply(0)))
    assert (guest.device.state, guest.device.frozen) == ("thawed", False)
    guest.ask("thaw")
    assert guest.told[-1] == ("thaw", NOBODY)
    for thaws in ([vss.VSS_OP_THAW], []):  # the second time nothing is owed
        guest.driver.open()
        guest.driver.negotiate()
        guest.driver.serve(daemon)
        assert daemon.operations == thaws
        assert (guest.device.state, daemon.frozen) == ("thawed", False)
        daemon.operations.clear()
        guest.driver.close()


def test_a_guest_that_left_again_before_its_thaw_still_gets_it(guest: Guest) -> None:
    daemon = Daemon()
    guest.ask("freeze")
    guest.driver.serve(daemon)
    for _ in range(2):
        guest.driver.close()
        guest.driver.open()
        guest.driver.negotiate()
        assert guest.device.state == "thawing"
    guest.driver.serve(daemon)
    assert not daemon.frozen


def test_a_rebooted_guest_that_refuses_its_thaw_can_be_frozen(guest: Guest) -> None:
    daemon = Daemon()
    guest.ask("freeze")
    guest.driver.serve(daemon)
    guest.driver.close()
    guest.driver.open()
    guest.driver.negotiate()
    guest.driver.serve(Daemon(ic.HV_E_FAIL))  # no daemon yet
    guest.ask("freeze")
    guest.driver.serve(daemon)
    assert guest.device.state == "frozen"


class Clock:
    """Timers that go off when the test says so."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], object]] = []

    def call_later(self, _seconds: float, fn: Callable[..., object], *args: Any) -> Clock:
        assert not self.timers, "one timer is enough"
        self.timers.append(partial(fn, *args))
        return self

    def cancel(self) -> None:
        self.timers.clear()

    def tick(self) -> bool:
        """Whether there was a timer."""
        due, self.timers = self.timers, []
        for fn in due:
            fn()
        return bool(due)


@pytest.mark.parametrize("refusals", [0, 1, 7, RETRIES - 1, RETRIES, RETRIES + 5])
def test_a_guest_whose_daemon_is_late_is_thawed_when_it_is_there(loopback: Any, refusals: int) -> None:
    clock = Clock()
    guest = Guest(loopback(), clock=clock)
    daemon = Daemon()
    guest.ask("freeze")
    guest.driver.serve(daemon)
    guest.driver.close()
    for _ in range(2):  # the driver may come and go before the daemon is there
        guest.driver.open()
        guest.driver.negotiate()
        guest.driver.serve(Daemon(ic.HV_E_FAIL))
        guest.driver.close()
        assert clock.timers == []
    guest.driver.open()
    guest.driver.negotiate()
    daemon.operations.clear()
    daemon.status = ic.HV_E_FAIL
    for _ in range(refusals):
        guest.driver.serve(daemon)
        clock.tick()
    daemon.status = 0
    guest.driver.serve(daemon)
    assert clock.timers == []
    assert daemon.frozen == (refusals >= RETRIES)
    assert len(daemon.operations) <= RETRIES
    assert guest.device.state == "thawed"


def test_a_freeze_takes_over_what_was_owed(loopback: Any) -> None:
    clock = Clock()
    guest = Guest(loopback(), clock=clock)
    daemon = Daemon()
    guest.ask("freeze")
    guest.driver.serve(daemon)
    guest.driver.close()
    guest.driver.open()
    guest.driver.negotiate()
    guest.driver.serve(Daemon(ic.HV_E_FAIL))
    guest.ask("freeze")
    guest.driver.serve(daemon)
    assert clock.tick()
    assert guest.driver.serve(daemon) == 0
    assert (guest.device.frozen, clock.timers) == (True, [])


def test_nobody_is_asked_where_nobody_is(loopback: Any) -> None:
    guest = Guest(loopback(), negotiate=False)
    guest.ask("check", "freeze", "thaw")
    assert guest.told == [("check", NOBODY), ("freeze", NOBODY), ("thaw", NOBODY)]
    assert guest.device.state == "thawed"


@pytest.mark.parametrize("version", [(1, 0), (4, 0), (6, 0)])
def test_only_version_5_is_spoken(loopback: Any, version: tuple[int, int]) -> None:
    guest = Guest(loopback(), negotiate=False)
    guest.driver.version = version
    guest.driver.negotiate()
    guest.ask("freeze")
    assert guest.told == [("freeze", NOBODY)]


def test_checks_leave_room_for_a_freeze_and_its_thaw(guest: Guest) -> None:
    guest.ask(*["check"] * 40, "freeze", "thaw")
    refused = [reply for method, reply in guest.told if method == "check"]
    assert [reply.status for reply in refused] == [ic.HV_ERROR_BUSY] * (41 - MAX_WAITING)
    daemon = Daemon()
    guest.driver.serve(daemon)
    assert daemon.operations[-2:] == [vss.VSS_OP_FREEZE, vss.VSS_OP_THAW]
    assert guest.said[-2:] == [("freeze", 0), ("thaw", 0)]


@given(st.binary(max_size=40), st.sampled_from(("check", "freeze", "thaw")))
def test_any_answer_is_told(body: bytes, method: str) -> None:
    loop = Loopback()
    try:
        guest = Guest(loop)
        guest.ask(method)
        (payload,) = guest.driver.requests()
        guest.driver.answer_raw(payload[:20] + bytes(5) + b"\5\0\0" + body)
        ((_method, told),) = guest.told
        # Packets are padded to 8 bytes, so 5 are 12 behind the header's 28.
        assert told.ok == (method != "check" or len(body) > 4)
    finally:
        loop.close()


class FreezeMachine(RuleBasedStateMachine):
    """Host and guest in any order: a guest frozen for ever, or a question never answered, is a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loopback()
        self.guest = Guest(self.loop)
        self.open = True
        self.asked = 0
        self.frozen = self.thaw_failed = False

    @rule(method=st.sampled_from(("check", "freeze", "thaw")))
    def ask(self, method: str) -> None:
        self.asked += 1
        self.guest.ask(method)

    @rule(status=st.sampled_from((0, 0, 0, ic.HV_E_FAIL)), late=st.booleans())
    def answer(self, status: int, late: bool) -> None:
        """One answer of the guest's; a FREEZE that failed may yet be done."""
        for payload in self.guest.driver.requests() if self.open else ():
            operation = payload[28]
            if operation == vss.VSS_OP_FREEZE:
                assert self.thaw_failed or not self.frozen, "frozen twice"
                self.frozen = status == 0 or late
            elif operation == vss.VSS_OP_THAW:
                self.frozen = self.frozen and status != 0
                self.thaw_failed = status != 0
            self.guest.driver.answer(payload, status=status)

    @rule()
    def leave(self) -> None:
        if self.open:
            self.open = False
            self.guest.driver.close()

    @rule()
    def come(self) -> None:
        if not self.open:
            self.open = True
            self.guest.driver.open()
            self.guest.driver.negotiate()

    @invariant()
    def a_guest_at_rest_is_as_the_host_says(self) -> None:
        device = self.guest.device
        if self.open and device.state == "thawed" and not self.thaw_failed:
            assert not self.frozen
        if self.open and device.state == "frozen":
            assert self.frozen

    def teardown(self) -> None:
        self.come()
        self.ask("thaw")
        for _ in range(100):
            self.answer(0, False)
        assert not self.frozen
        assert self.guest.device.state == "thawed"
        assert len(self.guest.told) == self.asked
        self.loop.close()


TestFreezeMachine = FreezeMachine.TestCase
TestFreezeMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
