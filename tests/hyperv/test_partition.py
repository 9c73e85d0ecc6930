"""The facade: parts are wired, signal paths chosen, resets and ends complete."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_kvm import FakeThread, FakeVcpu, FakeVm, ManualReaders
from fake_synic import FakeLoop, FakeSynic, Recorder

from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.kvm import KVM_CAP_HYPERV_EVENTFD, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC
from hvkvm.abi.tlfs import HV_X64_MSR_SIMP, HvStatus
from hvkvm.errors import CapabilityMissing, HvkvmError, RouteError
from hvkvm.events import Warned
from hvkvm.hyperv.cpuid import reset_msrs
from hvkvm.hyperv.features import FeatureSet
from hvkvm.hyperv.partition import Partition
from hvkvm.kvm.gsi import GsiTable
from hvkvm.memory.guest import GuestMemory
from hvkvm.observe.bus_text import synic_lines

FEATURES = FeatureSet(("vpindex", "synic"))


class Machine:
    """What a partition is made of, and its guest's hypercalls and MSR writes."""

    def __init__(self, **options: Any) -> None:
        self.vm = FakeVm()
        self.gsi = GsiTable(self.vm)
        self.memory = GuestMemory(self.vm, 4 << 20)
        self.io = ManualReaders()
        self.threads = [FakeThread(FakeVcpu(self.vm, index)) for index in range(2)]
        self.observer = Recorder()
        self.options = options
        if options.pop("no_eventfd", False):
            self.vm.caps[KVM_CAP_HYPERV_EVENTFD] = 0

    def build(self) -> Partition:
        self.partition = Partition(
            self.vm,  # type: ignore[arg-type]
            self.gsi,
            self.memory,
            self.io,
            self.threads,  # type: ignore[arg-type]
            features=FEATURES,
            observer=self.observer,
            **self.options,
        )
        return self.partition

    def hypercall(self, control: int, param: int) -> int:
        vcpu = self.threads[0].vcpu
        vcpu.run.hyperv.type = KVM_EXIT_HYPERV_HCALL
        vcpu.run.hyperv.u.hcall.input, vcpu.run.hyperv.u.hcall.params[0] = control, param
        self.partition.handle_hyperv_exit(vcpu)  # type: ignore[arg-type]
        return int(vcpu.run.hyperv.u.hcall.result)

    def synic_on(self, index: int, evt_page: int, msg_page: int) -> None:
        vcpu = self.threads[index].vcpu
        vcpu.run.hyperv.type = KVM_EXIT_HYPERV_SYNIC
        synic = vcpu.run.hyperv.u.synic
        synic.msr, synic.control, synic.evt_page, synic.msg_page = HV_X64_MSR_SIMP, 1, evt_page, msg_page
        self.partition.handle_hyperv_exit(vcpu)  # type: ignore[arg-type]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    machine.build().activate()
    yield machine
    machine.partition.close()
    machine.memory.close()


def test_a_message_goes_from_guest_to_guest_through_every_part(machine: Machine) -> None:
    """What hyperv_testdev does: echo what comes on connection 0x10 to the sender's own SINT."""
    statuses: list[int] = []
    route = machine.partition.open_route(0, 5, statuses.append)

    def echo(message: hv_post_message_input) -> int:
        return -route.post(message.message_type, bytes(message.payload)[: message.payload_size])

    assert machine.partition.connections.add_message(0x10, echo) == 0
    machine.synic_on(0, 0x20001, 0x30001)
    request = hv_post_message_input(connection_id=0x10, message_type=0x77, payload_size=4)
    request.payload[:4] = [1, 2, 3, 4]
    machine.memory.write(0x1000, bytes(request))
    assert machine.hypercall(0x5C, 0x1000) == HvStatus.SUCCESS
    machine.threads[0].run()
    machine.io.run()
    assert statuses == [0]
    slot = machine.memory.read(0x30000 + 5 * 256, 24)
    assert slot[:6] == bytes.fromhex("770000000400")
    assert slot[16:24] == bytes([1, 2, 3, 4, 0, 0, 0, 0])


def test_an_event_goes_from_guest_to_guest_through_every_part(machine: Machine) -> None:
    route = machine.partition.open_route(1, 8)
    machine.synic_on(1, 0x20001, 0x30001)
    results: list[int] = []
    assert (
        machine.partition.connections.add_event(0x20, lambda: results.append(route.set_event_flag(0x20))) == 0
    )
    assert machine.hypercall(0x1005D, 0x20) == HvStatus.SUCCESS
    machine.io.run()
    assert results == [0]
    assert machine.memory.read_u64(0x20000 + 8 * 256) == 1 << 0x20


def test_s42_auto_takes_kvms_signal_path_and_user_does_not() -> None:
    for choice, expected in (("auto", True), ("kernel", True), ("user", False)):
        machine = Machine(signal_path=choice)
        partition = machine.build()
        partition.connections.add_event(1, lambda: None)
        assert (1 in machine.vm.connections) == expected
        partition.close()
        assert machine.vm.connections == {}
        machine.memory.close()


def test_s42_without_the_capability_auto_falls_back_and_kernel_is_an_error(
    open_fds: Callable[[], int],
) -> None:
    machine = Machine(no_eventfd=True)
    connections = machine.build().connections
    assert machine.observer.events == []  # nobody has asked for one yet
    for number in range(1, 4):
        assert connections.add_event(number, lambda: None) == 0
    assert machine.hypercall(0x1005D, 1) == HvStatus.SUCCESS
    (warned,) = machine.observer.events
    assert isinstance(warned, Warned)
    assert warned.subject == "signal-path"
    assert "KVM_CAP_HYPERV_EVENTFD" in warned.text
    machine.partition.close()
    machine.options["signal_path"] = "user"  # chosen, so that nothing falls back
    machine.build().connections.add_event(1, lambda: None)
    machine.partition.close()
    assert len(machine.observer.events) == 1
    machine.options["signal_path"] = "kernel"
    fds = open_fds()
    with pytest.raises(CapabilityMissing, match=r"--signal-path kernel.*KVM_CAP_HYPERV_EVENTFD.*user"):
        machine.build()
    assert open_fds() == fds
    machine.memory.close()


def test_s45_strict_alignment_reaches_the_hypercalls() -> None:
    machine = Machine(strict_alignment=True)
    machine.build()
    machine.memory.zero(0x1000, 512)
    assert machine.hypercall(0x5C, 0x1004) == HvStatus.INVALID_ALIGNMENT
    machine.partition.close()
    machine.memory.close()


def test_s7_reset_goes_from_routes_to_pages_to_msrs_and_connections_stay(machine: Machine) -> None:
    statuses: list[int] = []
    route = machine.partition.open_route(0, 2, statuses.append)
    machine.partition.connections.add_message(1, lambda message: 0)
    machine.synic_on(0, 0x20001, 0x30001)
    route.post(1, b"late")
    for thread in machine.threads:
        thread.vcpu.msrs.clear()
    machine.partition.reset()
    assert [e.subject for e in machine.observer.events if isinstance(e, Warned)] == ["sint-route"]
    assert machine.threads[0].vcpu.msrs == reset_msrs(FEATURES, 0)
    assert machine.threads[1].vcpu.msrs == reset_msrs(FEATURES, 1)
    assert machine.memory.read(0x30000, 4096) == bytes(4096)
    machine.synic_on(0, 0x20001, 0x30001)
    machine.threads[0].run()
    machine.io.run()
    assert statuses == [-errno.ECANCELED]
    assert machine.memory.read(0x30000, 4096) == bytes(4096)
    assert machine.gsi.gsis() == []
    assert machine.partition.connections.post(hv_post_message_input(connection_id=1)) == 0
    assert machine.partition.open_route(0, 2).pulse() == 0


def test_closing_leaves_no_fd_no_gsi_and_no_slot(open_fds: Callable[[], int]) -> None:
    machine = Machine()
    fds = open_fds()
    partition = machine.build()
    partition.activate()
    route = partition.open_route(0, 2, lambda status: None)
    partition.open_route(0, 2)
    partition.connections.add_event(1, lambda: None)
    partition.connections.add_message(1, lambda message: 0)
    machine.synic_on(0, 0xE0000001, 0x30001)
    machine.memory.write_u32(0x30000 + 512, 1)
    route.post(1, b"never delivered")
    machine.threads[0].run()
    text = synic_lines(partition.snapshot())
    assert text[0].startswith("synic: vp 0: on, message page ")
    assert text[2].startswith("synic: vp 0, sint 2, routes 2, holders 2, ")
    assert "synic:   event: 0x1 KVM" in text
    partition.close()
    partition.close()
    assert open_fds() == fds
    assert machine.gsi.gsis() == []
    assert ("slot", 0xE0000000, 0) in machine.vm.log
    connections = {"message": [], "running": [], "event": {}}
    assert partition.snapshot() == {"vps": [], "routes": [], "connections": connections}
    with pytest.raises(RouteError):
        partition.open_route(0, 2)
    machine.memory.close()


def test_another_synic_fits_below_unchanged() -> None:
    machine = Machine()
    loop = FakeLoop()
    synic = FakeSynic(loop, 2, machine.observer)
    machine.options["synic"] = synic
    partition = machine.build()
    partition.activate()
    assert synic.activated
    assert machine.vm.log == [("slot", 0, 4 << 20)]
    assert partition.open_route(1, 3).pulse() == 0
    assert partition.hypercalls.call(0x1005D, 1) == HvStatus.INVALID_CONNECTION_ID
    with pytest.raises(HvkvmError, match="not KVM's"):
        partition.handle_hyperv_exit(machine.threads[0].vcpu)  # type: ignore[arg-type]
    partition.reset()
    partition.close()
    assert synic.closed
    assert synic.open_lines() == 0
    machine.memory.close()
