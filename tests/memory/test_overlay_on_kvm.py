"""S5 on a real KVM: while overlays come and go, running vCPUs see the old page or the new one, never a hole.

The guests are 16-bit real mode, written by hand. Each hammers two pages: it
checks a marker at both ends and counts a visit in the page with a locked
increment, then counts the same visit in a page that is never covered. A marker
is one byte: the promise is about pages, and a KVM that emulates a wider load
may take its bytes one by one, some from the old page and some from the new. The host
moves overlays as fast as it can. A wrong marker is a port write, a hole is an
MMIO exit, and a write that fell into neither page shows in the sums.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from hvkvm.abi.kvm import KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_MMIO
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vcpu import Vcpu
from hvkvm.kvm.vm import Vm
from hvkvm.memory.guest import GuestMemory
from hvkvm.memory.overlay import OverlayPage
from hvkvm.runtime.vcpu_thread import VcpuThread

pytestmark = pytest.mark.kvm

RAM_SIZE = 0x10000
CODE, PAGES, OWN_COUNTS = 0x1000, (0x5000, 0x6000), 0x7000
COUNT = 8
RAM_MARK, MARKS = 0x11, (0x22, 0x33)
MOVES = 4000


def hammer_code() -> bytes:
    """bp points at this vCPU's own counter; si at the page; bx at the vCPU's counter's offset in a page."""
    wrong = bytes.fromhex("e6 f4 f4")  # out 0xf4, al; hlt

    def known(load: bytes) -> bytes:
        """Load al; go on if it is any of the three marks, else report."""
        out = wrong
        for mark in reversed((RAM_MARK, *MARKS)):
            out = bytes([0x3C, mark, 0x74, len(out)]) + out  # cmp al, mark; je past what follows
        return load + out

    visit = known(bytes.fromhex("8a 04"))  # mov al, [si]
    visit += known(bytes.fromhex("8a 84 ff 0f"))  # mov al, [si+0xfff]
    visit += bytes.fromhex("f0 66 ff 00")  # lock inc dword [bx+si]
    visit += bytes.fromhex("f0 66 ff 46 00")  # lock inc dword [bp+0]
    body = b"".join(b"\xbe" + page.to_bytes(2, "little") + visit for page in PAGES)  # mov si, page
    return body + b"\xe9" + (-(len(body) + 3) & 0xFFFF).to_bytes(2, "little")  # jmp start


class Guest:
    """A VM without an interrupt chip, so that each vCPU runs from the start."""

    def __init__(self, kvm: Kvm, stack: ExitStack) -> None:
        self.vm: Vm = stack.enter_context(kvm.create_vm())
        self.vm.set_tss_addr(0xFFFBD000)
        self.memory = stack.enter_context(GuestMemory(self.vm, RAM_SIZE))
        self.stack = stack
        self.bad: list[str] = []

    def vcpu(self, index: int, **registers: int) -> Vcpu:
        vcpu = self.vm.create_vcpu(index)
        sregs = vcpu.sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.regs()
        regs.rip, regs.rflags, regs.rsp = CODE, 2, 0x4000
        for name, value in registers.items():
            setattr(regs, name, value)
        vcpu.set_regs(regs)
        return vcpu

    def run(self, vcpus: list[Vcpu]) -> list[VcpuThread]:
        def report(text: str) -> None:
            self.bad.append(text)
            for thread in threads:
                thread.stop()

        def mmio(vcpu: Vcpu) -> None:
            report(f"vCPU {vcpu.index} fell into a hole at {vcpu.run.mmio.phys_addr:#x}")

        def wrong(vcpu: Vcpu) -> None:
            regs = vcpu.regs()
            report(f"vCPU {vcpu.index} read a wrong marker: {regs.rax & 0xFF:#x} at {regs.rsi:#x}")

        threads = [
            VcpuThread(
                vcpu,
                {KVM_EXIT_MMIO: mmio, KVM_EXIT_IO: wrong},
                on_fault=lambda thread, error: report(f"{thread.name}: {error!r}"),
            )
            for vcpu in vcpus
        ]
        for thread in threads:
            self.stack.callback(thread.join, 100)
            self.stack.callback(thread.stop)
            thread.start()
        return threads


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Guest]:
    with ExitStack() as stack:
        yield Guest(kvm, stack)


def mark(page: OverlayPage, value: int) -> None:
    page.view[0] = page.view[0xFFF] = value


@pytest.mark.parametrize("vcpu_count", [1, 2])
def test_s5_running_vcpus_never_see_a_hole_nor_lose_a_write(guest: Guest, vcpu_count: int) -> None:
    memory = guest.memory
    memory.write(CODE, hammer_code())
    for gpa in PAGES:
        memory.write(gpa, bytes([RAM_MARK]))
        memory.write(gpa + 0xFFF, bytes([RAM_MARK]))
    overlays = [guest.stack.enter_context(OverlayPage(memory)) for _ in MARKS]
    for overlay, value in zip(overlays, MARKS, strict=True):
        mark(overlay, value)
    offsets = [COUNT + 64 * i for i in range(vcpu_count)]
    vcpus = [guest.vcpu(i, rbx=at, rbp=OWN_COUNTS + at) for i, at in enumerate(offsets)]
    threads = guest.run(vcpus)
    choose = random.Random(5)

    def seen(at: int) -> tuple[list[int], list[int]]:
        in_overlays = [int.from_bytes(overlay.view[at : at + 4], "little") for overlay in overlays]
        return [memory.read_u32(gpa + at) for gpa in PAGES], in_overlays

    # On a busy machine a vCPU may sleep through many moves: go on until each has met every page.
    for move in range(100 * MOVES):
        if move >= MOVES and move % 50 == 0:
            for overlay in overlays:
                overlay.place(None)
            if all(all(map(all, seen(at))) for at in offsets):
                break
        overlay = choose.choice(overlays)
        assert overlay.place(choose.choice((None, *PAGES)))
        if guest.bad:
            break
    for overlay in overlays:
        overlay.place(None)
    for thread in threads:
        thread.stop()
        assert thread.join(100)
    assert not guest.bad
    for at in offsets:
        in_ram, in_overlays = seen(at)
        own = memory.read_u32(OWN_COUNTS + at)
        # Stopped between its two increments, a vCPU is one ahead in the page.
        assert own <= sum(in_ram) + sum(in_overlays) <= own + 1
        assert all(in_ram)
        assert all(in_overlays), "the guest never met one of the overlays: nothing was proved"


READ_AND_TELL = bytes.fromhex("a0 00 00 e6 f4 eb f9")  # again: mov al, [0]; out 0xf4, al; jmp again


def test_s6_a_page_outside_ram_is_memory_while_it_is_placed(guest: Guest) -> None:
    """With a stack of two there, and MMIO before and after."""
    guest.memory.write(CODE, READ_AND_TELL)
    vcpu = guest.vcpu(0)
    sregs = vcpu.sregs()
    sregs.ds.base, sregs.ds.selector = 0x20000, 0x2000
    vcpu.set_sregs(sregs)

    def reads() -> int | None:
        """What the guest reads next; None if that is MMIO (answered with 0xee)."""
        hole = False
        while True:
            reason = vcpu.enter()
            if reason == KVM_EXIT_IO:
                value = vcpu.io_data(vcpu.run.io.data_offset, 1)[0]
                return None if hole else int(value)
            assert reason == KVM_EXIT_MMIO
            assert (vcpu.run.mmio.phys_addr, vcpu.run.mmio.len) == (0x20000, 1)
            vcpu.run.mmio.data[0] = 0xEE
            hole = True

    first, second = (guest.stack.enter_context(OverlayPage(guest.memory)) for _ in range(2))
    first.view[0], second.view[0] = 1, 2
    for _ in range(20):
        assert reads() is None
        assert first.place(0x20000)
        assert reads() == 1
        assert second.place(0x20000)
        assert reads() == 2
        second.view[0] = 3
        assert reads() == 3
        second.view[0] = 2
        assert first.place(0x5000)
        assert reads() == 2
        assert second.place(None)
        assert reads() is None
        assert first.place(None)


def test_s6_kvm_refuses_addresses_past_its_limits_and_nothing_breaks(guest: Guest) -> None:
    guest.memory.write(CODE, b"\xf4")
    vcpu = guest.vcpu(0)
    with OverlayPage(guest.memory) as page:
        assert page.place((1 << 64) - 4096) is False
        assert page.gpa is None
        assert page.place(0x2000)
    assert vcpu.enter() == KVM_EXIT_HLT


def test_the_instructions_of_a_covered_page_change_too(guest: Guest) -> None:
    """Not data alone: code runs from the overlay while it lies there, and from RAM after."""
    halt, tell = b"\xf4", bytes.fromhex("e6 f4 f4")
    guest.memory.write(CODE, halt)
    vcpu = guest.vcpu(0)
    page = guest.stack.enter_context(OverlayPage(guest.memory))
    page.view[: len(tell)] = tell

    def restart() -> int:
        regs = vcpu.regs()
        regs.rip = CODE
        vcpu.set_regs(regs)
        return vcpu.enter()

    for _ in range(50):
        assert restart() == KVM_EXIT_HLT
        page.place(CODE)
        assert restart() == KVM_EXIT_IO
        vcpu.complete_exit()
        vcpu.run.immediate_exit = 0
        page.place(None)


def test_as_many_pages_lie_outside_ram_as_kvm_has_slots_for(kvm: Kvm) -> None:
    """Two a VP of 254, and those of the interface: more than the 509 slots that old kernels had."""
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm())
        memory = stack.enter_context(GuestMemory(vm, RAM_SIZE))
        wanted = min(520, vm.memory_slots - 1)
        placed = 0
        for number in range(wanted):
            page = stack.enter_context(OverlayPage(memory))
            placed += page.place(0xD000_0000 + number * 0x1000)
        assert placed == wanted
        assert vm.memory_slots >= 509
