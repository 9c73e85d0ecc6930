"""Where both ends of a queue are is told: a guest that hangs has missed a doorbell or an interrupt."""

from __future__ import annotations

from typing import Any

from nvme_guest import ENTRIES, EVENTS, SHADOW, NvmeGuest
from virtio_guest import VirtioGuest

from hvkvm.abi import nvme, virtio

READ = 2


def test_nvme_tells_what_waits_for_the_guest_and_what_for_us(routes: Any) -> None:
    guest = NvmeGuest(routes)
    guest.enable()
    guest.make_queues()
    for _ in range(2):
        for _ in range(ENTRIES - 1):
            guest.put(1, guest.command(READ, nsid=1))
        guest.ring(1)
        guest.loop.settle()
    said = guest.device.inspect()["queues"]["1"]
    assert said == (
        "8 entries, head 6, tail 6, 7 in flight; completions to 1: head 0, tail 7 of 8, 7 wait for room"
    )
    guest.close()


def test_nvme_tells_of_a_doorbell_in_memory_that_was_not_rung(routes: Any) -> None:
    guest = NvmeGuest(routes)
    guest.enable()
    guest.make_queues()
    guest.do(nvme.NVME_ADMIN_DBBUF, prp1=SHADOW, prp2=EVENTS)
    guest.memory.write_u32(SHADOW + 8, 3)
    said = guest.device.inspect()["queues"]["1"]
    assert (
        said == "8 entries, head 0, tail 0, the guest's 3, 0 in flight; completions to 1: head 0, tail 0 of 8"
    )
    guest.close()


def test_virtio_tells_what_the_driver_offers_and_what_was_taken(routes: Any) -> None:
    guest = VirtioGuest(routes, 0)
    guest.enable()
    guest.do(virtio.VIRTIO_BLK_T_IN, writes=True)
    guest.disk.held = True
    guest.offer()
    guest.loop.settle()
    guest.offer(ring=False)
    assert guest.device.inspect()["queues"] == {"0": "8 entries, available 3, taken 2, used 1"}
    guest.close()
