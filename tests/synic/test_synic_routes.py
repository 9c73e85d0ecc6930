"""A route's life: sharing, refusal, churn, and closing under traffic (S10-S19)."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest
from guest_agent import DRAIN, EOM_PENDING, SCRATCH
from guest_machine import Guest, Poster, Sender

from hvkvm.errors import RouteError

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
CHURN = 500


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_route_to_nowhere_is_an_error(boot_agent: BootAgent) -> None:
    """S10, S11: KVM itself would take any numbers."""
    partition = boot_agent(cpus=2).partition
    fds = open_fds()
    for vp, sint in ((2, 0), (99, 2), (-1, 2), (0, 16), (0, 99), (0, -1), (1 << 32, 0)):
        with pytest.raises(RouteError):
            partition.open_route(vp, sint)
        with pytest.raises(RouteError):
            partition.open_route(vp, sint, lambda status: None)
    assert open_fds() == fds


@pytest.mark.kernel_synic
def test_routes_to_one_sint_share_a_line(boot_agent: BootAgent) -> None:
    """S12: one GSI for all, one user of the completions, who may follow another."""
    guest = boot_agent()
    gsis = guest.machine.platform.gsi.gsis
    base = gsis()
    plain = guest.partition.open_route(0, 2)
    first = Poster(guest, 0, 2)
    second_plain = guest.partition.open_route(0, 2)
    assert len(gsis()) == len(base) + 1
    with pytest.raises(RouteError, match="completions"):
        guest.partition.open_route(0, 2, lambda status: None)
    first.close()
    guest[0].synic_on(simp=SCRATCH, sints={2: DRAIN | EOM_PENDING})
    second = Poster(guest, 0, 2)
    assert second.post(b"to the second user") == 0
    assert second.await_completions(1) == [0]
    assert first.statuses == []
    guest[0].await_messages(1)
    second.close()
    assert plain.pulse() == 0
    plain.close()
    plain.close()
    assert plain.pulse() == -errno.ENXIO
    second_plain.close()
    assert gsis() == base


def test_acks_reach_a_user_that_comes_after_a_plain_route(boot_agent: BootAgent) -> None:
    """S12: the shared line learns of EOMs when its first completion user opens it, and goes on pulsing."""
    guest = boot_agent()
    cpu = guest[0]
    cpu.synic_on(simp=SCRATCH, sints={2: DRAIN | EOM_PENDING})
    plain = guest.partition.open_route(0, 2)
    assert plain.pulse() == 0
    guest.until(lambda: cpu.irqs(2) == 1, "the pulse arrives")
    sender = Sender(guest, 0, 2)
    sender.send(20)
    sender.await_sent()
    before = cpu.irqs(2)
    assert plain.pulse() == 0
    guest.until(lambda: cpu.irqs(2) > before, "the plain route still pulses")


def test_route_opened_before_the_guest_enables_anything(boot_agent: BootAgent) -> None:
    """S16: it works as soon as the guest has set up its SynIC."""
    guest = boot_agent(cpus=2)
    sender = Sender(guest, 1, 4)
    guest[1].synic_on(simp=SCRATCH, sints={4: DRAIN | EOM_PENDING})
    sender.send(5)
    sender.await_sent()


def test_closing_with_a_message_under_way(boot_agent: BootAgent) -> None:
    """S17-S19: a waiting message is cancelled once, and the line goes only after its callback."""
    guest = boot_agent()
    cpu = guest[0]
    cpu.synic_on(simp=SCRATCH, sints={2: 0})
    base = guest.machine.platform.gsi.gsis()
    for _ in range(10):
        poster = Poster(guest, 0, 2)
        assert poster.post(b"first") == 0
        poster.await_completions(1)
        assert poster.post(b"waits") == 0
        poster.close()
        statuses = poster.await_completions(2)
        assert statuses == [0, -errno.ECANCELED]
        assert poster.post(b"x") == -errno.ENXIO
        cpu.do("DRAIN", 2)
        cpu.eom()
        guest.io_barrier()
        assert guest.machine.platform.gsi.gsis() == base


def test_churn_leaks_nothing(boot_agent: BootAgent) -> None:
    """Open and close again and again, half of them used: fds and GSIs end where they began."""
    guest = boot_agent(cpus=2)
    for cpu in guest.agent.cpus:
        cpu.synic_on(simp=SCRATCH + cpu.index * 0x1000, sints=dict.fromkeys(range(16), DRAIN | EOM_PENDING))
    churn(guest, CHURN)


def churn(guest: Guest, count: int) -> None:
    """Open and close `count` routes over all VPs and SINTs, every third with a message through it."""
    fds, gsis = open_fds(), guest.machine.platform.gsi.gsis()
    cpus = len(guest.agent.cpus)
    for number in range(count):
        vp, sint = number % cpus, number % 16
        if number % 3:
            guest.partition.open_route(vp, sint).close()
            continue
        poster = Poster(guest, vp, sint)
        assert poster.post(b"%d" % number) == 0
        message = guest[vp].await_messages(1)[0]
        assert message.payload.rstrip(b"\0") == b"%d" % number
        poster.await_completions(1)
        poster.close()
    assert guest.machine.platform.gsi.gsis() == gsis
    assert open_fds() == fds


def test_open_and_close_from_several_threads(boot_agent: BootAgent) -> None:
    """S17: counts are not torn; everything is back at the end."""
    guest = boot_agent(cpus=2)
    fds, gsis = open_fds(), guest.machine.platform.gsi.gsis()
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(25):
                guest.partition.open_route(number % 2, 3).close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert guest.machine.platform.gsi.gsis() == gsis
    assert open_fds() == fds
