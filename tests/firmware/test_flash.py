"""The flash as edk2 drives it, one that is driven by nobody sane, and the file that keeps its content."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from firmware_volume import volume
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.boot import firmware as images
from hvkvm.boot import variables_file
from hvkvm.boot.variables_file import VariablesFile
from hvkvm.devices.flash import BLOCK, Flash, FlashState
from hvkvm.errors import BootError
from hvkvm.events import Event, Observer
from hvkvm.machine.firmware_vars import KeptVariables
from hvkvm.runtime.io_loop import IoLoop

SIZE = 3 * BLOCK


class Array:
    """A ROM without a VM."""

    def __init__(self, content: bytes = b"\xff" * SIZE) -> None:
        self.bytes = bytearray(content)
        self.size = len(self.bytes)
        self.shown = True

    def view(self) -> memoryview:
        return memoryview(self.bytes)

    def show(self, *, shown: bool) -> None:
        self.shown = shown


class Guest:
    """Accesses as a guest makes them: reads reach the device only where the array is not shown."""

    def __init__(self, content: bytes = b"\xff" * SIZE) -> None:
        self.array = Array(content)
        self.changes = 0
        self.flash = Flash(self.array, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def read(self, offset: int) -> int:
        return self.array.bytes[offset] if self.array.shown else self.flash.read(offset, 1) & 0xFF

    def write(self, offset: int, *values: int) -> None:
        for value in values:
            self.flash.write(offset, 1, value)

    def program(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data, offset):
            self.write(at, 0x10, byte)
        self.write(offset, 0xFF)


def test_edk2_takes_it_for_a_flash() -> None:
    """QemuFlashDetected(): neither RAM, which would keep what is written, nor ROM."""
    guest = Guest(b"\xaa" * SIZE)
    guest.write(0, 0x50)
    assert guest.read(0) == 0xAA
    guest.write(0, 0x70)
    assert guest.read(0) == 0x00
    guest.write(0, 0xFF)
    assert guest.read(0) == 0xAA
    assert guest.changes == 0


def test_bytes_are_programmed_and_blocks_erased() -> None:
    guest = Guest()
    guest.program(BLOCK + 5, b"variable")
    assert guest.array.bytes[BLOCK + 5 : BLOCK + 13] == b"variable"
    guest.program(BLOCK + 5, b"\x00")
    assert guest.read(BLOCK + 5) == 0, "programming clears bits"
    guest.program(BLOCK + 5, b"\xff")
    assert guest.read(BLOCK + 5) == 0, "and sets none"
    guest.program(0, b"other")
    guest.write(BLOCK + 100, 0x20, 0xD0)
    assert guest.read(BLOCK) == 0x80, "the status: ready"
    guest.write(BLOCK, 0xFF)
    assert bytes(guest.array.bytes) == b"other".ljust(SIZE, b"\xff")


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, SIZE - 1),
            st.sampled_from((0x10, 0x20, 0x40, 0x50, 0x70, 0x90, 0xD0, 0xFF)) | st.integers(0, 2**64 - 1),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_any_sequence_of_commands(steps: list[tuple[int, int, bool]]) -> None:
    guest = Guest(bytes(range(256)) * (SIZE // 256))
    for offset, value, wide in steps:
        guest.flash.write(offset, 8 if wide else 1, value)
        assert 0 <= guest.read(offset) <= 0xFF
        assert len(guest.array.bytes) == SIZE
    state = guest.flash.save()
    other = Guest()
    other.flash.load(state)
    assert other.array.bytes == guest.array.bytes
    assert other.array.shown or state.command in (0x70, 0x20, 0x90, 0xD0)
    assert other.flash.save()[:2] == state[:2]
    assert other.read(0) == guest.read(0)
    assert other.flash.save().content == state.content
    guest.flash.reset()
    assert guest.array.shown


def test_its_status_says_what_became_of_a_command() -> None:
    guest = Guest(b"\x0f" * SIZE)
    guest.write(7, 0x10, 0x0F)
    assert guest.changes == 0, "no bit was cleared"
    guest.write(7, 0x40, 0x01)
    assert (guest.array.bytes[7], guest.changes) == (0x01, 1)
    guest.write(0, 0x70)
    assert guest.read(0) == 0x80, "ready"
    guest.write(0, 0x50)
    assert guest.array.shown
    guest.write(0, 0x70)
    assert guest.read(0) == 0
    guest.write(0, 0x90)
    assert guest.read(0) == 0
    assert not guest.array.shown
    guest.write(0, 0x33)  # no command
    assert guest.array.shown
    guest.write(BLOCK, 0x20, 0xD0)
    guest.write(2 * BLOCK, 0xD0)  # confirms nothing any more
    assert (guest.read(2 * BLOCK), guest.changes) == (0x0F, 2)
    guest.write(0, 0x20, 0x55)
    assert guest.read(0) == 0xB0, "ready, and a sequence that is none"
    guest.write(0, 0x50, 0x20, 0xFF)
    assert guest.array.shown
    guest.write(0, 0x70)
    assert guest.read(0) == 0x30
    guest.flash.reset()
    guest.write(0, 0x70)
    assert guest.read(0) == 0
    assert bytes(guest.array.bytes[2 * BLOCK :]) == b"\x0f" * BLOCK
    assert guest.changes == 2


def test_a_confirmed_erase_is_saved() -> None:
    guest, other = Guest(b"\0" * SIZE), Guest()
    guest.write(BLOCK, 0x20, 0xD0)
    other.flash.load(guest.flash.save())
    assert not other.array.shown
    assert other.read(0) == 0x80, "the status: ready"
    other.write(0, 0xFF)
    assert (other.read(0), other.read(BLOCK)) == (0, 0xFF)


@pytest.mark.parametrize("content", [b"", b"x", b"x\x9c", b"no zlib", None])
def test_a_state_that_cannot_be_is_refused(content: bytes | None) -> None:
    whole = Guest(b"\0" * (SIZE + 1)).flash.save()
    state = whole if content is None else whole._replace(content=content)
    with pytest.raises(ValueError, match="firmware's variables"):
        Guest().flash.load(FlashState(*state))


# --- the file -------------------------------------------------------------------------------------


class Notes(Observer):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def kept(tmp_path: Path, io: IoLoop) -> Iterator[Any]:
    guest, notes = Guest(), Notes()
    path = tmp_path / "vars"
    path.write_bytes(volume(SIZE))
    guest.array.bytes[:] = volume(SIZE)
    variables = KeptVariables(VariablesFile(path, volume(SIZE)), guest.flash, io, notes)
    guest.flash.on_change = variables.changed
    yield guest, variables, notes
    variables.close()


def keep(io: IoLoop, variables: KeptVariables) -> None:
    done = threading.Event()
    io.call_soon(variables.keep, done.set)
    assert done.wait(60)


def test_what_changes_is_in_the_file(kept: Any, io: IoLoop) -> None:
    guest, variables, notes = kept
    path = variables.file.path
    path.chmod(0o640)
    for round_ in range(5):
        guest.program(100 * (round_ + 1), b"value")
        keep(io, variables)
        assert path.read_bytes() == guest.flash.content
    assert path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in path.parent.iterdir()] == ["vars"]
    assert notes.events == []


def test_a_file_that_cannot_be_written_is_told_of_and_the_guest_goes_on(kept: Any, io: IoLoop) -> None:
    guest, variables, notes = kept
    variables.file.path = variables.file.path.parent / "gone" / "vars"
    guest.program(BLOCK, b"value")
    keep(io, variables)
    assert "not kept" in str(notes.events[0])


def test_without_a_thread_to_write_it_is_told_and_the_next_change_is_kept(
    kept: Any, io: IoLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, variables, notes = kept

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        guest.program(BLOCK, b"value")
        keep(io, variables)
    assert "can't start new thread" in variables.unkept
    assert "not kept" in str(notes.events[0])
    guest.program(BLOCK + 100, b"more")
    keep(io, variables)
    assert variables.file.path.read_bytes() == guest.flash.content
    assert variables.unkept == ""


# --- images ---------------------------------------------------------------------------------------


CODE = b"\x90" * 0x20000


def test_variables_are_the_first_volume_of_an_image(tmp_path: Path) -> None:
    image = volume(2 * BLOCK) + CODE
    assert images.split(tmp_path / "OVMF.fd", image) == (CODE, volume(2 * BLOCK))


def test_or_in_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "OVMF_VARS_4M.fd").write_bytes(volume(BLOCK))
    assert images.split(tmp_path / "OVMF_CODE_4M.fd", CODE) == (CODE, volume(BLOCK))
    with pytest.raises(BootError, match="--firmware-vars"):
        images.split(tmp_path / "other.fd", CODE)
    (tmp_path / "OVMF_VARS_4M.fd").write_bytes(CODE)
    with pytest.raises(BootError, match="template"):
        images.split(tmp_path / "OVMF_CODE_4M.fd", CODE)


def test_a_full_disk_costs_what_was_changed_and_nothing_else(
    kept: Any, io: IoLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, variables, notes = kept
    path = variables.file.path
    before = path.read_bytes()

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(variables_file.os, "fsync", full)
        guest.program(BLOCK, b"value")
        keep(io, variables)
    (said,) = notes.events
    assert said.text.endswith("No space left on device: what the guest has changed is not kept"), said
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["vars"]
    assert variables.unkept == "No space left on device"
    keep(io, variables)
    assert variables.unkept == ""
    assert path.read_bytes() == guest.flash.content, "kept as soon as there is room"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no firmware image"),
        (b"x" * 5000, "whole 4 KiB pages"),
        (bytes(0x20000), "no code where a CPU starts"),
        (b"\x7fELF".ljust(0x20000, b"x"), "ELF"),
        (b"x" * ((16 << 20) + 4096), "larger than 16 MiB"),
    ],
)
def test_what_is_no_firmware_is_refused_in_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(BootError, match=why) as caught:
        images.read(path)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "OVMF", (Path("/nowhere/OVMF.fd"),))
    with pytest.raises(BootError, match="apt install ovmf"):
        images.find("auto")
