"""Long runs of the SynIC (`make soak`, HVKVM_SOAK=1): what a short run cannot show.

HVKVM_SOAK_MESSAGES and HVKVM_SOAK_CHURN shorten them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from guest_agent import DRAIN, EOM_PENDING, SCRATCH
from guest_machine import Guest, Poster, run_traffic

pytestmark = [
    pytest.mark.hyperv,
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"), reason="a long run: set HVKVM_SOAK=1 or use make soak"
    ),
    pytest.mark.timeout(0),
]

BootAgent = Callable[..., Guest]
MESSAGES = int(os.environ.get("HVKVM_SOAK_MESSAGES", "1000000"))
CHURN = int(os.environ.get("HVKVM_SOAK_CHURN", "10000"))


def test_a_million_messages_over_four_vcpus(boot_agent: BootAgent) -> None:
    """Nothing lost, doubled, reordered or torn, per route; two routes a vCPU."""
    run_traffic(boot_agent(cpus=4), MESSAGES // 4, idle="HLT")


def test_ten_thousand_routes(boot_agent: BootAgent) -> None:
    """Open and close, every third with a message through it: no fd and no GSI leaked."""
    guest = boot_agent(cpus=2)
    for cpu in guest.agent.cpus:
        cpu.synic_on(simp=SCRATCH + cpu.index * 0x1000, sints=dict.fromkeys(range(16), DRAIN | EOM_PENDING))
    fds, gsis = len(os.listdir("/proc/self/fd")), guest.machine.platform.gsi.gsis()
    for number in range(CHURN):
        vp, sint = number % 2, number % 16
        if number % 3:
            guest.partition.open_route(vp, sint).close()
            continue
        poster = Poster(guest, vp, sint)
        assert poster.post(b"%d" % number) == 0
        assert guest[vp].await_messages(1)[0].payload.rstrip(b"\0") == b"%d" % number
        poster.await_completions(1)
        poster.close()
    assert guest.machine.platform.gsi.gsis() == gsis
    assert len(os.listdir("/proc/self/fd")) == fds
