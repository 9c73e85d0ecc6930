"""A machine saved and gone on with elsewhere: the guest cannot tell, and loses nothing."""

from __future__ import annotations

import os
import queue
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic_ns, sleep
from typing import Any

import guest_images
import pytest
from guest_agent import CHECK, DRAIN, EOM_PENDING, SCRATCH
from guest_machine import Guest, Sender

from hvkvm.abi import tlfs
from hvkvm.errors import CapabilityMissing, StateError
from hvkvm.kvm.irqfd import Irqfd
from hvkvm.kvm.saved_vcpu import SavedVcpu
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vcpu_state import tscs
from hvkvm.machine import processors
from hvkvm.machine.warm_kept import _key

SOAK = bool(os.environ.get("HVKVM_SOAK"))
SINT = 4


class Chain:
    """One guest through many machines: each is saved and closed, and the next goes on from its file."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self._file = folder / "vm"
        self._config = config
        self.guest = Guest(**self._config).start()

    def restore(self) -> Guest:
        """The machine that goes on, not started."""
        return Guest(**self._config, restore=self._file)

    def save(self, look: Callable[[], object] = lambda: None) -> Path:
        """Save it, and `look()` in the same rest: the machine goes on before this returns."""
        machine = self.guest.machine
        done: queue.SimpleQueue[str] = queue.SimpleQueue()

        def rest(go_on: Callable[[], object]) -> None:
            """Hold the machine until the save waits for its turn: it looks at names first, on a thread."""

            def hold() -> None:
                if machine.lifecycle._waiting:
                    look()
                    go_on()
                else:
                    machine.platform.io.call_later(0.001, hold)

            assert machine.parts.saver.save(self._file, lambda _size, why: done.put(why))
            hold()

        machine.platform.io.call_soon(machine.lifecycle.at_rest, rest)
        assert done.get(timeout=120) == ""
        return self._file

    def swap(self) -> Guest:
        """Save, close, and go on in another machine."""
        self.save()
        self.guest.close()
        self.guest = self.restore()
        self.guest.machine.start()
        return self.guest


@pytest.fixture(
    params=[
        pytest.param("user", marks=pytest.mark.kvm),
        pytest.param("kernel", marks=pytest.mark.hyperv),
    ]
)
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: list[Chain] = []

    def make(**config: Any) -> Chain:
        made.append(Chain(tmp_path, **{"synic": request.param, **config}))
        return made[-1]

    yield make
    for one in made:
        one.guest.close()


@pytest.mark.parametrize("cpus", [1, 4])
def test_registers_pages_and_time_go_on(chain: Any, cpus: int) -> None:
    chain = chain(cpus=cpus)
    guest = chain.guest
    guest.enlighten()
    for index in range(cpus):
        page = SCRATCH + 0x2000 * index
        guest[index].synic_on(simp=page, siefp=page + 0x1000, sints={SINT: DRAIN})
        guest[index].wrmsr(tlfs.HV_X64_MSR_CRASH_P0, 0x77)
    registers = (
        tlfs.HV_X64_MSR_GUEST_OS_ID,
        tlfs.HV_X64_MSR_HYPERCALL,
        tlfs.HV_X64_MSR_SIMP,
        tlfs.HV_X64_MSR_SIEFP,
        tlfs.HV_X64_MSR_SCONTROL,
        tlfs.HV_X64_MSR_SINT0 + SINT,
        tlfs.HV_X64_MSR_CRASH_P0,
        tlfs.HV_X64_MSR_VP_INDEX,
    )
    before = [[guest[index].rdmsr(msr) for msr in registers] for index in range(cpus)]
    guest[0].wrmsr(tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH + 0x20000 | 1)
    time = guest[0].rdmsr(tlfs.HV_X64_MSR_TIME_REF_COUNT)
    for _ in range(3):
        guest = chain.swap()
        assert [[guest[index].rdmsr(msr) for msr in registers] for index in range(cpus)] == before
        now = guest[0].rdmsr(tlfs.HV_X64_MSR_TIME_REF_COUNT)
        assert now > time, "reference time never goes back"
        time = now
    guest[0].do("POST", 0x10, 1, 0, 16)  # the hypercall page works, wherever its code is now
    for index in range(cpus):
        guest[index].expect_clean()


def test_tscs_stay_in_step_however_long_the_rest_takes(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM forgives less than a second between two: what a busy host may need for a vCPU's other state."""
    chain = chain(cpus=2)
    chain.guest.enlighten()
    original = processors.load_vcpu

    def slow(vcpu: Vcpu, saved: SavedVcpu) -> list[int]:
        sleep(1.2 * vcpu.index)
        return original(vcpu, saved)

    monkeypatch.setattr(processors, "load_vcpu", slow)
    chain.save()
    chain.guest.close()
    chain.guest = chain.restore()
    vcpus = chain.guest.machine.platform.vcpus
    first, second = tscs(vcpus)
    assert abs(second - first) < vcpus[0].tsc_khz() * 1000, "read one behind the other"


@pytest.mark.parametrize("cpus", [1, 4])
def test_messages_through_many_machines_come_once_and_in_order(chain: Any, cpus: int) -> None:
    """Saved at whatever moment: queued to the vCPU, waiting for the guest's EOM, or just taken."""
    rounds = 1000 if SOAK else 20
    chain = chain(cpus=cpus)
    guest = chain.guest
    for index in range(cpus):
        guest[index].synic_on(simp=SCRATCH + 0x1000 * index, sints={SINT: DRAIN | EOM_PENDING | CHECK})
        guest[index].idle(("HLT", "SPIN")[index % 2])
    sent = [0] * cpus
    gate = threading.Event()
    random_ = random.Random(5)
    for round_ in range(rounds):
        senders = []
        for index in range(cpus):
            sender = Sender(guest, index, SINT)
            sender.sent = sent[index]
            senders.append(sender)
            sender.send(10_000)
        gate.wait(random_.random() * 0.02)
        if round_ % 2:  # a slow host may save before any has come, so let one come in every other round

            def came(senders: list[Sender] = senders) -> bool:
                return any(sender.sent > before for sender, before in zip(senders, sent, strict=True))

            guest.until(came, "a message of this round")
        # What had not completed when it was written is not in the file: the next sender begins with that.
        chain.save(lambda: sent.__setitem__(slice(None), [sender.sent for sender in senders]))  # noqa: B023
        assert not any(sender.failed for sender in senders)
        guest.close()
        guest = chain.guest = chain.restore()
        guest.machine.start()
    for index, count in enumerate(sent):
        taken = partial(guest[index].counter, "MESSAGES", SINT)
        guest.until(lambda taken=taken, count=count: taken() >= count, "every message comes")  # type: ignore[misc]
        guest.settle()
        assert taken() == count
        guest[index].expect_clean()
    assert sum(sent) >= rounds // 2


@pytest.mark.parametrize("hv", ["passthrough", "relaxed,vpindex,runtime"])
def test_run_time_never_goes_back(chain: Any, hv: str) -> None:
    chain = chain(cpus=1, hv=hv)
    chain.guest[0].idle("SPIN")

    def run_time() -> int:
        now = int(chain.guest[0].rdmsr(tlfs.HV_X64_MSR_VP_RUNTIME))
        assert now < 1 << 40, "it is that of the vCPU's thread"
        return now

    assert run_time() <= run_time()
    chain.guest.until(lambda: run_time() > 3_000_000, "0.3 s of CPU time")
    for _ in range(2):
        before = run_time()
        chain.swap()
        assert run_time() >= before


@pytest.mark.kvm
def test_apic_timers_are_as_slow_as_they_were(tmp_path: Path) -> None:
    """`apic_bus_ns` was not saved: timers ran 20 times too fast, and a warm guest was kept for both."""
    slow = {"synic": "user", "hv": "passthrough", "apic_bus_ns": 20}
    try:
        guest = Guest(**slow).start()
    except CapabilityMissing as error:
        pytest.skip(str(error))
    assert _key(guest.machine.config) != _key(guest.machine.config._replace(apic_bus_ns=0))
    try:
        _expect_slow_apic(guest)
        guest.machine.save(tmp_path / "vm")
    finally:
        guest.close()
    guest = Guest(restore=tmp_path / "vm")
    guest.machine.start()
    try:
        _expect_slow_apic(guest)
    finally:
        guest.close()


def _expect_slow_apic(guest: Guest) -> None:
    x2apic = 0x800
    guest[0].wrmsr(0x1B, guest[0].rdmsr(0x1B) | 3 << 10)
    for register, value in ((0x3E, 0xB), (0x32, 1 << 16), (0x38, (1 << 32) - 1)):
        guest[0].wrmsr(x2apic | register, value)  # every tick, masked, from the top
    began = monotonic_ns()
    first = guest[0].rdmsr(x2apic | 0x39)
    sleep(0.1)
    counted = first - guest[0].rdmsr(x2apic | 0x39)
    assert 0 < counted * 20 <= monotonic_ns() - began


@pytest.mark.kvm
def test_input_that_came_as_it_was_saved_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM raises COM1's interrupt on a thread of its own, too late for the file where the host is busy."""
    master_pic_irr = 9
    guest = Guest(synic="user", hv="passthrough").start()
    try:
        for port, value in ((0x3FC, 0x0B), (0x3F9, 0x01)):
            guest[0].do("OUT", port, 1, value)
        monkeypatch.setattr(Irqfd, "pulse", lambda _line: None)
        guest.machine.board.serial.feed(b"x")
        guest.machine.save(tmp_path / "vm")
    finally:
        monkeypatch.undo()
        guest.close()
    guest = Guest(restore=tmp_path / "vm")
    guest.machine.start()
    try:
        vm = guest.machine.platform.vm
        guest.until(lambda: bool(bytes(vm.get_irqchip(0))[master_pic_irr] & 0x10), "COM1 interrupts")
        assert guest[0].do("IN", 0x3F8, 1).value == ord("x")
    finally:
        guest.close()


@pytest.mark.kvm
def test_a_reset_that_the_guest_waits_for_is_made_before_it_is_saved(tmp_path: Path) -> None:
    """Who went on from the file had asked for one that never came."""
    guest = Guest(synic="user", hv="passthrough").start()
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()

    def save_first() -> None:
        machine = guest.machine
        assert machine.parts.saver.save(tmp_path / "vm", lambda _size, why: heard.put(why))
        machine.request_reset("as a guest does that has not yet come to rest")

    try:
        guest.machine.platform.io.call_soon(save_first)
        assert heard.get(timeout=120) == ""
        guest.agent.await_online(2)
    finally:
        guest.close()
    guest = Guest(restore=tmp_path / "vm")
    guest.machine.start()
    try:
        guest.agent.await_online(2)
    finally:
        guest.close()


@pytest.mark.kvm
def test_a_machine_whose_folder_is_gone_is_not_saved_and_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of its files lead from there; looking for it ended the machine."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "agent").write_bytes(guest_images.image("agent").read_bytes())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(guest_images, "image", Path)
    guest = Guest(synic="user", hv="passthrough").start()
    try:
        shutil.rmtree(folder)
        for file in (tmp_path / "vm", Path("vm")):
            with pytest.raises(
                StateError, match=r"^not saved: the folder that this run was started in is gone"
            ):
                guest.machine.save(file)
        guest[0].do("RDMSR", tlfs.HV_X64_MSR_VP_INDEX)
    finally:
        guest.close()


@pytest.mark.kvm
def test_a_machine_that_has_not_started_is_not_saved(tmp_path: Path) -> None:
    """Nobody would ever carry that out."""
    guest = Guest(synic="user", hv="passthrough")
    try:
        with pytest.raises(StateError, match=r"^not saved: the machine has not been started$"):
            guest.machine.save(tmp_path / "vm")
    finally:
        guest.close()


@pytest.mark.kvm
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("nobody knows"), OSError(28, "full")])
def test_a_machine_whose_file_cannot_be_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever the writing thread raises: the machine stood still for ever, and whoever asked waited."""
    guest = Guest(synic="user", hv="passthrough").start()

    def fail(*_arguments: object) -> None:
        raise error

    try:
        with monkeypatch.context() as patched:
            patched.setattr(guest.machine.parts.saver, "_write", fail)
            with pytest.raises(StateError, match=r"^not saved: .*/vm: (MemoryError|nobody knows|full)$"):
                guest.machine.save(tmp_path / "vm")
        guest[0].do("RDMSR", tlfs.HV_X64_MSR_VP_INDEX)
        assert guest.machine.save(tmp_path / "vm") > 0
    finally:
        guest.close()
