"""A machine is described at any time of its life: who asks does not know how far it has come."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_images as ki
import pytest
from guest_machine import Guest

from hvkvm.devices.scsi import target
from hvkvm.devices.synth.netvsp_channel import NvspChannel
from hvkvm.kvm import kind
from hvkvm.machine import dump, dump_vcpu, own_files
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.dump import describe
from hvkvm.machine.kernel_log import kernel_log
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.observe.kernel_log import NoKernelLog
from hvkvm.runtime.vcpu_thread import VcpuThread

KERNEL = Path(__file__).parents[1] / "guests/warm_late.s"


@pytest.mark.kvm
@pytest.mark.parametrize("saved", [False, True])
def test_before_its_start_while_it_runs_stopped_and_closed(saved: bool, tmp_path: Path) -> None:
    guest = Guest(cpus=2, synic="user")
    machine = guest.machine
    try:
        guest.start()
        if saved:
            file = tmp_path / "saved"
            machine.save(file)
            machine.close()
            machine = Machine(MachineConfig(restore=file))
        texts = [describe(machine.parts)]
        if not saved:
            machine.stop()
        texts.append(describe(machine.parts))
    finally:
        machine.close()
    texts.append(describe(machine.parts))
    for text in texts:
        assert "vcpu1: " in text
        assert "kernel log" not in text
    assert "vcpu1: ended" in texts[-1] or saved
    stopped = texts[-2]  # of the restored one nothing ran
    assert saved or (stopped.count("rip=") == 2 and "no answer" not in stopped), "it has ended, not its vCPUs"
    with pytest.raises(NoKernelLog, match="RAM cannot be read"):
        kernel_log(machine.platform)


@pytest.mark.kvm
def test_it_tells_of_pci_and_of_wires(tmp_path: Path) -> None:
    """Where a guest of NVMe hangs, or one whose wire has gone, is to be seen there and nowhere else."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    config = MachineConfig(
        kernel=ki.assembled_pvh(KERNEL, tmp_path),
        synic="user",
        vmbus="on",
        memory=64 << 20,
        disks=(DiskSpec(str(disk), bus="nvme"),),
        nets=(NicSpec(listen=tmp_path / "wire"),),
    )
    with Machine(config) as machine:
        text = describe(machine.parts)
    print(text)
    assert "wires:" in text
    assert "received_frames 0" in text
    assert "pci:" in text
    assert "nvme" in text.partition("pci:")[2]


@pytest.mark.kvm
def test_a_save_whose_disk_stands_still_is_told_with_the_state_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest hangs, and no thread of a vCPU takes work: neither must look like a fault of theirs."""
    reached, go_on = threading.Event(), threading.Event()
    real = os.fsync

    def fsync(fd: int) -> None:
        reached.set()
        assert go_on.wait(100)
        real(fd)

    guest = Guest(cpus=2, synic="user")
    try:
        guest.start()
        monkeypatch.setattr(os, "fsync", fsync)
        saver = threading.Thread(target=guest.machine.save, args=(tmp_path / "saved",))
        saver.start()
        assert reached.wait(100)
        text = describe(guest.machine.parts)
        go_on.set()
        saver.join()
        assert (tmp_path / "saved").exists()
        guest.io_barrier()
        behind = describe(guest.machine.parts)
    finally:
        go_on.set()
        guest.close()
    assert "0 resets, at rest, for " in text.splitlines()[0]
    assert text.splitlines()[1] == f"it is being saved to {tmp_path / 'saved'}"
    assert "thread save: in fsync (machine/test_dump.py:" in text
    assert text.count("vcpu1: waiting paused") == 1
    assert text.count(" rip=") == 2, "of paused ones too"
    assert "0 resets, running" in behind.splitlines()[0]
    assert "saved to" not in behind


@pytest.mark.kvm
def test_the_io_loop_does_not_look_at_the_name_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It, or one of the machine's own files, may be on a disk that stands still."""
    reached, go_on = threading.Event(), threading.Event()

    def why_kept(*_arguments: object) -> str:
        reached.set()
        assert go_on.wait(100)
        return ""

    monkeypatch.setattr(own_files, "why_kept", why_kept)
    guest = Guest(synic="user")
    try:
        guest.start()
        saver = threading.Thread(target=guest.machine.save, args=(tmp_path / "saved",))
        saver.start()
        assert reached.wait(100)
        guest.io_barrier()
        assert "thread save: in why_kept (machine/test_dump.py:" in describe(guest.machine.parts)
        guest[0].do("NOP")
        go_on.set()
        saver.join()
    finally:
        go_on.set()
        guest.close()
    assert (tmp_path / "saved").exists()


@pytest.mark.kvm
def test_where_the_io_loop_stands_is_told() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def stands_still() -> None:
        inside.set()
        assert go_on.wait(100)

    guest = Guest(synic="user")
    try:
        guest.start()
        guest.machine.platform.io.call_soon(stands_still)
        assert inside.wait(100)
        text = describe(guest.machine.parts)
    finally:
        go_on.set()
        guest.close()
    assert "stands_still\n" in text.partition("i/o loop: running ")[2]
    assert "thread io: in stands_still (machine/test_dump.py:" in text


@pytest.mark.kvm
def test_a_vcpu_that_ended_the_run_is_told_of_when_its_thread_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end wakes who waits for it while that thread still handles the exit."""
    guest = Guest(synic="user")
    lifecycle = guest.machine.lifecycle
    real = lifecycle.finish

    def finish(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        time.sleep(0.3)  # as the host's scheduler may have it

    monkeypatch.setattr(kind, "probe", lambda: SimpleNamespace(forgets_triple_faults=False))
    monkeypatch.setattr(lifecycle, "finish", finish)
    try:
        guest.start()
        guest[0].begin("TRIPLE_FAULT")
        assert lifecycle.wait(100) is not None
        text = dump.describe_fatal(guest.machine.parts)
    finally:
        guest.close()
    assert text.startswith("vcpu0: ended; exits: ")


@pytest.mark.kvm
def test_a_vcpu_that_comes_to_rest_meanwhile_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(synic="user")
    try:
        guest.start()
        real = VcpuThread.join

        def join(thread: VcpuThread, timeout: float | None = None) -> bool:
            monkeypatch.setattr(VcpuThread, "join", real)
            pausing = threading.Thread(target=guest.machine.pause)  # as a save does, behind the look
            pausing.start()
            pausing.join()
            return real(thread, timeout)

        monkeypatch.setattr(VcpuThread, "join", join)
        lines = dump_vcpu.describe(guest.machine.platform.threads[0], 0.2)
        guest.machine.resume()
    finally:
        guest.close()
    assert any(" rip=" in line for line in lines), lines


@pytest.mark.kvm
def test_disks_and_channels_may_come_and_go_while_they_are_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    nets = (NicSpec(listen=tmp_path / "wire", queues=4),)
    disks = (DiskSpec(str(tmp_path / "disk.raw")),)
    guest = Guest(synic="user", vmbus="on", nets=nets, disks=disks)
    machine = guest.machine
    steps: list[str] = []

    def on_loop(fn: Callable[[], object]) -> None:
        if threading.current_thread() is threading.main_thread():
            done = threading.Event()
            machine.platform.io.call_soon(lambda: (fn(), done.set()))
            assert done.wait(100)

    def waiting(_channel: NvspChannel) -> int:
        if "channel" not in steps:
            steps.append("channel")
            on_loop(lambda: machine.nics.nics["net0"].device.sub_channel(1))  # type: ignore[union-attr]
        return 0

    def in_order(found: Iterable[Any], **how: Any) -> list[Any]:
        result = sorted(found, **how)
        if "disk" not in steps:
            steps.append("disk")
            on_loop(lambda: machine.disks.remove("disk0"))  # type: ignore[union-attr]
        return result

    try:
        guest.start()
        monkeypatch.setattr(NvspChannel, "waiting", property(waiting))
        monkeypatch.setattr(target, "sorted", in_order, raising=False)
        assert "net0" in describe(machine.parts)
    finally:
        guest.close()
    assert sorted(steps) == ["channel", "disk"]


@pytest.mark.kvm
def test_many_vcpus_that_do_not_answer_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    real = dump_vcpu.describe

    def note(thread: Any, seconds: float) -> list[str]:
        asked.append(seconds)
        return real(thread, 100.0 if thread.vcpu.index == 3 else seconds)

    monkeypatch.setattr(dump_vcpu, "describe", note)
    monkeypatch.setattr(dump_vcpu, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(dump, "PATIENCE_SECONDS", 0.3)
    guest = Guest(cpus=4, synic="user")
    let_go = []
    try:
        guest.start()
        let_go = [guest.hold(index) for index in (0, 1, 2)]
        text = describe(guest.machine.parts)
    finally:
        for go in let_go:
            go()
        guest.close()
    assert asked[0] == 0.2
    assert asked[2:] == [dump.LEAST_SECONDS] * 2
    assert text.count("registers: no answer from its thread") == 3
    assert text.count(" rip=") == 1, "of the one that answers"
