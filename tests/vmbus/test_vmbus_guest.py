"""A distribution kernel's own drivers on our bus, on KVM with Hyper-V: hv_vmbus and hv_utils."""

from __future__ import annotations

import pytest
from linux_guest import KERNELS, LinuxGuest, linux_guest
from linux_shell import SHELL, Shell
from linux_vmbus import UTILITIES, bound, channel_of, see_no_complaints, wait_for_utilities

from hvkvm.abi import ic, vmbus
from hvkvm.machine.outcome import Ending
from hvkvm.vmbus.offer import ChannelState

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800), pytest.mark.usefixtures("each_synic")]


def request(guest: LinuxGuest, what: str) -> int:
    """The guest's answer to a shutdown request."""
    statuses: list[int] = []
    assert guest.call(guest.bus.shutdown.request, what, lambda status, _body: statuses.append(status))
    guest.wait_until(lambda: statuses, f"waiting for the answer to {what}")
    return statuses[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_drivers_bind_and_do_what_the_shutdown_device_asks(kernel: str) -> None:
    with linux_guest(SHELL, kernel=kernel) as guest:
        guest.start()
        shell = Shell(guest).ready()
        server = guest.bus.host.server
        for life in range(2):
            wait_for_utilities(guest)
            assert server.version == vmbus.VERSION_WIN10_V5_3
            dmesg = shell.check("dmesg | grep -E 'hv_vmbus|hv_utils'")
            assert "hv_vmbus: Vmbus version:5.3" in dmesg
            for line in ("Heartbeat IC version 3.0", "Shutdown IC version 3.2", "TimeSync IC version 4.0"):
                assert line in dmesg
            assert {channel_of(guest, name).state for name in UTILITIES} == {ChannelState.OPEN}
            assert bound(shell).count("hv_utils") >= len(UTILITIES)
            # There is no S4 in our ACPI tables, so Linux cannot hibernate and says so.
            assert request(guest, "hibernate") == ic.HV_E_FAIL
            assert shell.run("true").status == 0
            see_no_complaints(shell)
            assert guest.machine.resets == life
            assert server.reports.counts == {}
            if not life:
                assert request(guest, "reboot") == ic.HV_S_OK
                shell.ready()
        # Linux answers first, and then runs /sbin/poweroff, or goes by itself where there is none.
        assert request(guest, "power-off") == ic.HV_S_OK
        outcome = guest.finish()
        assert (outcome.ending, outcome.status) == (Ending.POWERED_OFF, 0)
