"""A worked example: a VMBus device of one's own, with a program of the guest as its driver.

uio_hv_generic gives the channel's rings to the program, the test is the host's side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from guest_artifacts import artifact
from linux_programs import ahead, program

from hvkvm.testing.kernels import GuestKernel

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(900)]

TYPE = "7d4b2f0e-6a0b-4c57-9d0e-4f2a6c1b8e35"
INSTANCE = "11111111-2222-3333-4444-555555555555"
SCRIPT = f"""
    driver=/sys/bus/vmbus/drivers/uio_hv_generic
    until [ -e /sys/bus/vmbus/devices/{INSTANCE} ]; do sleep 0.1; done
    echo {TYPE} >$driver/new_id
    until [ -c /dev/uio0 ]; do sleep 0.1; done
    uio_echo uio0 "hello, host" || exit 1
    until ! [ -e /sys/bus/vmbus/devices/{INSTANCE} ]; do sleep 0.1; done
    echo gone
"""

ahead("uio_echo")


def test_a_program_of_the_guest_drives_the_tests_device(
    linux_guest: Callable[..., Any], vmbus_device: Callable[..., Any]
) -> None:
    kernel = GuestKernel(artifact("HVKVM_NEWER_KERNEL"), artifact("HVKVM_NEWER_MODULES"))
    guest = linux_guest(
        "sh",
        "-c",
        SCRIPT,
        kernel=kernel,
        modules=["hv_vmbus", "uio_hv_generic"],
        files={"/bin/uio_echo": program("uio_echo")},
    )
    device = vmbus_device(TYPE, instance=INSTANCE, name="ours")
    device.offer(guest)
    guest.start()
    packet = device.expect(b"hello, host")
    assert packet.payload.rstrip(b"\0") == b"hello, host"
    device.send(b"hello, guest")
    guest.wait_for_stdout("hello, guest")
    device.wait_closed()
    device.rescind()
    result = guest.run()
    assert (result.status, result.stdout.splitlines()[-1]) == (0, "gone")
