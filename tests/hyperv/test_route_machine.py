"""Whatever host, vCPUs, I/O loop and guest do in any order: a route keeps its promises (S17 to S31)."""

from __future__ import annotations

import errno

import pytest
from fake_synic import EVENT_GPA, MESSAGE_GPA, World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hvkvm.errors import RouteError
from hvkvm.hyperv.sint_route import SintRoute
from hvkvm.hyperv.staging import State

VPS, SINTS = 2, (2, 15)
VP, SINT = st.integers(0, VPS - 1), st.sampled_from(SINTS)
TIMER = 0x80000010


class Sender:
    """One completion user, and what it was told about each post it had accepted."""

    def __init__(self, world: World, vp: int, sint: int) -> None:
        self.vp, self.sint = vp, sint
        self.accepted: list[int] = []
        self.told: list[int] = []
        self.route: SintRoute = world.open(vp, sint, self.told.append)

    @property
    def state(self) -> State:
        assert self.route.staging is not None
        return self.route.staging.state


class RouteMachine(RuleBasedStateMachine):
    """Each message carries a number of its own, so that losses and repetitions show."""

    senders = Bundle("senders")
    plains = Bundle("plains")

    def __init__(self) -> None:
        super().__init__()
        self.world = World(VPS)
        self.all_senders: list[Sender] = []
        self.open_routes: set[SintRoute] = set()
        self.number = 0
        self.received: list[int] = []

    @rule(target=senders, vp=VP, sint=SINT)
    def open_sender(self, vp: int, sint: int) -> Sender | None:
        taken = any(s.route in self.open_routes and (s.vp, s.sint) == (vp, sint) for s in self.all_senders)
        try:
            sender = Sender(self.world, vp, sint)
        except RouteError:
            assert taken
            return None
        assert not taken
        self.all_senders.append(sender)
        self.open_routes.add(sender.route)
        return sender

    @rule(target=plains, vp=VP, sint=SINT)
    def open_plain(self, vp: int, sint: int) -> SintRoute:
        route = self.world.open(vp, sint)
        self.open_routes.add(route)
        return route

    @rule(sender=senders)
    def post(self, sender: Sender | None) -> None:
        if sender is None:
            return
        self.number += 1
        free = sender.state is State.FREE
        status = sender.route.post(1, self.number.to_bytes(4, "little"))
        if sender.route not in self.open_routes:
            assert status == -errno.ENXIO
        elif free:
            assert status == 0
            sender.accepted.append(self.number)
        else:
            assert status == -errno.EAGAIN

    @rule(sender=senders)
    def close_sender(self, sender: Sender | None) -> None:
        if sender is not None:
            sender.route.close()
            self.open_routes.discard(sender.route)

    @rule(route=consumes(plains))
    def close_plain(self, route: SintRoute) -> None:
        route.close()
        self.open_routes.discard(route)

    @rule(route=plains)
    def pulse(self, route: SintRoute) -> None:
        assert route.pulse() == (0 if route in self.open_routes else -errno.ENXIO)

    @rule(vp=VP)
    def vcpu_between_two_runs(self, vp: int) -> None:
        self.world.vp(vp).run()

    @rule()
    def loop_round(self) -> None:
        self.world.loop.run()

    @rule(vp=VP, sint=SINT)
    def guest_takes_message(self, vp: int, sint: int) -> None:
        slot = self.world.vp(vp).slot(sint)
        if slot.message_type == 1:
            self.received.append(int.from_bytes(bytes(slot.payload[:4]), "little"))
        self.world.free_slot(vp, sint)

    @rule(vp=VP, sint=SINT)
    def kernel_timer_fills_slot(self, vp: int, sint: int) -> None:
        slot = self.world.vp(vp).slot(sint)
        if slot.message_type == 0:
            slot.message_type, slot.message_flags = TIMER, 0

    @rule(vp=VP)
    def guest_writes_eom_for_nothing(self, vp: int) -> None:
        for (index, _sint), lines in self.world.synic.lines.items():
            if index == vp:
                lines[-1].ack()

    @rule(vp=VP, on=st.booleans(), move=st.integers(0, 3))
    def guest_switches_pages(self, vp: int, on: bool, move: int) -> None:
        if on:
            self.world.vp(vp).switch_on(MESSAGE_GPA + 0x1000 * move, EVENT_GPA + 0x1000 * move)
        else:
            self.world.vp(vp).update(0, 0, 0)

    @rule()
    def machine_resets(self) -> None:
        self.world.routes.close_all("at reset")
        self.open_routes.clear()
        self.world.synic.reset()
        for vp in self.world.synic.vps:
            assert bytes(vp.messages.view) == bytes(4096)
        self.world.vp(0).switch_on()

    @rule()
    def everything_settles(self) -> None:
        self.world.settle()
        for sender in self.all_senders:
            assert len(sender.told) == len(sender.accepted) - (sender.state is not State.FREE)
            if sender.state is not State.FREE:
                slot = self.world.vp(sender.vp).slot(sender.sint)
                assert sender.state is State.PENDING
                # Not forgotten: the guest that frees this slot will be asked for an EOM.
                assert slot.message_type != 0
                assert slot.message_flags & 1

    @invariant()
    def never_told_more_than_accepted(self) -> None:
        for sender in self.all_senders:
            assert len(sender.told) <= len(sender.accepted)
            assert set(sender.told) <= {0, -errno.ENXIO, -errno.ECANCELED}

    @invariant()
    def what_the_guest_received_was_sent_once(self) -> None:
        assert len(set(self.received)) == len(self.received)

    @invariant()
    def open_routes_have_their_line(self) -> None:
        needed = {(route.vp_index, route.sint) for route in self.open_routes}
        for key in needed:
            assert not self.world.synic.lines[key][-1].closed

    def teardown(self) -> None:
        for route in list(self.open_routes):
            route.close()
        self.world.settle()
        assert self.world.synic.open_lines() == 0
        for sender in self.all_senders:
            assert len(sender.told) == len(sender.accepted), "one callback for each accepted post (S23)"
            assert sender.state is State.FREE
        delivered = {
            number
            for sender in self.all_senders
            for number, status in zip(sender.accepted, sender.told, strict=True)
            if status == 0
        }
        assert set(self.received) <= delivered, "what the guest got was told as delivered"


TestRoutes = RouteMachine.TestCase
TestRoutes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_s25_senders_of_one_vp_are_served_in_order(seed: int) -> None:
    """Posts to different SINTs of one VP are attempted in the order in which they were accepted."""
    world = World(1)
    order: list[int] = []
    sints = [(3 * n + seed) % 16 for n in range(16)]
    for sint in sints:
        route = world.open(0, sint, lambda status, sint=sint: order.append(sint))
        assert route.post(1, b"") == 0
    world.settle()
    assert order == sints
