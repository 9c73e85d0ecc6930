"""What a machine without a name is called, and that two of one process are not called the same."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import kernel_images as ki
import pytest
from at_once import at_once

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.names import own_name
from hvkvm.machine.nic_spec import NicSpec

GUEST = Path(__file__).parents[1] / "guests/warm_late.s"


def test_the_first_is_named_by_the_process_and_the_others_get_a_number() -> None:
    # A machine that another test has not closed may have the first one.
    with ExitStack() as first, ExitStack() as second:
        names = [own_name(first), own_name(second), own_name(second)]
        assert len(set(names)) == 3
        assert all(name.startswith(f"hvkvm-{os.getpid()}") for name in names)
    with ExitStack() as again:
        assert own_name(again) == names[0]


def test_threads_never_get_the_same() -> None:
    for _ in range(100):
        names: list[str] = []
        with ExitStack() as stack:
            at_once(*[lambda stack=stack, names=names: names.append(own_name(stack))] * 8)
            assert len(set(names)) == 8


@pytest.mark.kvm
def test_two_machines_of_a_process_have_names_and_macs_of_their_own(tmp_path: Path) -> None:
    """Joined by a wire with one MAC, both have one IPv6 address, and a bridge does not know where to send."""
    kernel = ki.assembled_pvh(GUEST, tmp_path)
    wire = tmp_path / "wire"

    def config(**end: Path) -> MachineConfig:
        return MachineConfig(kernel=kernel, synic="user", vmbus="on", memory=64 << 20, nets=(NicSpec(**end),))

    with Machine(config(listen=wire)) as one, Machine(config(socket=wire)) as other:
        assert one.name != other.name
        assert one.nics is not None
        assert other.nics is not None
        macs = {machine.nics.nics["net0"].spec.mac for machine in (one, other)}
        assert len(macs) == 2
