"""Real guests: every protocol version, and hv_vmbus leaving and coming back, on KVM with Hyper-V.

The guest has no synthetic timer: while one is its clock event device, Linux cannot
take hv_vmbus out, under any hypervisor. With direct timers hv_stimer_global_cleanup()
shuts the timer down and puts none in its place; with timer messages it looks for
another one, and where there is no HPET the APIC's serves as broadcast device, so that
there is none. The guest then hangs or panics, under QEMU just as here.
"""

from __future__ import annotations

import pytest
from linux_guest import KERNELS, linux_guest
from linux_shell import SHELL, Shell
from linux_vmbus import (
    UTILITIES,
    bound,
    load,
    open_channels,
    see_no_complaints,
    unload,
    version,
    wait_for_utilities,
)

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.vmbus import version_text
from hvkvm.vmbus.server import BusState

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800), pytest.mark.usefixtures("each_synic")]
NEWEST_OF_LINUX = vmbus.VERSION_WIN10_V5_3
CAPS = (
    *(version for version in vmbus.HOST_VERSIONS if version >= vmbus.VERSION_WIN8),
    # Down and up again, so that hv_vmbus comes back ten times.
    vmbus.VERSION_WIN10,
    vmbus.HOST_VERSIONS[-1],
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_version_connects_and_the_driver_comes_back_each_time(kernel: str) -> None:
    first = version_text(CAPS[0])
    with linux_guest(SHELL, kernel=kernel, hv="host-model,-stimer", vmbus_max_version=first) as guest:
        guest.start()
        shell = Shell(guest).ready()
        server = guest.bus.host.server
        unloads: list[str] = []

        def trace(to_host: bool, message: wire.Message) -> None:
            if to_host and message.kind.type == wire.UNLOAD:
                unloads.append(message.kind.name)

        guest.call(setattr, server, "trace", trace)
        assert len(CAPS) > 10
        for round_, cap in enumerate(CAPS):
            if round_:
                unloads.clear()
                unload(shell)
                assert open_channels(guest) == 0
                # Whether Linux says UNLOAD when its driver is taken out depends on its version, on the
                # host's, and on whether the driver holds itself for connected by then: 6.1 does, 6.12 mostly
                # not. Without one the next INITIATE_CONTACT ends the connection.
                if CAPS[round_ - 1] < vmbus.VERSION_WIN8_1:
                    assert unloads == []
                assert server.state is (BusState.DISCONNECTED if unloads else BusState.CONNECTED)
                guest.call(server.limit_version, cap)
                load(shell)
            wait_for_utilities(guest)
            agreed = min(cap, NEWEST_OF_LINUX)
            assert server.version == agreed
            assert version(shell) == version_text(agreed)
            assert bound(shell).count("hv_utils") >= len(UTILITIES)
        assert server.reports.counts == {}
        see_no_complaints(shell)
