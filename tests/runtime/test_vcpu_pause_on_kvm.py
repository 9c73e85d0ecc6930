"""Pausing on a real KVM: a paused vCPU runs no guest code, and its last exit is complete."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import sleep
from typing import Any

import pytest

from hvkvm.abi.kvm import KVM_EXIT_IO
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.runtime.vcpu_thread import VcpuThread
from hvkvm.runtime.vcpus import VcpuGroup

pytestmark = pytest.mark.kvm

COUNTER = 0x5000
COUNTS = bytes.fromhex("66 ff 06 00 50 eb f9")  # again: inc dword [0x5000]; jmp again
READS = bytes.fromhex("e4 42 a2 00 50 eb f9")  # again: in al, 0x42; mov [0x5000], al; jmp again
WRITE_IP = 0x1002
HALTS = bytes.fromhex("fa f4 eb fd")
READS_STRINGS = bytes.fromhex(  # a hostile one: 64 KiB in one instruction, for ever
    "bf 00 60"  # again: mov di, 0x6000
    "b9 ff 0f"  # mov cx, 0x0fff
    "ba 42 00"  # mov dx, 0x42
    "f3 6c"  # rep insb
    "eb f3"  # jmp again
)


def wait_until(condition: Callable[[], bool]) -> None:
    """Let others run until it is so; the suite's own timeout is the limit."""
    while not condition():
        sleep(0)


def started(
    bench: Any, *codes: bytes, handlers: dict[int, Callable[[Vcpu], object]] | None = None
) -> VcpuGroup:
    threads = [bench.thread(bench.vcpu(code), handlers) for code in codes]
    group = VcpuGroup(threads)
    group.start_all()
    return group


def test_pause_and_resume_a_thousand_times(bench: Any) -> None:
    """While paused the guest counts nothing; between pauses it goes on."""
    group = started(bench, COUNTS, b"")
    count = 0
    for _ in range(1000):
        wait_until(lambda: bench.memory.read_u32(COUNTER) != count)  # noqa: B023
        with group.paused():
            count = bench.memory.read_u32(COUNTER)
            assert all(thread.state == "waiting paused" for thread in group.threads)
            assert bench.memory.read_u32(COUNTER) == count
    assert not bench.faults


def test_the_pauser_owns_the_vcpu(bench: Any) -> None:
    """Registers can be read and written from the pausing thread, directly and through call()."""
    group = started(bench, COUNTS)
    (thread,) = group.threads
    for _ in range(200):
        with group.paused():
            regs = thread.call(thread.vcpu.regs)
            assert regs.rip in (0x1000, 0x1005)
            assert thread.vcpu.regs().rip == regs.rip
            regs.rbx += 1
            thread.vcpu.set_regs(regs)
    with group.paused():
        assert thread.vcpu.regs().rbx == 200


def test_a_pending_in_is_complete_when_paused(bench: Any) -> None:
    """After the handler answered, RIP is past the IN and AL holds the answer: never an exit half done."""
    answers: list[int] = []

    def answer(vcpu: Vcpu) -> None:
        value = (answers[-1] + 1) & 0xFF if answers else 1
        answers.append(value)
        vcpu.io_data(vcpu.run.io.data_offset, 1)[0] = value

    group = started(bench, READS, handlers={KVM_EXIT_IO: answer})
    (thread,) = group.threads
    count = at_read = 0
    for _ in range(1000):
        wait_until(lambda: len(answers) > count)  # noqa: B023
        with group.paused():
            regs = thread.vcpu.regs()
            count = len(answers)
            assert regs.rax & 0xFF == answers[-1], hex(regs.rip)
            if regs.rip == WRITE_IP:
                at_read += 1  # had it not been completed, RIP or AL would be the old one
            assert len(answers) == count
    assert at_read, "never paused right after an IN: nothing was proved"
    assert not bench.faults


def test_a_guest_cannot_delay_a_pause_by_a_string_of_exits(bench: Any) -> None:
    exits: list[int] = []

    def fill(vcpu: Vcpu) -> None:
        io = vcpu.run.io
        exits.append(io.count)
        size = io.size * io.count
        vcpu.io_data(io.data_offset, size)[:] = bytes([len(exits) & 0xFF]) * size

    group = started(bench, READS_STRINGS, handlers={KVM_EXIT_IO: fill})
    count = 0
    for _ in range(300):
        wait_until(lambda: len(exits) > count)  # noqa: B023
        with group.paused(timeout=100):
            count = len(exits)
            assert len(exits) == count
    assert max(exits) > 1, "no exit carried more than one item: not the string instruction meant"
    assert not bench.faults


def test_pauses_nest_and_their_threads_need_not_be_the_same(
    bench: Any, in_threads: Callable[..., None]
) -> None:
    group = started(bench, COUNTS, b"")

    def pauser() -> None:
        for _ in range(100):
            with group.paused():
                with group.paused():
                    before = bench.memory.read_u32(COUNTER)
                assert bench.memory.read_u32(COUNTER) == before
                assert all(thread.state == "waiting paused" for thread in group.threads)

    in_threads(pauser, pauser, pauser)
    with group.paused():
        before = bench.memory.read_u32(COUNTER)
    while bench.memory.read_u32(COUNTER) == before:
        threading.Event().wait(0.001)
    with pytest.raises(RuntimeError, match="not paused"):
        group.resume_all()


def test_work_waits_for_the_resume_and_is_not_lost(bench: Any) -> None:
    group = started(bench, HALTS)
    (thread,) = group.threads
    for _ in range(500):
        done = threading.Event()
        with group.paused():
            thread.submit(done.set)
            assert thread.state == "waiting paused"
            assert not done.is_set()
        assert done.wait(100), thread.state


def test_a_paused_group_stops(bench: Any) -> None:
    seen: list[str] = []
    group = started(bench, COUNTS, b"")
    group.pause_all()
    group.threads[0].submit(print, cancelled=lambda: seen.append("cancelled"))
    group.stop_all(20)
    assert seen == ["cancelled"]
    group.resume_all()
    group.pause_all(timeout=100)  # what has ended is at rest
    group.resume_all()


def test_pausing_before_start_keeps_the_guest_from_running(bench: Any) -> None:
    thread = bench.thread(bench.vcpu(COUNTS))
    group = VcpuGroup([thread])
    with group.paused():
        group.start_all()
        assert thread.wait_paused(20)
        while thread.state != "waiting paused":
            threading.Event().wait(0.001)
        assert bench.memory.read_u32(COUNTER) == 0
        assert not thread.exit_counts
    while not bench.memory.read_u32(COUNTER):
        threading.Event().wait(0.001)


def test_a_vcpu_thread_cannot_pause_itself_or_its_group(bench: Any) -> None:
    group = started(bench, HALTS, b"")
    first: VcpuThread = group.threads[0]
    with pytest.raises(RuntimeError, match="vCPU thread"):
        first.call(group.pause_all)
    with pytest.raises(RuntimeError, match="itself"):
        first.call(first.request_pause)
    assert first.call(lambda: "alive") == "alive"
    with group.paused():
        pass


def test_a_pause_that_times_out_names_the_thread_and_is_undone(bench: Any) -> None:
    in_handler, let_go = threading.Event(), threading.Event()

    def slow(_vcpu: Vcpu) -> None:
        in_handler.set()
        let_go.wait()

    group = started(bench, READS, b"", handlers={KVM_EXIT_IO: slow})
    assert in_handler.wait(100)
    with pytest.raises(TimeoutError, match="vcpu0 is handling KVM_EXIT_IO"):
        group.pause_all(timeout=0.05)
    let_go.set()
    with pytest.raises(RuntimeError, match="not paused"):
        group.resume_all()
    with group.paused(timeout=100):
        assert group.describe() == "vcpu0: waiting paused\nvcpu1: waiting paused"
