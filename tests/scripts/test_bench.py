"""The benchmark's parts: its guest runs, its lines and smaps are read right. Nothing here is timed."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import pytest
from guest_artifacts import artifact

PROJECT = Path(__file__).resolve().parent.parent.parent
if str(PROJECT / "scripts") not in sys.path:
    sys.path.append(str(PROJECT / "scripts"))

from steps import (  # noqa: E402
    bench_console,
    bench_count,
    bench_firmware,
    bench_guest,
    bench_measure,
    bench_network,
    bench_storage,
    bench_synics,
    bench_table,
    bench_vmbus,
    bench_vmm,
    bench_warm,
)
from steps.bench_vmm import Memory  # noqa: E402
from steps.distribution import StepError  # noqa: E402

SMAPS = """\
00400000-00500000 r-xp 00000000 08:01 1234 /usr/bin/vmm
Rss:                 100 kB
Private_Clean:        40 kB
Private_Dirty:         0 kB
7f0000000000-7f0020000000 rw-s 00000000 00:01 99 /memfd:hvkvm-ram (deleted)
Rss:                5000 kB
Private_Dirty:      5000 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0
Rss:                   8 kB
Private_Dirty:         8 kB
VmFlags: rd wr mr mw me ac sd
"""


def test_pss_and_what_a_copy_wrote_are_read_from_smaps() -> None:
    smaps = (
        SMAPS.replace("Rss:", "Pss:")
        .replace("Private_Dirty:", "Anonymous:")
        .replace("/memfd:hvkvm-ram (deleted)", "/tmp/warm")
    )
    assert bench_warm.kilobytes(smaps.splitlines(keepends=True), "/tmp/warm") == (5108, 5000)
    assert bench_warm.kilobytes(smaps.splitlines(keepends=True), "/tmp/other") == (5108, 0)


def lines_of(kernel: Path, hv: str, devices: tuple[str, ...] = (), synic: str = "auto") -> list[str]:
    """Run the benchmark guest here and return what it said."""
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.machine import Machine

    said = bytearray()
    done = threading.Event()

    def sink(data: bytes) -> None:
        said.extend(data)
        if bench_guest.DONE.encode() in said or b"no SynIC" in said:
            done.set()

    config = MachineConfig(kernel=kernel, memory=64 << 20, hv=hv, devices=devices, synic=synic)  # type: ignore[arg-type]
    with Machine(config) as machine:
        machine.board.attach_sink(sink)
        machine.start()
        done.wait(60)
    return said.decode().splitlines()


@pytest.mark.kvm
def test_the_guest_measures_port_exits_on_any_kvm() -> None:
    batches = bench_guest.parse(lines_of(bench_guest.image("port", 20, 3), "none"))
    assert [batch.operations for batch in batches] == [20, 20, 20]
    assert all(batch.tsc > 0 and batch.reference == 0 for batch in batches)


@pytest.mark.kvm
def test_the_guest_says_so_where_there_is_no_synic() -> None:
    with pytest.raises(StepError, match="no SynIC"):
        bench_guest.parse(lines_of(bench_guest.image("message", 20, 3), "none"))


@pytest.mark.parametrize(
    "synic", [pytest.param("user", marks=pytest.mark.kvm), pytest.param("kernel", marks=pytest.mark.hyperv)]
)
@pytest.mark.parametrize("operation", ["message", "event"])
def test_the_guest_gets_its_answers(operation: str, synic: str) -> None:
    kernel = bench_guest.image(operation, 20, 3)
    batches = bench_guest.parse(lines_of(kernel, "host-model", ("hyperv-testdev",), synic))
    assert [batch.operations for batch in batches] == [20, 20, 20]
    assert all(batch.reference > 0 for batch in batches)


def test_lines_are_read() -> None:
    said = ["noise", "bench: 0000000a 00000064 00000032 00000001 ", "bench: done"]
    (batch,) = bench_guest.parse(said)
    assert batch == (10, 100, 50, 1)
    assert batch.nanoseconds(1e9) == 500
    assert batch._replace(reference=0).nanoseconds(1e9) == 10
    with pytest.raises(StepError, match="status"):
        bench_guest.parse(["bench: broken, hypercall status 0000000000000005"])


def test_smaps_leave_the_guest_s_ram_out() -> None:
    assert bench_vmm.parse_smaps(SMAPS) == Memory(rss=108, private=48, ram=5000)
    qemu = SMAPS.replace("hvkvm-ram", "memory-backend-memfd")
    assert bench_vmm.parse_smaps(qemu) == Memory(rss=108, private=48, ram=5000)


def test_both_vmms_get_the_same_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_vmm, "_qemu", lambda: "qemu")
    guest = bench_vmm.Guest(Path("k"), Path("i"), "quiet", memory=64)
    for vmm in ("hvkvm", "hvkvm-user", "qemu-q35", "qemu-microvm"):
        words = bench_vmm.command_line(vmm, guest)
        assert {"k", "i", "quiet", "64M"} <= set(words), words


def test_the_table_says_which_is_better() -> None:
    def boot(ms: int) -> bench_measure.Boot:
        return bench_measure.Boot(ms / 1000, Memory(2048, 1024, 4096), ms / 2000)

    found = {"hvkvm": [boot(100), boot(300), boot(200)], "qemu-q35": [boot(400)]}
    rows = bench_table.boot_rows(found, "hvkvm")
    assert (rows[0].hvkvm, rows[0].peer, rows[0].ratio) == (pytest.approx(200), pytest.approx(400), 0.5)
    shown = bench_table.table([*rows, bench_table.Row("x", "u", None, 3, peer_name="q")])
    assert "0.50  better" in shown
    assert shown.splitlines()[-1].split() == ["x", "[u]", "-", "3.00", "q"]


def test_counts_are_shown_by_what_they_mean() -> None:
    assert "eventfds signalled" in bench_count.text({"eventfd writes": 2.0})


@pytest.mark.kvm
@pytest.mark.parametrize("operation", ["message", "event"])
def test_work_is_counted_on_the_synic_asked_for(operation: str) -> None:
    # Less what an idle guest costs, which differs by a few exits from run to run: a little may be missing.
    found = bench_count.count(operation, "user")
    assert found["exits"] > 0.9
    assert found["eventfd reads"] < 0.5, "a doorbell that somebody reads"
    assert (found["copies into the guest"] > 0.9) == (operation == "message")


def test_synics_stand_side_by_side_and_a_failed_run_is_told_not_counted() -> None:
    told: list[str] = []
    values = {"kernel": iter([1.0, 2.0, 9.0]), "user": iter([5.0])}

    def once(synic: str) -> bench_synics.Figures:
        try:
            return {("beat", "us"): (next(values[synic]), "less")}
        except StopIteration:
            raise StepError("it hangs") from None

    (row,) = bench_synics._rows("x", ("hvkvm", "hvkvm-user"), 3, told.append, once)
    assert row == bench_table.Row("beat", "us", 2.0, 5.0, "less", "hvkvm-user")
    assert sum("it hangs" in line for line in told) == 2
    (row,) = bench_synics._rows("x", ("hvkvm-user",), 1, told.append, lambda s: {("beat", "us"): (3.0, "")})
    assert (row.hvkvm, row.peer, row.ratio) == (None, 3.0, None)


def test_costs_are_given_for_one_operation() -> None:
    costs = bench_vmbus.Costs(100, 400, 50, 0).less(bench_vmbus.Costs(40, 40, 20, 0))
    found = bench_vmbus._cost_rows("beat", costs, 60, "/op")
    assert [value for value, _ in found.values()] == [1, 6, 0.5, 0]


@pytest.mark.hyperv
@pytest.mark.timeout(1200)
def test_a_stock_linux_is_measured_on_its_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("BEATS", 5), ("ECHOES", 5)):
        monkeypatch.setattr(bench_vmbus, name, small)
    found = bench_vmbus.measure("kernel", stream=1 << 20, connects=3)
    assert found.offers > 0
    assert len(found.beats) == len(found.echoes) == 5
    assert found.beat_costs.signals >= 5
    assert found.connect_costs.messages >= 3 * 4, "a request, an offer, an open and its end for each"


def test_console_lines_are_timed_by_the_guests_uptime() -> None:
    said = ["hvkvm: init 2.20", "2.50 0.00", *["line"] * bench_console.LINES, "6.50 0.10", "9.00 0.00"]
    assert bench_console.milliseconds_a_line(said) == 4.0


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["2.50 0.00", "line", "6.50 0.10"], "1 lines of 1000 came"),
        (["2.50 0.00", *["line"] * bench_console.LINES], "ended before its last line"),
        ([], "ended before its last line"),
    ],
)
def test_console_lines_that_are_missing_are_no_figure(said: list[str], why: str) -> None:
    with pytest.raises(StepError, match=why):
        bench_console.milliseconds_a_line(said)


def test_disks_are_compared_step_by_step() -> None:
    """A row for each step and peer, and what the guest runs has a mark for each."""
    steps = [bench_storage.Step(100.0, 1e6, 50, 2.0) for _ in bench_storage.STEPS]
    slower = [step._replace(requests=50.0, bytes=5e5, exits=None) for step in steps]
    rows = bench_storage.rows_of({"hvkvm": steps, "virtio-blk": slower, "virtio-scsi": steps})
    assert len(rows) == 4 * len(bench_storage.STEPS)
    assert {row.ratio for row in rows if row.peer_name == "virtio-blk"} == {2.0, None}
    assert all(row.better == ("" if row.unit == "/op" else "more") for row in rows)
    assert bench_storage.script(10).count("echo step") == len(bench_storage.STEPS) + 1


def test_networks_are_compared_step_by_step() -> None:
    """A rate, exits and the VMM's calls for each step, streams in bytes and the others in trips."""
    names = [*bench_network.STEPS, *(step + bench_network.PLAIN for step in bench_network.STREAMS)]
    mine = dict.fromkeys(names, bench_network.Step(2e6, 3.0, None))
    its = dict.fromkeys(names, bench_network.Step(1e6, 2.0, 5.0))
    rows = bench_network.rows_of({"hvkvm": mine, "virtio-net": its})
    assert len(rows) == 3 * len(names)
    assert {row.ratio for row in rows} == {2.0, 1.5, None}
    assert {row.unit for row in rows if row.better} == {"MB/s", "1/s"}
    for vmm, words in (("hvkvm", "--net tap=t"), ("qemu-q35", "ifname=t,script=no,downscript=no,vhost=off")):
        assert words in " ".join(bench_vmm.command_line(vmm, bench_vmm.Guest(Path("k"), tap="t")))
    for vmm, words in (("hvkvm", "--net user"), ("qemu-q35", "-netdev user -device virtio-net-pci,netdev=n")):
        assert words in " ".join(bench_vmm.command_line(vmm, bench_vmm.Guest(Path("k"), net="user")))
    assert bench_network.rows_of({}) == []  # no passt


def test_each_vmm_gets_the_disk() -> None:
    for bus, words in (("nvme", "d.raw,bus=nvme"), ("virtio", "d.raw,bus=virtio")):
        line = bench_vmm.command_line("hvkvm", bench_vmm.Guest(Path("k"), disk=Path("d.raw"), disk_bus=bus))
        assert words in line
        assert "--vmbus" not in line
    guest = bench_vmm.Guest(Path("k"), disk=Path("d.raw"), qemu_disk="virtio-scsi")
    assert "--disk d.raw" in " ".join(bench_vmm.command_line("hvkvm", guest))
    if shutil.which("qemu-system-x86_64"):
        words = " ".join(bench_vmm.command_line("qemu-q35", guest))
        assert "file=d.raw" in words
        assert "virtio-scsi-pci -device scsi-hd,drive=d" in words
        assert "nvme,serial=1,drive=d" in bench_vmm.command_line("qemu-q35", guest._replace(qemu_disk="nvme"))


@pytest.mark.kvm
@pytest.mark.parametrize("vmm", ["hvkvm", "qemu-pc"])
def test_firmware_is_started_under_both(vmm: str, tmp_path: Path) -> None:
    """U-Boot, which any KVM runs, to the line that says how much memory it found."""
    if vmm != "hvkvm" and shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    started = bench_firmware.once(vmm, artifact("HVKVM_GUEST_U_BOOT"), tmp_path, "DRAM:")
    assert started.seconds > 0
