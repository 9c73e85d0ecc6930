"""Kicks on a real KVM: none is lost, whatever the guest does; work arrives in order; nothing is left behind.

The guests are 16-bit real mode, written by hand; the in-kernel interrupt chips
make HLT and waiting for INIT block inside KVM_RUN.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from hvkvm.abi.kvm import KVM_EXIT_INTR, KVM_EXIT_IO
from hvkvm.errors import Stopped
from hvkvm.kvm.system import Kvm
from hvkvm.runtime.vcpu_thread import Handler, VcpuThread
from hvkvm.runtime.vcpus import VcpuGroup

pytestmark = pytest.mark.kvm

GUESTS = {
    "halts": bytes.fromhex("fa f4 eb fd"),  # cli; again: hlt; jmp again
    "spins": bytes.fromhex("eb fe"),  # again: jmp again
    "exits": bytes.fromhex("ba f8 03 ee eb fd"),  # mov dx, 0x3f8; again: out dx, al; jmp again
    "exits and halts": bytes.fromhex("fb e6 80 f4 eb fb"),  # again: sti; out 0x80, al; hlt; jmp
    "waits for INIT": b"",
}
HANDLERS: dict[int, Handler] = {KVM_EXIT_IO: lambda _vcpu: None}
LOST = 20.0
"""Seconds after which a wake-up counts as lost."""

each_guest = pytest.mark.parametrize("guest", GUESTS)


def start(bench: Any, guest: str) -> VcpuThread:
    vcpu = bench.vcpu(GUESTS[guest])
    if guest == "waits for INIT":
        vcpu = bench.vcpu()
        assert vcpu.mp_state() == 1  # KVM_MP_STATE_UNINITIALIZED
    thread: VcpuThread = bench.thread(vcpu, HANDLERS)
    thread.start()
    return thread


@each_guest
def test_s25_no_wakeup_is_lost(bench: Any, guest: str) -> None:
    """Each item is awaited before the next is submitted: one lost kick, and nobody would wake the vCPU."""
    thread = start(bench, guest)
    for i in range(3000):
        done = threading.Event()
        thread.submit(done.set)
        assert done.wait(LOST), f"lost kick {i}: {thread.state}"
    assert not bench.faults
    if guest != "exits":
        assert thread.exit_counts[KVM_EXIT_INTR] > 0


@each_guest
@pytest.mark.usefixtures("tiny_switch_interval")
def test_s25_no_wakeup_is_lost_between_several_submitters(
    bench: Any, guest: str, in_threads: Callable[..., None]
) -> None:
    thread = start(bench, guest)

    def submitter(seed: int) -> None:
        pause = random.Random(seed)
        for i in range(500):
            done = threading.Event()
            thread.submit(done.set)
            assert done.wait(LOST), f"lost kick {i}: {thread.state}"
            for _ in range(pause.randrange(200)):
                pass

    in_threads(*(lambda seed=seed: submitter(seed) for seed in range(3)))
    assert not bench.faults


@each_guest
@pytest.mark.usefixtures("tiny_switch_interval")
def test_s25_each_submitters_work_runs_in_order(
    bench: Any, guest: str, in_threads: Callable[..., None]
) -> None:
    thread = start(bench, guest)
    ran: list[tuple[int, int]] = []

    def submitter(who: int) -> None:
        for i in range(1000):
            thread.submit(ran.append, (who, i))

    in_threads(*(lambda who=who: submitter(who) for who in range(3)))
    thread.call(int)
    for who in range(3):
        assert [i for w, i in ran if w == who] == list(range(1000))


@each_guest
@pytest.mark.usefixtures("tiny_switch_interval")
def test_s31_work_is_run_or_cancelled_when_the_vcpu_stops(
    kvm: Kvm, bench: Any, guest: str, in_threads: Callable[..., None]
) -> None:
    for _ in range(10):
        with ExitStack() as stack:
            race_stop(type(bench)(kvm, stack), guest, in_threads)


def race_stop(bench: Any, guest: str, in_threads: Callable[..., None]) -> None:
    """Submit until refused, while another thread stops the vCPU: each accepted item is accounted for."""
    thread = start(bench, guest)
    accepted, ran, cancelled = list[int](), list[int](), list[int]()
    enough = threading.Event()

    def submitter() -> None:
        i = 0
        try:
            while True:
                thread.submit(ran.append, i, cancelled=lambda i=i: cancelled.append(i))
                accepted.append(i)
                i += 1
                if i == 30:
                    enough.set()
        except Stopped:
            return

    def stopper() -> None:
        assert enough.wait(LOST)
        thread.stop()
        assert thread.join(LOST)

    in_threads(submitter, stopper)
    assert ran + cancelled == accepted
    assert not bench.faults


@pytest.mark.usefixtures("no_leaks")
def test_stopping_leaves_no_thread_and_no_fd(kvm: Kvm, bench: Any) -> None:
    """With every kind of guest at once, over and over."""
    for code in [code for code in GUESTS.values() if code] * 3:
        with ExitStack() as stack:
            mine = type(bench)(kvm, stack)
            threads = [mine.thread(mine.vcpu(code), HANDLERS), *(mine.thread(mine.vcpu()) for _ in range(2))]
            group = VcpuGroup(threads)
            group.start_all()
            threads[0].call(int)
            group.stop_all(LOST)
            assert group.describe() == "vcpu0: ended\nvcpu1: ended\nvcpu2: ended"
            assert not mine.faults


@each_guest
def test_a_thread_stops_whenever_it_is_asked_to(kvm: Kvm, bench: Any, guest: str) -> None:
    """Right after start, or after a random while: the stop's kick may come at any point of the loop."""
    delay = random.Random(guest)
    for _ in range(40):
        with ExitStack() as stack:
            mine = type(bench)(kvm, stack)
            thread = start(mine, guest)
            for _ in range(delay.choice((0, 100, 3000))):
                pass
            thread.stop()
            assert thread.join(LOST), thread.state
            assert not mine.faults
