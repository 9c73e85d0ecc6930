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

from hvkvm.errors import ConfigError, HvkvmError, StateError
from hvkvm.machine import saving
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
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
SHARES = {"board": 25, "network": 3, "VMBus": 35, "Hyper-V interface": 20, "vCPUs": 7, "manifest": 10}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An agent guest with a bus and the SynIC in user space, whose devices all have a state."""
    file = tmp_path / "vm"
    config = MachineConfig(
        kernel=guest_images.image("agent"), memory=64 << 20, synic="user", vmbus="on", hv="host-model"
    )
    with Machine(config) as machine:
        machine.start()
        machine.save(file)
    return file


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
            rf"{re.escape(str(self.file.parent))}|vCPUs|board|VMBus|Hyper-V interface|network", text
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
