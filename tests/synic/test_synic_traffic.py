"""Numbered messages over several vCPUs at once, the short form of the soak; and a flood."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guest_agent import CHECK, DRAIN, EOM_PENDING, SCRATCH
from guest_machine import Guest, run_traffic

pytestmark = pytest.mark.hyperv

BootAgent = Callable[..., Guest]
TESTDEV = 0x3000
MSG_CONN_CREATE = 4
MSG_SINT = 8


@pytest.mark.parametrize(("idle", "each"), [("HLT", 500), ("SPIN", 100)])
def test_messages_over_four_vcpus(boot_agent: BootAgent, idle: str, each: int) -> None:
    """Two routes a vCPU: nothing lost, doubled or reordered per route."""
    run_traffic(boot_agent(cpus=4), each, idle=idle)


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
