"""Every synthetic register of the interface in user space, without KVM: EOM, reset, saved state (S7, S29)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_host import Host, Vcpu

from hvkvm.abi import tlfs
from hvkvm.errors import KvmIoctlError
from hvkvm.hyperv.usermode import interface
from hvkvm.hyperv.usermode.interface import UserHyperv
from hvkvm.memory.guest import GuestMemory

HYPERCALL, TSC, ASSIST, MESSAGES = 0x10000, 0x11000, 0x12000, 0x13000
SET = {
    tlfs.HV_X64_MSR_GUEST_OS_ID: 0x8100 << 48,
    tlfs.HV_X64_MSR_HYPERCALL: HYPERCALL | 1,
    tlfs.HV_X64_MSR_REFERENCE_TSC: TSC | 1,
    tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL: 1,
    tlfs.HV_X64_MSR_REENLIGHTENMENT_CONTROL: 0x1_00EE,
    tlfs.HV_X64_MSR_CRASH_P0: 7,
    tlfs.HV_X64_MSR_CRASH_P4: (1 << 64) - 1,
}
"""What is the whole VM's."""
EACH = {
    tlfs.HV_X64_MSR_VP_ASSIST_PAGE: ASSIST | 1,
    tlfs.HV_X64_MSR_SCONTROL: 1,
    tlfs.HV_X64_MSR_SIMP: MESSAGES | 1,
    tlfs.HV_X64_MSR_SINT0 + 2: 0x52,
    tlfs.HV_X64_MSR_STIMER0_CONFIG: 2 << 16,
    tlfs.HV_X64_MSR_STIMER0_COUNT: 9,
}
"""What each VP has; the pages are one behind another."""


class Bench:
    """An interface of two VPs, with the SynIC or without."""

    def __init__(self, with_synic: bool = True) -> None:
        self.host = Host()
        self.memory = GuestMemory(self.host, 4 << 20)
        self.vcpus = [Vcpu(0), Vcpu(1)]
        threads = [SimpleNamespace(vcpu=vcpu, submit=self.host.submit) for vcpu in self.vcpus]
        self.hyperv = UserHyperv(
            self.host,  # type: ignore[arg-type]
            self.memory,
            self.host,  # type: ignore[arg-type]
            threads,  # type: ignore[arg-type]
            with_synic=with_synic,
            on_crash=print,
            on_reset=print,
        )
        if self.hyperv.synic is not None:
            self.hyperv.synic.activate()

    def write(self, index: int, msr: int, value: int) -> bool:
        """Whether the guest may."""
        run = self.vcpus[index].run
        run.msr.index, run.msr.data, run.msr.error = msr, value, 0
        self.hyperv.handle_wrmsr(self.vcpus[index])  # type: ignore[arg-type]
        return not run.msr.error

    def read(self, index: int, msr: int) -> int:
        run = self.vcpus[index].run
        run.msr.index, run.msr.error = msr, 0
        self.hyperv.handle_rdmsr(self.vcpus[index])  # type: ignore[arg-type]
        assert not run.msr.error
        value: int = run.msr.data
        return value

    def set_all(self) -> None:
        for msr, value in SET.items():
            assert self.write(1, msr, value)
        for index in (0, 1):
            for msr, value in EACH.items():
                page = 0x1000 * index if value & 1 and value > 1 else 0
                assert self.write(index, msr, value + page)

    def registers(self) -> list[int]:
        return [self.read(0, msr) for msr in SET] + [self.read(i, msr) for i in (0, 1) for msr in EACH]

    def close(self) -> None:
        self.hyperv.close()
        self.memory.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(interface, "host_counts_by_tsc", lambda: True)
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture
def other(bench: Bench) -> Iterator[Bench]:
    other = Bench()
    yield other
    other.close()


def test_s7_reset_puts_everything_back(bench: Bench) -> None:
    fresh = bench.registers()
    bench.set_all()
    bench.read(0, tlfs.HV_X64_MSR_VP_RUNTIME)
    assert bench.hyperv.hypercall_page._overlay.gpa == HYPERCALL
    assert bench.hyperv.synic is not None
    bench.hyperv.reset()
    bench.hyperv.synic.reset()
    assert bench.registers() == fresh
    assert bench.memory.read(HYPERCALL, 0x3000) == bytes(0x3000), "no page lies over RAM any more"
    assert bench.read(0, tlfs.HV_X64_MSR_VP_RUNTIME) == 0
    invariant = tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL
    assert (bench.vcpus[1].told, bench.vcpus[0].told) == ([(invariant, 1)], [(invariant, 0)])


def test_everything_is_saved_and_goes_on(bench: Bench, other: Bench) -> None:
    bench.set_all()
    bench.hyperv.clock.set(5_000_000_000)
    for index in (0, 1):
        bench.hyperv._run_times[index].load(1_000_000 + index)
    bench.hyperv.hold()
    saved = bench.hyperv.save()
    other.hyperv.hold()
    other.hyperv.load(saved)
    assert other.registers() == bench.registers()
    assert other.read(0, tlfs.HV_X64_MSR_TIME_REF_COUNT) >= 5_000_000_000
    for index in (0, 1):
        assert other.read(index, tlfs.HV_X64_MSR_VP_RUNTIME) >= 1_000_000 + index
    assert other.memory.read(HYPERCALL, 4) == b"\xf3\x0f\x1e\xfa"
    assert other.memory.read(TSC, 4) != bytes(4), "a page that this host's clocks made"
    assert other.vcpus[0].told == [(tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1)]


def test_timers_are_held_and_go_on(bench: Bench) -> None:
    bench.set_all()
    bench.hyperv.hold()
    bench.write(0, tlfs.HV_X64_MSR_STIMER0_CONFIG, 2 << 16 | 1)
    assert bench.host.queue == []
    bench.hyperv.go_on()
    bench.write(0, tlfs.HV_X64_MSR_STIMER0_CONFIG, 2 << 16 | 1)
    assert len(bench.host.queue) == 1


def without(state: Any, msr: int) -> dict[int, int]:
    return {index: value for index, value in state.stored.items() if index != msr}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: {"os_id": 1 << 64}, "interface"),
        (lambda s: {"os_id": -1}, "interface"),
        (lambda s: {"hypercall": 1 << 64}, "interface"),
        (lambda s: {"assist": (0, 1 << 64)}, "interface"),
        (lambda s: {"stored": s.stored | {tlfs.HV_X64_MSR_CRASH_P0: -1}}, "interface"),
        (lambda s: {"stored": s.stored | {tlfs.HV_X64_MSR_EOM: 0}}, "interface"),
        (lambda s: {"stored": without(s, tlfs.HV_X64_MSR_CRASH_P0)}, "interface"),
        (lambda s: {"assist": (0,)}, "machine"),
        (lambda s: {"run_times": (0, 0, 0)}, "machine"),
        (lambda s: {"assist": (0,), "run_times": (0,)}, "machine"),
        (lambda s: {"tsc_invariant": 2}, "machine"),
        (lambda s: {"reference_time": -1}, "can have run"),
        (lambda s: {"run_times": (0, 1 << 62)}, "can have run"),
        (lambda s: {"hypercall": 1 << 63 | 1}, "hypercall page"),
        (lambda s: {"reference_tsc": 1 << 63 | 1}, "reference TSC page"),
        (lambda s: {"reference_tsc": 1 << 64}, "reference TSC page"),
        (lambda s: {"vps": s.vps[:1]}, "1 VPs were saved"),
    ],
)
def test_a_saved_interface_that_none_can_be_is_refused(
    bench: Bench, other: Bench, change: Callable[[Any], dict[str, Any]], why: str
) -> None:
    bench.set_all()
    bench.hyperv.hold()
    saved = bench.hyperv.save()
    other.hyperv.hold()
    with pytest.raises(ValueError, match=why):
        other.hyperv.load(saved._replace(**change(saved)))


def test_without_synic_no_vp_is_saved_and_none_is_taken(bench: Bench) -> None:
    plain = Bench(with_synic=False)
    saved = plain.hyperv.save()
    assert saved.vps == ()
    plain.hyperv.load(saved)
    with pytest.raises(ValueError, match="has none"):
        plain.hyperv.load(saved._replace(vps=bench.hyperv.save().vps))
    plain.close()


def test_s29_the_guests_eom_reaches_who_waits(bench: Bench) -> None:
    def waiter() -> None:
        pass

    vp = bench.hyperv.synic and bench.hyperv.synic.vp(1)
    assert vp
    vp.arm_ack(waiter)
    assert bench.write(0, tlfs.HV_X64_MSR_EOM, 0)
    assert bench.host.soon == [], "another VP's"
    assert bench.write(1, tlfs.HV_X64_MSR_EOM, 0)
    assert bench.host.soon == [waiter]
    assert bench.read(1, tlfs.HV_X64_MSR_EOM) == 0


def test_a_kvm_that_does_not_know_the_invariant_tsc_register_is_no_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(values: object) -> None:
        raise KvmIoctlError(22, "KVM_SET_MSRS", "vcpu")

    monkeypatch.setattr(bench.vcpus[0], "set_msrs", unknown)
    assert bench.write(0, tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1)
    assert bench.read(0, tlfs.HV_X64_MSR_TSC_INVARIANT_CONTROL) == 1
