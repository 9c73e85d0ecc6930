"""The newest kernel there is: it boots, speaks VMBus 6.0, binds every device, and takes them again.

It also finds nothing wrong with the CPU it is shown. One boot only, and on one SynIC: what
depends on the kernel's version shows in it. From Linux 7.2 on hv_vmbus is linked into Debian's
kernels, so what leaves and comes back here are the devices' own drivers.
"""

from __future__ import annotations

import pytest
from linux_guest import linux_guest
from linux_shell import SHELL, Shell
from linux_vmbus import bound, load, open_channels, see_no_complaints, unload, version, wait_for_utilities

from hvkvm.abi import vmbus
from hvkvm.abi.vmbus import version_text

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]
MODULES = ("hv_vmbus", "hv_utils", "hyperv_keyboard")
BOUND = [*["hv_utils"] * 5, "hyperv_keyboard"]
"""Heartbeat, shutdown, time, key-value exchange and file system freeze; the keyboard."""


def test_the_newest_kernel_speaks_vmbus_6_0_and_its_drivers_come_back() -> None:
    with linux_guest(SHELL, kernel="newest", modules=MODULES, cpu="host,-sse4_2") as guest:
        guest.start()
        shell = Shell(guest).ready()
        assert "sse4_2" not in shell.check("grep flags /proc/cpuinfo").split()
        # Linux looks at its own table of what needs what, and says so once.
        assert shell.run("dmesg | grep 'dependency check failure'").output == ""
        server = guest.bus.host.server
        for again in range(2):
            wait_for_utilities(guest)
            assert server.version == vmbus.VERSION_COPPER
            assert version(shell) == version_text(vmbus.VERSION_COPPER)
            assert bound(shell) == BOUND
            if not again:
                unload(shell, "hyperv_keyboard", "hv_utils")
                assert open_channels(guest) == 0
                load(shell)
        assert server.reports.counts == {}
        see_no_complaints(shell)
