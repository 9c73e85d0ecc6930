"""KVM's SynIC as we drive it: lines, activation, exits (S11 to S18, S52, S56 to S58).

The VM records what it is told; fds, memory and tables are real.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest
from fake_kvm import FakeThread, FakeVcpu, FakeVm, ManualReaders
from fake_synic import Recorder

from hvkvm.abi.kvm import (
    KVM_CAP_HYPERV_SYNIC2,
    KVM_EXIT_HYPERV_HCALL,
    KVM_EXIT_HYPERV_SYNDBG,
    KVM_EXIT_HYPERV_SYNIC,
)
from hvkvm.abi.tlfs import HV_X64_MSR_EOM, HV_X64_MSR_SIMP
from hvkvm.errors import CapabilityMissing, HvkvmError, RouteError
from hvkvm.hyperv.sint_route import RouteTable
from hvkvm.hyperv.synic.kernel import KernelSynic
from hvkvm.kvm.gsi import GsiTable
from hvkvm.memory.guest import GuestMemory


class Bench:
    """A `KernelSynic` of two VPs on a recording VM, with routes above it."""

    def __init__(self) -> None:
        self.vm = FakeVm()
        self.gsi = GsiTable(self.vm)
        self.memory = GuestMemory(self.vm, 4 << 20)
        self.io = ManualReaders()
        self.threads = [FakeThread(FakeVcpu(self.vm, index)) for index in range(2)]
        self.synic = KernelSynic(
            self.vm,  # type: ignore[arg-type]
            self.gsi,
            self.memory,
            self.io,
            self.threads,  # type: ignore[arg-type]
            reset_msrs=lambda vp_index: [(HV_X64_MSR_SIMP, 0)],
            observer=Recorder(),
        )
        self.routes = RouteTable(self.synic, self.io)
        self.vm.log.clear()

    def activate(self) -> None:
        self.synic.activate()
        self.vm.log.clear()

    def synic_exit(self, index: int, control: int, evt_page: int, msg_page: int) -> None:
        vcpu = self.threads[index].vcpu
        vcpu.run.hyperv.type = KVM_EXIT_HYPERV_SYNIC
        exit_ = vcpu.run.hyperv.u.synic
        exit_.msr, exit_.control, exit_.evt_page, exit_.msg_page = (
            HV_X64_MSR_SIMP,
            control,
            evt_page,
            msg_page,
        )
        self.synic.handle_exit(vcpu, _no_call)  # type: ignore[arg-type]

    def close(self) -> None:
        self.routes.close()
        self.synic.close()
        self.memory.close()


def _no_call(control: int, param: int) -> int:
    raise AssertionError("no hypercall was made")


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_s15_the_route_is_committed_before_the_irqfd_and_again_on_release(bench: Bench) -> None:
    bench.activate()
    route = bench.routes.open(1, 2)
    assert bench.vm.log == [("routing", (24, 1, 2)), ("irqfd", 24)]
    bench.vm.log.clear()
    route.close()
    assert bench.vm.log == [("irqfd off", 24), ("routing",)]


def test_s13_resample_only_for_a_completion_user_and_the_gsi_stays_one(bench: Bench) -> None:
    bench.activate()
    plain = bench.routes.open(0, 2)
    sender = bench.routes.open(0, 2, lambda status: None)
    assert bench.vm.log == [
        ("routing", (24, 0, 2)),
        ("irqfd", 24),
        ("irqfd resample", 24),
        ("irqfd off", 24),
    ]
    assert plain.pulse() == sender.pulse() == 0
    sender.close()
    bench.vm.log.clear()
    again = bench.routes.open(0, 2, lambda status: None)
    assert bench.vm.log == [], "the line has learned it"
    again.close()
    plain.close()
    assert bench.gsi.gsis() == []


def test_s13_a_line_that_waits_for_activation_learns_acks_too(bench: Bench) -> None:
    bench.routes.open(1, 3)
    bench.routes.open(1, 3, lambda status: None)
    bench.synic.activate()
    assert bench.vm.log[-2:] == [("routing", (24, 1, 3)), ("irqfd resample", 24)]


def test_s20_each_pulse_counts_up_the_eventfd_that_kvm_was_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(bench.vm, "irqfd", lambda fd, *args: given.append(fd))
    bench.activate()
    route = bench.routes.open(0, 2)
    assert (route.pulse(), route.pulse()) == (0, 0)
    assert os.eventfd_read(given[0]) == 2
    os.eventfd_write(given[0], (1 << 64) - 2)
    assert route.pulse() == 0, "a full counter is as good as signalled"
    full = os.eventfd_read(given[0])
    assert full == (1 << 64) - 2

    def broken(fd: int, value: int) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "eventfd_write", broken)
    other = bench.routes.open(0, 3)
    assert other.pulse() == -errno.ENOMEM


def test_s16_lines_opened_before_activation_are_bound_by_it_in_order(bench: Bench) -> None:
    route = bench.routes.open(1, 3, lambda status: None)
    closed_early = bench.routes.open(0, 5)
    closed_early.close()
    assert bench.vm.log == []
    assert route.pulse() == -errno.ENXIO
    bench.synic.activate()
    assert bench.vm.log == [
        ("enable_cap", 0, KVM_CAP_HYPERV_SYNIC2),
        ("enable_cap", 1, KVM_CAP_HYPERV_SYNIC2),
        ("routing",),
        ("routing", (24, 1, 3)),
        ("irqfd resample", 24),
    ]
    assert route.pulse() == 0


def test_s16_gsis_begin_at_24(bench: Bench) -> None:
    bench.activate()
    for sint in range(16):
        bench.routes.open(0, sint)
    assert bench.gsi.gsis() == list(range(24, 40))


def test_activation_without_the_capability_names_it(bench: Bench) -> None:
    bench.vm.caps[KVM_CAP_HYPERV_SYNIC2] = 0
    with pytest.raises(CapabilityMissing, match=r"KVM_CAP_HYPERV_SYNIC2.*CONFIG_KVM_HYPERV"):
        bench.synic.activate()


@pytest.mark.parametrize("acks", [False, True])
@pytest.mark.parametrize("step", ["routing", "irqfd", "irqfd resample", "eventfd 1", "eventfd 2"])
def test_s14_no_step_of_opening_a_route_leaks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, open_fds: Callable[[], int], step: str, acks: bool
) -> None:
    happens = {"irqfd": not acks, "irqfd resample": acks, "eventfd 2": acks}.get(step, True)
    bench.activate()
    fds = open_fds()
    make = os.eventfd
    if step.startswith("eventfd"):
        left = [int(step[-1])]

        def eventfd(*args: int) -> int:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return make(*args)

        monkeypatch.setattr(os, "eventfd", eventfd)
    else:
        bench.vm.fail[step] = errno.ENOSPC
    on_complete = (lambda status: None) if acks else None
    if happens:
        with pytest.raises(RouteError, match="SINT 2 of VP 0"):
            bench.routes.open(0, 2, on_complete)
        assert open_fds() == fds
        assert bench.gsi.gsis() == []
        assert bench.routes.snapshot() == []
    bench.vm.fail.clear()
    monkeypatch.setattr(os, "eventfd", make)
    route = bench.routes.open(0, 2, on_complete)
    assert route.pulse() == 0
    route.close()
    assert open_fds() == fds
    assert bench.gsi.gsis() == []


@pytest.mark.parametrize("step", ["irqfd resample", "eventfd 1", "eventfd 2"])
def test_s14_no_step_of_learning_acks_leaks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, open_fds: Callable[[], int], step: str
) -> None:
    bench.activate()
    plain = bench.routes.open(0, 2)
    fds = open_fds()
    if step == "irqfd resample":
        bench.vm.fail[step] = errno.EINVAL
    else:
        made = []
        make = os.eventfd

        def eventfd(*args: int) -> int:
            made.append(args)
            if len(made) == int(step[-1]):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return make(*args)

        monkeypatch.setattr(os, "eventfd", eventfd)
    with pytest.raises(RouteError):
        bench.routes.open(0, 2, lambda status: None)
    assert open_fds() == fds
    assert plain.pulse() == 0
    assert bench.gsi.gsis() == [24]


def test_s18_order_of_the_end_and_everything_ends_even_when_a_step_fails(
    bench: Bench, open_fds: Callable[[], int]
) -> None:
    bench.activate()
    fds = open_fds()
    statuses: list[int] = []
    route = bench.routes.open(0, 2, statuses.append)
    bench.synic_exit(0, 1, 0, 0x10001)
    bench.memory.write_u32(0x10000 + 512, 7)
    route.post(1, b"")
    bench.threads[0].run()
    assert len(bench.io.readers) == 1
    bench.vm.log.clear()

    class Readers(dict[int, Callable[[], object]]):
        def pop(self, *args: object) -> object:  # type: ignore[override]
            bench.vm.log.append(("ack handler off",))
            return super().pop(*args)  # type: ignore[call-overload]

    bench.io.readers = Readers(bench.io.readers)
    route.close()
    bench.io.queue, queued = [], bench.io.queue
    for fn, args in queued:
        fn(*args)
    assert statuses == [-errno.ECANCELED]
    assert bench.vm.log == [("irqfd off", 24), ("routing",), ("ack handler off",)]
    assert open_fds() == fds

    broken = bench.routes.open(0, 3)
    bench.vm.fail["irqfd off"] = errno.EIO
    with pytest.raises(HvkvmError):
        broken.close()
    assert open_fds() == fds
    assert bench.gsi.gsis() == []
    assert broken.pulse() == -errno.ENXIO


def test_s29_the_loop_watches_for_acks_only_while_a_message_waits(bench: Bench) -> None:
    bench.activate()
    statuses: list[int] = []
    route = bench.routes.open(0, 2, statuses.append)
    line = bench.routes._lines[0, 2].line
    bench.synic_exit(0, 1, 0, 0x10001)
    route.post(1, b"")
    bench.threads[0].run()
    assert bench.io.readers == {}
    bench.io.run()
    assert statuses == [0]
    line._resamplefd.signal()  # type: ignore[attr-defined]
    assert route.post(1, b"") == 0
    bench.threads[0].run()
    assert len(bench.io.readers) == 1
    bench.io.run()
    assert bench.io.readers == {}
    vp = bench.synic.vp(0)
    assert vp is not None
    assert bench.threads[0].run() == 1, "an EOM from before made an early attempt"
    assert len(bench.io.readers) == 1
    bench.io.run()
    assert bench.threads[0].run() == 0, "but it counts only once"
    assert statuses == [0]
    vp.message_page.overlay.view[256 * 2 : 256 * 2 + 4] = bytes(4)  # the guest frees the slot
    line._resamplefd.signal()  # type: ignore[attr-defined]
    bench.io.run()
    assert bench.io.readers == {}
    bench.threads[0].run()
    bench.io.run()
    assert statuses == [0, 0]


def test_s29_a_sender_that_asks_for_tries_leaves_one_waiter(bench: Bench) -> None:
    """VMBus does each second, for as long as a guest takes no message."""
    bench.activate()
    route = bench.routes.open(0, 2, lambda status: None)
    line = bench.routes._lines[0, 2].line
    bench.synic_exit(0, 1, 0, 0x10001)
    bench.memory.write_u32(0x10000 + 512, 7)
    route.post(1, b"")
    for _ in range(3):
        assert bench.threads[0].run() == 1
        assert (len(line._waiters), len(bench.io.readers)) == (1, 1)  # type: ignore[attr-defined]
        route.retry()


def test_s23_a_host_without_memory_to_watch_for_the_ack_completes_the_message(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "no more watches")

    bench.activate()
    statuses: list[int] = []
    route = bench.routes.open(0, 2, statuses.append)
    bench.synic_exit(0, 1, 0, 0x10001)
    with monkeypatch.context() as patched:
        patched.setattr(bench.io, "add_reader", refuse)
        for _ in range(2):
            assert route.post(1, b"") == 0
            bench.threads[0].run()
            bench.io.run()
    assert statuses == [0, -errno.ENOSPC]
    route.post(1, b"")
    bench.threads[0].run()
    assert len(bench.io.readers) == 1


def test_s11_a_vp_that_kvm_would_take_is_still_refused(bench: Bench) -> None:
    bench.activate()
    for vp_index, sint in ((9, 2), (0, 99), (-1, 0), (0, -1)):
        with pytest.raises(RouteError):
            bench.routes.open(vp_index, sint)
    assert bench.vm.log == []


def test_s57_synic_exit_takes_all_three_values(bench: Bench) -> None:
    bench.activate()
    bench.synic_exit(1, 1, 0x20001, 0x30001)
    vp = bench.synic.vp(1)
    assert vp is not None
    assert (vp.scontrol, vp.siefp, vp.simp) == (1, 0x20001, 0x30001)
    assert (vp.event_page.overlay.gpa, vp.message_page.overlay.gpa) == (0x20000, 0x30000)
    other = bench.synic.vp(0)
    assert other is not None
    assert other.simp == 0


def test_s58_message_page_coming_on_has_kvm_retry_its_timers(bench: Bench) -> None:
    bench.activate()
    vcpu = bench.threads[0].vcpu
    vcpu.msrs.clear()
    bench.synic_exit(0, 1, 0x20001, 0)
    assert vcpu.msrs == []
    bench.synic_exit(0, 1, 0x20001, 0x30001)
    assert vcpu.msrs == [(HV_X64_MSR_EOM, 0)]
    bench.synic_exit(0, 1, 0x20001, 0x40001)
    bench.synic_exit(0, 1, 0x20001, 0x40001)
    assert vcpu.msrs == [(HV_X64_MSR_EOM, 0)]


def test_s7_reset_clears_pages_and_writes_the_msrs(bench: Bench) -> None:
    bench.activate()
    bench.synic_exit(0, 1, 0x20001, 0x30001)
    bench.threads[0].vcpu.msrs.clear()
    bench.synic.reset()
    vp = bench.synic.vp(0)
    assert vp is not None
    assert (vp.simp, vp.message_page.overlay.gpa) == (0, None)
    assert bench.threads[0].vcpu.msrs == [(HV_X64_MSR_SIMP, 0)]


def hypercall(bench: Bench, control: int, param: int, result: int = 0) -> tuple[int, int]:
    """What `call` is given for an exit, and that its result goes to KVM."""
    vcpu = bench.threads[0].vcpu
    vcpu.run.hyperv.type = KVM_EXIT_HYPERV_HCALL
    hcall = vcpu.run.hyperv.u.hcall
    hcall.input, hcall.params[0], hcall.result = control, param, 0xDEAD
    seen: list[tuple[int, int]] = []

    def call(*given: int) -> int:
        seen.append((given[0], given[1]))
        return result

    bench.synic.handle_exit(vcpu, call)  # type: ignore[arg-type]
    assert hcall.result == result
    return seen[0]


def test_s56_hypercall_result_reaches_the_guest_and_a_strange_exit_is_fatal(bench: Bench) -> None:
    assert hypercall(bench, 0x5C, 0x1000, result=0x12) == (0x5C, 0x1000)
    assert hypercall(bench, 0x1005D, 0x1234) == (0x1005D, 0x1234)
    vcpu = bench.threads[0].vcpu
    vcpu.run.hyperv.type = 4
    with pytest.raises(HvkvmError, match="type 4"):
        bench.synic.handle_exit(vcpu, _no_call)  # type: ignore[arg-type]


def long_mode(bench: Bench) -> None:
    special = bench.threads[0].vcpu.special
    special.efer, special.cs.l = 1 << 10, 1


def test_s52_slow_signal_whose_value_kvm_loaded_already_is_taken_as_fast(bench: Bench) -> None:
    long_mode(bench)
    bench.threads[0].vcpu.general.rdx = 0x8000
    assert hypercall(bench, 0x5D, 0x1234) == (0x1005D, 0x1234)


def test_s52_slow_signal_of_an_older_kernel_is_still_a_gpa(bench: Bench) -> None:
    long_mode(bench)
    bench.threads[0].vcpu.general.rdx = 0x8000
    assert hypercall(bench, 0x5D, 0x8000) == (0x5D, 0x8000)


def test_s52_a_32_bit_guest_has_its_gpa_in_ebx_and_ecx(bench: Bench) -> None:
    general = bench.threads[0].vcpu.general
    general.rbx, general.rcx, general.rdx = 0xFFFF_FFFF_0000_0001, 0xFFFF_FFFF_0000_8000, 0x1234
    assert hypercall(bench, 0x5D, 0x1_0000_8000) == (0x5D, 0x1_0000_8000)
    assert hypercall(bench, 0x5D, 0x1234) == (0x1005D, 0x1234)


def test_syndbg_exit_finds_nobody(bench: Bench) -> None:
    vcpu = bench.threads[0].vcpu
    vcpu.run.hyperv.type = KVM_EXIT_HYPERV_SYNDBG
    vcpu.run.hyperv.u.syndbg.status = 0xFF
    bench.synic.handle_exit(vcpu, _no_call)  # type: ignore[arg-type]
    assert vcpu.run.hyperv.u.syndbg.status == 0


def test_s8_a_synic_that_cannot_be_made_leaves_no_fd(
    monkeypatch: pytest.MonkeyPatch, open_fds: Callable[[], int]
) -> None:
    vm = FakeVm()
    memory = GuestMemory(vm, 4 << 20)
    fds = open_fds()
    make = os.memfd_create
    for step in range(1, 5):
        left = [step]

        def memfd(*args: object, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENFILE, "no more")
            return make(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "memfd_create", memfd)
        threads = [FakeThread(FakeVcpu(vm, index)) for index in range(2)]
        with pytest.raises(OSError, match="no more"):
            KernelSynic(vm, GsiTable(vm), memory, ManualReaders(), threads)  # type: ignore[arg-type]
        assert open_fds() == fds
    memory.close()
