"""PCI, firmware and NVMe by real exits, with guests of a few instructions: on any KVM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import guest_images
import pytest
from guest_machine import Guest
from nvme_driver import ADMIN_CQ, DATA, EVENTS, SHADOW, Driver
from pci_driver import BAR
from png_files import pixels_of
from running_vm import running_vm

from hvkvm.abi import nvme, pci
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec
from hvkvm.machine.dump import describe
from hvkvm.machine.inspect import inspect
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

pytestmark = pytest.mark.kvm

ROM = Path(__file__).parents[1] / "guests/rom.s"
NV_DATA = UUID("fff12b8d-7696-4c8b-a985-2747075b4f50").bytes_le
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(1 * MIB))
    return path


@pytest.fixture
def rom(tmp_path: Path) -> Path:
    """The image of `rom.s`."""
    subprocess.run(["as", "--32", "-I", ROM.parent, "-o", tmp_path / "rom.o", ROM], check=True)
    rom = tmp_path / "rom"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(tmp_path / "rom.o"), str(rom)], check=True)
    return rom


def test_firmware_starts_at_the_reset_vector_and_finds_the_board(rom: Path, disk: Path) -> None:
    """Twice, with a reset in between; each letter is something that the ROM found as it must be."""
    printed = bytearray()
    disks = (DiskSpec(str(disk)),)
    with Machine(
        MachineConfig(firmware=rom, hv="none", memory=64 * MIB, disks=disks, timeout=100)
    ) as machine:
        machine.board.attach_sink(printed.extend)
        outcome = machine.run()
        assert (bytes(printed), outcome.ending, machine.resets) == (b"RPSETBNUWD" * 2, Ending.POWERED_OFF, 1)
        assert describe(machine.parts).startswith(f"hvkvm: firmware {rom} after ")


def with_variables(rom: Path) -> bytes:
    """Put a firmware volume for variables, which is returned, in front of its code."""
    head = bytes(16) + NV_DATA + (0x2000).to_bytes(8, "little") + b"_FVH"
    template = head.ljust(0x2000, b"\xff")
    rom.write_bytes(template + rom.read_bytes())
    return template


@pytest.mark.parametrize("medium", ["disk", "readonly", "cdrom"])
def test_beside_a_read_only_medium_variables_are_in_a_flash(rom: Path, disk: Path, medium: str) -> None:
    """Else OVMF tries to write them to the medium, and its FAT driver then finds no boot loader there."""
    with_variables(rom)
    media: dict[str, Any] = {"disks": (DiskSpec(str(disk), readonly=medium == "readonly"),)}
    if medium == "cdrom":
        media = {"cdroms": (CdromSpec(str(disk)),)}
    printed = bytearray()
    with Machine(MachineConfig(firmware=rom, hv="none", memory=64 * MIB, timeout=100, **media)) as machine:
        machine.board.attach_sink(printed.extend)
        assert machine.run().ending is Ending.POWERED_OFF
    assert bytes(printed) == (b"RPSETBNUWD-" if medium == "disk" else b"RPSETBNUWDF") * 2


def test_the_command_keeps_variables(rom: Path, disk: Path, tmp_path: Path) -> None:
    template = with_variables(rom)
    variables = tmp_path / "vars"
    words = ["run", "--quiet", "--firmware", str(rom), "--firmware-vars", str(variables)]
    words += ["--disk", f"{disk},snapshot=on", "--hv", "none", "--memory", "64M", "--timeout", "100"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "hvkvm", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert (done.stdout, done.stderr, done.returncode) == (b"RPSETBNUWDF" * 2, b"", 0)
        assert variables.read_bytes() == template[:0x1000] + b"\x5a" + template[0x1001:]
    with running_vm(tmp_path, *words[1:], "--display", "ramfb") as vm:
        vm.wait_for("RPSETBNUWDFV")
        done = subprocess.run([sys.executable, "-m", "hvkvm", *words], capture_output=True, check=False)
        why = f"hvkvm: --firmware-vars {variables}: in use by another machine; give each a file of its own\n"
        assert (done.stderr.decode(), done.returncode) == (why, 2)
        saved = tmp_path / "saved"
        vm.ctl("save", "--end", saved)
        vm.finish()
    # What is saved has the variables, and whoever goes on from it keeps them in a file of its own.
    own = tmp_path / "own-vars"
    with running_vm(tmp_path, "--quiet", "--restore", saved) as vm:
        assert vm.finish() == 2
        assert "--firmware-vars must be given as it was when saved" in vm.error_text
    with running_vm(tmp_path, "--quiet", "--restore", saved, "--firmware-vars", own) as vm:
        vm.wait_until_listening()
        vm.ctl("quit")
        vm.finish()
    assert own.read_bytes() == variables.read_bytes()


def test_a_framebuffer_is_seen_by_ctl(rom: Path, disk: Path, tmp_path: Path) -> None:
    words = ["--quiet", "--firmware", rom, "--disk", disk, "--hv", "none", "--memory", "64M", "--display"]
    picture = tmp_path / "screen.png"
    with running_vm(tmp_path, *words, "ramfb") as vm:
        vm.wait_for("RPSETBNUWDV" * 2)
        assert vm.ctl("screenshot", picture) == f"2 x 2 pixels in {picture}\n"
        assert "this VM has it as --disk, " in vm.ctl("screenshot", disk, status=1)
        assert vm.ctl("list").endswith(f"  firmware {rom}\n")
        shown = 2, 2, bytes.fromhex("112233 445566 000000 ffffff")
        assert pixels_of(picture.read_bytes()) == shown
        assert "nowhere" in vm.ctl("screenshot", tmp_path / "nowhere" / "x.png", status=1)
        saved = tmp_path / "saved"
        vm.ctl("save", "--end", saved)
        vm.finish()
    picture.unlink()
    with running_vm(tmp_path, "--quiet", "--restore", saved) as vm:
        vm.wait_until_listening()
        vm.ctl("screenshot", picture)
        assert pixels_of(picture.read_bytes()) == shown
        vm.ctl("quit")
    with running_vm(tmp_path, *words, "none") as vm:
        assert vm.finish() == 0
        assert vm.text == "RPSETBNUWD" * 2


def exits(guest: Guest) -> int:
    return guest.machine.exit_counts().get("KVM_EXIT_MMIO", 0)


@pytest.fixture
def boot(boot_agent: Callable[..., Guest], disk: Path) -> Callable[..., Guest]:
    def boot(**more: Any) -> Guest:
        return boot_agent(hv="none", synic="auto", disks=(DiskSpec(str(disk), bus="nvme"),), **more)

    return boot


def test_doorbells_in_memory_make_no_exits(boot: Callable[..., Guest], disk: Path) -> None:
    driver = Driver(boot())
    driver.enable()
    driver.make_queues()
    content = disk.read_bytes()
    assert driver.read(8) == content[4096:8192]
    memory = driver.guest.machine.memory
    assert driver.do(0, nvme.NVME_ADMIN_DBBUF, prp1=SHADOW, prp2=EVENTS) == 0
    before = exits(driver.guest)
    for round_ in range(20):
        sector = 8 * (round_ % 16)
        driver.begin(1, nvme.NVME_CMD_READ, nsid=1, cdw=(sector, 0, 7))
        memory.write_u32(SHADOW + 8, driver.tails[1])
        driver.reg(nvme.NVME_REG_DBS + 8, driver.tails[1])  # the ioeventfd
        assert driver.take(1) == 0
        memory.write_u32(SHADOW + 12, driver.heads[1])
        assert memory.read(DATA, 4096) == content[512 * sector : 512 * sector + 4096]
    assert exits(driver.guest) == before
    shown = inspect(driver.guest.machine.parts)["pci"]
    assert shown["functions"]["02.0"]["bars"] == {"0": f"{BAR:#x}"}
    assert shown["nvme"]["02"]["bells"] == 1
    driver.config(pci.PCI_COMMAND, 0, 2)
    assert driver.reg(nvme.NVME_REG_CSTS) == 0xFFFFFFFF, "no longer decoded"


def test_a_reset_of_the_machine_takes_the_controller_back(boot: Callable[..., Guest]) -> None:
    driver = Driver(boot())
    driver.enable()
    driver.make_queues()
    boots = driver.guest.agent.boots
    driver.guest.machine.request_reset("test")
    driver.guest.agent.await_online(boots + 1)
    assert driver.config(pci.PCI_COMMAND, size=2) == 0
    assert driver.config(pci.PCI_BASE_ADDRESS_0) == 0
    driver.guest.machine.memory.zero(ADMIN_CQ, 0x1000)
    again = Driver(driver.guest)
    again.enable()
    assert driver.guest.machine.pci is not None
    (controller,) = driver.guest.machine.pci.controllers.values()
    assert set(controller.queues.submissions) == {0}


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Callable[[Driver], Driver]]:
    """`chain(driver)`: its machine saved and closed, and the driver on the one that goes on."""
    made: list[Guest] = []

    def go_on(driver: Driver) -> Driver:
        machine = driver.guest.machine
        machine.save(tmp_path / "saved")
        driver.guest.close()
        driver.guest = Guest(hv="none", synic="auto", restore=tmp_path / "saved")
        made.append(driver.guest)
        driver.guest.machine.start()
        return driver

    yield go_on
    for guest in made:
        guest.close()


def test_saved_and_restored_the_driver_notices_nothing(
    boot: Callable[..., Guest], disk: Path, chain: Callable[[Driver], Driver]
) -> None:
    driver = Driver(boot())
    driver.enable()
    driver.make_queues()
    content = disk.read_bytes()
    for sector in (0, 64, 128):
        driver = chain(driver)
        assert driver.config(pci.PCI_BASE_ADDRESS_0) == BAR
        assert driver.read(sector) == content[512 * sector : 512 * sector + 4096]
    memory = driver.guest.machine.memory
    assert driver.do(0, nvme.NVME_ADMIN_DBBUF, prp1=SHADOW, prp2=EVENTS) == 0
    driver = chain(driver)
    memory = driver.guest.machine.memory
    driver.begin(1, nvme.NVME_CMD_READ, nsid=1, cdw=(8, 0, 7))
    memory.write_u32(SHADOW + 8, driver.tails[1])
    driver.reg(nvme.NVME_REG_DBS + 8, driver.tails[1])
    assert driver.take(1) == 0
    assert memory.read(DATA, 4096) == content[4096:8192]


def test_what_is_in_flight_in_a_save_is_answered_once(
    boot_agent: Callable[..., Guest], disk: Path, tmp_path: Path, chain: Callable[[Driver], Driver]
) -> None:
    """Four reads that a fault holds back for ten minutes: a machine that comes to rest has them aborted."""
    slow = tmp_path / "slow.toml"
    slow.write_text('[[fault]]\ndo = "delay"\nop = "read"\nseconds = 600\n')
    disks = (DiskSpec(str(disk), bus="nvme", faults=slow),)
    driver = Driver(boot_agent(hv="none", synic="auto", disks=disks))
    driver.enable()
    driver.make_queues()
    for number in range(4):
        driver.begin(1, nvme.NVME_CMD_READ, nsid=1, prp1=DATA + 0x1000 * number, cdw=(8 * number, 0, 7))
    driver.reg(nvme.NVME_REG_DBS + 8, driver.tails[1])
    assert driver.guest.machine.pci is not None
    (controller,) = driver.guest.machine.pci.controllers.values()
    driver.guest.until(lambda: controller.queues.in_flight == 4, "four reads are in flight")
    driver = chain(driver)
    assert [driver.take(1) for _ in range(4)] == [nvme.NVME_SC_ABORT_REQ] * 4
    driver.reg(nvme.NVME_REG_DBS + 12, driver.heads[1])
    for sector in (0, 256):
        start = 512 * sector
        assert driver.read(sector) == disk.read_bytes()[start : start + 4096], "no answer is left over"


def test_a_machine_without_pci_imports_none_of_it() -> None:
    program = """
import sys
from pathlib import Path
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
with Machine(MachineConfig(Path(sys.argv[1]), hv="none", memory=64 << 20)):
    print(sorted(name for name in sys.modules if "pci" in name or "mmio_bus" in name or "firmware" in name))
"""
    words = [sys.executable, "-c", program, str(guest_images.image("agent"))]
    found = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert found.strip() == "['hvkvm.abi.pci']"
