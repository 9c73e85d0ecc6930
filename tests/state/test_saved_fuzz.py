"""The file of a saved machine, changed in ways that know its structure: one line of error each, or it loads.

A machine is made now and then, and most changes are loaded into its parts where they are: no RAM, no new VM.
HVKVM_SOAK_MUTATIONS says how many in a soak, HVKVM_SOAK_SEED where to begin.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import guest_images
import pytest
from saved_file import rewrite
from saved_mutations import mutate

from hvkvm.abi import nvme, pci, virtio
from hvkvm.abi.board import HPET_ADDRESS
from hvkvm.abi.hpet import HPET_SIZE
from hvkvm.devices.pci.function import Function
from hvkvm.devices.pci.msix import PBA_OFFSET
from hvkvm.devices.pci.nvme.controller import Controller
from hvkvm.devices.pci.virtio.transport import Transport
from hvkvm.errors import ConfigError, HvkvmError, StateError
from hvkvm.machine import saving
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import BUSES, DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.state import file as state_file
from hvkvm.state.codec import restored

SOAK = bool(os.environ.get("HVKVM_SOAK"))
pytestmark = [pytest.mark.kvm, pytest.mark.timeout(0 if SOAK else 300)]

MUTATIONS = int(os.environ.get("HVKVM_SOAK_MUTATIONS", "1000000")) if SOAK else 1500
SEED = int(os.environ.get("HVKVM_SOAK_SEED", "1"))
SECONDS = float(os.environ.get("HVKVM_SOAK_SECONDS", "inf"))
FRESH = 1000
"""So many changes are loaded into the parts of one machine."""
WHOLE = 1000 if SOAK else 300
"""Every so often a change is tried by a machine of its own, which then runs."""
SHARES = {
    "board": 15,
    "PCI": 25,
    "network": 3,
    "VMBus": 25,
    "Hyper-V interface": 15,
    "vCPUs": 7,
    "manifest": 10,
}
RINGS = range(32 << 20, 64 << 20, 64 << 10)
"""Guest memory that the agent leaves alone."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An agent guest with buses, disks on each, a NIC, and the SynIC in user space: all have a state."""
    file, disk = tmp_path / "vm", tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    config = MachineConfig(
        kernel=guest_images.image("agent"),
        memory=64 << 20,
        synic="user",
        vmbus="on",
        hv="host-model",
        hpet="on",
        disks=tuple(DiskSpec(str(disk), readonly=True, bus=bus) for bus in BUSES),  # several VMs have them
        nets=(NicSpec(socket=tmp_path / "nobody"),),
    )
    with Machine(config) as machine:
        assert machine.pci is not None
        for number, device in enumerate(machine.pci.bus.devices.values()):
            place(device.function, 0xC0000000 + number * (1 << 20))
        for controller in machine.pci.controllers.values():
            use_nvme(controller)
        for transport in machine.pci.virtio.values():
            use_virtio(transport)
        machine.start()
        machine.save(file)
    return file


def place(function: Function, gpa: int) -> None:
    """Do what a guest does first: say where the BAR is, and switch MSI-X on."""
    function.write(pci.PCI_BASE_ADDRESS_0, 4, gpa)
    function.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER)
    at = function.capability_offsets[pci.PCI_CAP_ID_MSIX] + pci.PCI_MSIX_FLAGS
    function.write(at, 2, pci.PCI_MSIX_FLAGS_ENABLE)


def use_nvme(controller: Controller) -> None:
    """Give it its admin queues."""
    for offset, value in (
        (nvme.NVME_REG_AQA, 7 << 16 | 7),
        (nvme.NVME_REG_ASQ, RINGS[0]),
        (nvme.NVME_REG_ACQ, RINGS[1]),
        (nvme.NVME_REG_CC, 0x00460001),
    ):
        controller.write(offset, 4, value)


def use_virtio(transport: Transport) -> None:
    """Give it its queue."""
    for offset, size, value in (
        (virtio.VIRTIO_PCI_COMMON_GFSELECT, 4, 1),
        (virtio.VIRTIO_PCI_COMMON_GF, 4, 1 << virtio.VIRTIO_F_VERSION_1 - 32),
        (virtio.VIRTIO_PCI_COMMON_STATUS, 1, virtio.VIRTIO_CONFIG_S_FEATURES_OK),
        (virtio.VIRTIO_PCI_COMMON_Q_MSIX, 2, 1),
        (virtio.VIRTIO_PCI_COMMON_Q_DESCLO, 4, RINGS[2]),
        (virtio.VIRTIO_PCI_COMMON_Q_AVAILLO, 4, RINGS[3]),
        (virtio.VIRTIO_PCI_COMMON_Q_USEDLO, 4, RINGS[4]),
        (virtio.VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1),
        (
            virtio.VIRTIO_PCI_COMMON_STATUS,
            1,
            virtio.VIRTIO_CONFIG_S_FEATURES_OK | virtio.VIRTIO_CONFIG_S_DRIVER_OK,
        ),
    ):
        transport.write(offset, size, value)
    assert transport.inspect()["queues"]


def look_at(machine: Machine) -> None:
    """Read every register that has something in it."""
    assert machine.pci is not None
    for port in list(machine.board.ports._claims):
        for size in (1, 2, 4):
            machine.board.ports.read(port, size)
    for one in machine.pci.bus.devices.values():
        for offset in range(0, pci.PCI_CFG_SPACE_SIZE, 4):
            one.function.read(offset, 4)
        region = one.region(one.function.bars[0])
        for area in range(0, one.function.bars[0].size, PBA_OFFSET):
            for offset in range(area, area + 64, 4):
                region.read(offset, 4)
    for offset in range(0, HPET_SIZE, 4):
        machine.pci.mmio.read(HPET_ADDRESS + offset, 4)


class Fuzzer:
    """Loads changed states, and holds every refusal to one line."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.file = file
        self.copy = folder / "copy"
        with state_file.Saved(file) as opened:
            self.texts = {name: json.dumps(state) for name, state in opened.parts.items()}
            self.ram_size = opened.ram_size
        raw = file.read_bytes()
        fields = state_file._header.unpack_from(raw)
        self.tree = raw[fields[4] : fields[4] + fields[5]]
        self.machine: Machine | None = None
        self.parts: dict[str, Any] = {}
        self.refused = self.loaded = self.whole = 0

    def fresh(self) -> None:
        """Another machine to load into: what a refused state left half done is no news for the next."""
        self.close()
        self.machine = machine = Machine(MachineConfig(kernel=self.file, restore=self.file))
        self.parts = {part.name: part for part in machine.lifecycle._parts}

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()
        self.machine = None

    def part(self, name: str, chance: random.Random) -> None:
        """Change the state of a part, and load it."""
        tree = json.loads(self.texts[name])
        mutate(tree, chance)
        if json.dumps(tree) == self.texts[name]:
            return
        part = self.parts[name]
        try:
            state = restored(part.State, tree, f"{self.file}: {name}")
            part.reset()
            part.load(state)
        except (StateError, HvkvmError) as error:
            self.refuse(error)
        except Exception:
            self.by_its_own(lambda whole: whole["parts"].__setitem__(name, tree))
        else:
            self.loaded += 1
            if name in ("board", "PCI"):
                assert self.machine is not None
                look_at(self.machine)

    def manifest(self, chance: random.Random) -> None:
        """Change the manifest, in a file with the checksums of its own; some of its bytes without."""
        tree = json.loads(self.tree)
        mutate(tree["manifest"] if chance.random() < 0.9 else tree, chance)
        text = json.dumps(tree).encode()
        if chance.random() < 0.1:
            at = chance.randrange(len(text))
            text = text[:at] + chance.randbytes(3) + text[at:]
        at = state_file.RAM_OFFSET + self.ram_size
        fields = [state_file.MAGIC, state_file.FORMAT, 0, self.ram_size, at, len(text), at + len(text)]
        if chance.random() < 0.1:
            fields[chance.randrange(1, 7)] = chance.choice((0, 1, 1 << 31, at - 1, (1 << 32) - 1))
        head = state_file._header.pack(*fields, state_file.checksum(text))
        with open(self.copy, "r+b" if self.copy.exists() else "wb") as out:
            out.write(head + state_file.checksum(head))
            out.seek(at)
            out.write(text)
            out.truncate()
        try:
            with state_file.Saved(self.copy) as opened:
                saving.restored_config(opened, MachineConfig(kernel=self.copy, restore=self.copy))
        except StateError as error:
            self.refuse(error)
        else:
            self.loaded += 1

    def by_its_own(self, change: Any) -> None:
        """A file with `change` in a machine of its own: it is refused in a line, or starts and ends."""
        self.whole += 1
        self.copy.unlink(missing_ok=True)  # not to be written to: a VM may have mapped it
        self.copy.write_bytes(self.file.read_bytes())
        rewrite(self.copy, change)
        try:
            with Machine(MachineConfig(kernel=self.copy, restore=self.copy, timeout=0.05)) as machine:
                machine.run()
        except (StateError, ConfigError) as error:
            self.refuse(error)
        finally:
            self.copy.unlink()

    def refuse(self, error: Exception) -> None:
        self.refused += 1
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 1000, text
        assert re.match(
            rf"{re.escape(str(self.file.parent))}|vCPUs|board|VMBus|Hyper-V interface|network|PCI", text
        ), text


def test_a_changed_file_is_refused_in_one_line_or_loads(saved: Path, tmp_path: Path) -> None:
    fuzzer = Fuzzer(saved, tmp_path)
    names, weights = list(SHARES), list(SHARES.values())
    fds = len(os.listdir("/proc/self/fd"))
    began = told = time.monotonic()
    number = 0
    try:
        for number in range(SEED, SEED + MUTATIONS):
            chance = random.Random(number)
            if not (number - SEED) % FRESH:
                fuzzer.fresh()
            (name,) = chance.choices(names, weights)
            if not number % WHOLE:
                fuzzer.by_its_own(lambda tree: mutate(tree, chance))  # noqa: B023
            elif name == "manifest":
                fuzzer.manifest(chance)
            else:
                fuzzer.part(name, chance)
            now = time.monotonic()
            if SOAK and now > told + 30:
                told = now
                print(f"{number - SEED + 1} in {now - began:.0f} s: {fuzzer.refused} refused", flush=True)
            if now > began + SECONDS:
                break
    except BaseException as error:
        error.add_note(f"HVKVM_SOAK_SEED={number}")
        raise
    finally:
        fuzzer.close()
    done = number - SEED + 1
    assert fuzzer.refused >= done // 10
    assert fuzzer.loaded >= done // 50
    assert len(os.listdir("/proc/self/fd")) == fds
    print(
        f"{number - SEED + 1} changes: {fuzzer.refused} refused, {fuzzer.loaded} loaded, {fuzzer.whole} whole"
    )
