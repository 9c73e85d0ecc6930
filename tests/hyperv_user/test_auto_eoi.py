"""AutoEOI interrupts: when a vCPU is told that it took one, and when that has to wait."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.abi.kvm import KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE
from hvkvm.abi.kvm_structs import kvm_lapic_state, kvm_vcpu_events
from hvkvm.errors import Stopped
from hvkvm.hyperv.usermode.auto_eoi import AutoEoi

VECTOR = 0xB4


class Cpu:
    """A vCPU that is ready for anything, with its thread's queue and the I/O loop's timers."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(if_flag=1)
        self.state = KVM_MP_STATE_RUNNABLE
        self.events = kvm_vcpu_events(flags=0xD)  # KVM says which parts are valid: written back, they are set
        self.events.interrupt.soft = 1
        self.apic = kvm_lapic_state()
        self.apic.regs[0xF1] = 1
        self.taken: list[int] = []
        self.later: list[tuple[float, Callable[..., object]]] = []
        self.ended = self.loop_ended = False

    def vcpu_events(self) -> kvm_vcpu_events:
        return kvm_vcpu_events.from_buffer_copy(self.events)

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        assert (events.interrupt.injected, events.interrupt.soft, events.flags) == (1, 0, 0)
        self.taken.append(events.interrupt.nr)

    def lapic(self) -> kvm_lapic_state:
        return self.apic

    def mp_state(self) -> int:
        return self.state

    def set_mp_state(self, state: int) -> None:
        self.state = state

    def submit(self, fn: Callable[[], None], cancelled: Callable[[], None]) -> None:
        if self.ended:
            raise Stopped("ended")
        try:
            fn()
        except Stopped as error:
            raise AssertionError("raised on the vCPU's thread") from error

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        if self.loop_ended:
            raise Stopped("ended")
        self.later.append((seconds, fn))

    def tick(self) -> float:
        seconds, fn = self.later.pop(0)
        fn()
        return seconds


@pytest.fixture
def cpu() -> Cpu:
    return Cpu()


@pytest.fixture
def auto_eoi(cpu: Cpu) -> AutoEoi:
    return AutoEoi(cpu, cpu.submit, cpu)  # type: ignore[arg-type]


def test_it_is_taken_at_once_and_once(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    auto_eoi.raise_vector(VECTOR)
    assert (cpu.taken, cpu.later) == ([VECTOR], [])


def test_a_halted_cpu_wakes(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    cpu.state = KVM_MP_STATE_HALTED
    auto_eoi.raise_vector(VECTOR)
    assert (cpu.taken, cpu.state) == ([VECTOR], KVM_MP_STATE_RUNNABLE)


def closed_windows() -> list[tuple[str, Callable[[Cpu], None], Callable[[Cpu], None]]]:
    def part(group: str, field: str) -> tuple[Callable[[Cpu], None], Callable[[Cpu], None]]:
        return (
            lambda cpu: setattr(getattr(cpu.events, group), field, 1),
            lambda cpu: setattr(getattr(cpu.events, group), field, 0),
        )

    def priority(value: int) -> Callable[[Cpu], None]:
        return lambda cpu: cpu.apic.regs.__setitem__(0xA0, value)

    return [
        ("IF", lambda cpu: setattr(cpu.run, "if_flag", 0), lambda cpu: setattr(cpu.run, "if_flag", 1)),
        ("shadow", *part("interrupt", "shadow")),
        ("an interrupt", *part("interrupt", "injected")),
        ("an exception", *part("exception", "injected")),
        ("an exception to come", *part("exception", "pending")),
        ("an NMI", *part("nmi", "injected")),
        ("priority", priority(VECTOR & 0xF0), priority(0xA0)),
    ]


@pytest.mark.parametrize(
    ("close", "open_"), [w[1:] for w in closed_windows()], ids=[w[0] for w in closed_windows()]
)
def test_a_closed_window_is_waited_for(
    cpu: Cpu, auto_eoi: AutoEoi, close: Callable[[Cpu], None], open_: Callable[[Cpu], None]
) -> None:
    close(cpu)
    auto_eoi.raise_vector(VECTOR)
    auto_eoi.raise_vector(VECTOR)
    waits = [cpu.tick() for _ in range(6)]
    assert cpu.taken == []
    assert waits == [0.001, 0.002, 0.004, 0.008, 0.010, 0.010], (
        "the longer it takes the less often it is tried"
    )
    open_(cpu)
    cpu.tick()
    assert (cpu.taken, cpu.later) == ([VECTOR], [])
    close(cpu)
    auto_eoi.raise_vector(VECTOR)
    assert [cpu.tick(), cpu.tick()] == [0.001, 0.002], "the next one is tried as often again"


def test_several_go_one_by_one_highest_first(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    cpu.run.if_flag = 0
    for vector in (0x40, 0xFF, 0x80):
        auto_eoi.raise_vector(vector)
    cpu.run.if_flag = 1
    for _ in range(3):
        cpu.tick()
    assert (cpu.taken, cpu.later) == ([0xFF, 0x80, 0x40], [])


def test_one_that_waits_is_taken_a_millisecond_behind_another(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    cpu.run.if_flag = 0
    auto_eoi.raise_vector(0x40)
    auto_eoi.raise_vector(0x80)
    for _ in range(5):
        cpu.tick()
    cpu.run.if_flag = 1
    cpu.tick()
    assert cpu.taken == [0x80]
    assert cpu.tick() == 0.001
    assert (cpu.taken, cpu.later) == ([0x80, 0x40], [])


def test_what_waits_is_saved_and_taken_in_the_machine_that_goes_on(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    cpu.run.if_flag = 0
    for vector in (0x40, 0xFF, 0x40):
        auto_eoi.raise_vector(vector)
    saved = auto_eoi.save()
    assert saved == (0x40, 0xFF)
    auto_eoi.go_on()
    assert len(cpu.later) == 1, "it is being tried here already"
    other = Cpu()
    fresh = AutoEoi(other, other.submit, other)  # type: ignore[arg-type]
    fresh.go_on()
    assert (other.taken, other.later) == ([], [])
    fresh.load(saved)
    assert (fresh.waiting, other.taken) == (True, []), "held"
    fresh.go_on()
    other.tick()
    assert (other.taken, other.later, fresh.waiting) == ([0xFF, 0x40], [], False)
    fresh.raise_vector(0x50)
    assert other.taken[-1] == 0x50


@pytest.mark.parametrize("vector", [-1, 256])
def test_a_saved_vector_that_is_none_is_refused(auto_eoi: AutoEoi, vector: int) -> None:
    with pytest.raises(ValueError, match="vector"):
        auto_eoi.load((0x40, vector))


def test_an_apic_that_is_off_or_a_cpu_that_waits_for_sipi_drops_it(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    cpu.apic.regs[0xF1] = 0
    auto_eoi.raise_vector(VECTOR)
    cpu.apic.regs[0xF1] = 1
    cpu.state = KVM_MP_STATE_INIT_RECEIVED
    auto_eoi.raise_vector(VECTOR)
    assert (cpu.taken, cpu.later) == ([], [])


def test_reset_forgets_and_an_ended_thread_is_no_error(cpu: Cpu, auto_eoi: AutoEoi) -> None:
    cpu.run.if_flag = 0
    auto_eoi.raise_vector(VECTOR)
    auto_eoi.reset()
    cpu.run.if_flag = 1
    cpu.tick()
    assert (cpu.taken, cpu.later) == ([], [])
    cpu.run.if_flag = 0
    cpu.loop_ended = True
    auto_eoi.raise_vector(VECTOR)
    cpu.ended = True
    auto_eoi.raise_vector(VECTOR)
    assert cpu.taken == []
