"""Numbered messages over several vCPUs at once, the short form of the soak; and the testdev's echoes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guest_agent import CHECK, DRAIN, EOM_PENDING, EVENTS, SCRATCH
from guest_machine import Guest, run_traffic

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
TESTDEV = 0x3000
MSG_CONN_CREATE, EVT_CONN_CREATE = 4, 6
MSG_SINT, EVT_SINT = 8, 9


@pytest.mark.parametrize(("idle", "each"), [("HLT", 500), ("SPIN", 100)])
def test_messages_over_four_vcpus(boot_agent: BootAgent, idle: str, each: int) -> None:
    """Two routes a vCPU: nothing lost, doubled or reordered per route."""
    run_traffic(boot_agent(cpus=4), each, idle=idle)


def test_guest_posts_to_itself_through_the_testdev(boot_agent: BootAgent) -> None:
    """Guest to host to guest: each vCPU posts 50 messages that come back in order, and signals 50 events."""
    guest = boot_agent(cpus=2, devices=("hyperv-testdev",))
    guest.enlighten()
    for cpu in guest.agent.cpus:
        vp, message_conn, event_conn = cpu.index, 0x10 + cpu.index, 0x20 + cpu.index
        page = SCRATCH + 0x2000 * vp
        cpu.synic_on(
            simp=page, siefp=page + 0x1000, sints={MSG_SINT: DRAIN | EOM_PENDING | CHECK, EVT_SINT: EVENTS}
        )
        cpu.do("OUT", TESTDEV, 4, message_conn << 24 | MSG_CONN_CREATE << 16 | vp << 8 | MSG_SINT)
        cpu.do("OUT", TESTDEV, 4, event_conn << 24 | EVT_CONN_CREATE << 16 | vp << 8 | EVT_SINT)
    for operation, base in (("POST_ECHO", 0x10), ("SIGNAL_ECHO", 0x20)):
        sint = MSG_SINT if operation == "POST_ECHO" else EVT_SINT
        for spin in (0, 1):
            for cpu in guest.agent.cpus:
                cpu.begin(operation, base + cpu.index, 50, sint, spin)
            for cpu in guest.agent.cpus:
                reply = cpu.finish()
                assert reply.value == 50, f"{operation} on vcpu{cpu.index}: {reply}"
                cpu.set_next(sint, 0)
    for cpu in guest.agent.cpus:
        assert cpu.counter("MESSAGES", MSG_SINT) == 100
        assert cpu.counter("EVENTS", EVT_SINT) == 100
        assert cpu.seen_flags(EVT_SINT) == {0x20 + cpu.index}
        cpu.expect_clean()


def test_guest_floods_the_testdev(boot_agent: BootAgent) -> None:
    """A guest that posts without waiting is told "no buffers" and loses nothing that was accepted."""
    guest = boot_agent(devices=("hyperv-testdev",))
    guest.enlighten()
    cpu = guest[0]
    cpu.synic_on(simp=SCRATCH, sints={MSG_SINT: DRAIN | EOM_PENDING | CHECK})
    cpu.do("OUT", TESTDEV, 4, 0x10 << 24 | MSG_CONN_CREATE << 16 | MSG_SINT)
    reply = cpu.do("POST", 0x10, 200, 0, 240)
    assert reply.results[0] == 200, reply
    assert reply.results[2] == 0, f"status {reply.results[2]:#x}"
    guest.until(lambda: cpu.counter("MESSAGES", MSG_SINT) == 200, "every echo arrives")
    guest.settle()
    assert cpu.counter("MESSAGES", MSG_SINT) == 200
    cpu.expect_clean()
