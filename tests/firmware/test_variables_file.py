"""The file with a machine's firmware variables: made once, one machine's at a time, and always whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from firmware_volume import volume

from hvkvm.boot import variables_file
from hvkvm.boot.variables_file import VariablesFile
from hvkvm.devices.flash import BLOCK
from hvkvm.errors import BootError

CODE = b"\x90" * 0x20000


def test_the_template_is_copied_once(tmp_path: Path) -> None:
    path = tmp_path / "vars"
    with closing(VariablesFile(path, volume(BLOCK))) as file:
        assert file.content == path.read_bytes() == volume(BLOCK)
    changed = volume(BLOCK)[:-1] + b"\0"
    path.write_bytes(changed)
    with closing(VariablesFile(path, volume(BLOCK))) as file:
        assert file.content == changed
    for wrong in (b"x", CODE, volume(2 * BLOCK)):
        path.write_bytes(wrong)
        with pytest.raises(BootError, match="not the variables of this firmware"):
            VariablesFile(path, volume(BLOCK))
    with pytest.raises(BootError, match="can be made"):
        VariablesFile(tmp_path / "none" / "vars", volume(BLOCK))
    assert [one.name for one in tmp_path.iterdir()] == ["vars"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("/dev/null"), "no regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_no_variables_can_be_kept_in_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    """A FIFO made the run wait for its writer, deaf to every signal but KILL."""
    path = tmp_path / "vars"
    make(path)
    with pytest.raises(BootError, match=why) as caught:
        VariablesFile(path, volume(BLOCK))
    assert str(caught.value).startswith(f"--firmware-vars {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["it", "its folder"])
def test_a_file_that_cannot_be_replaced_is_refused_before_the_guest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A read-only one was replaced nevertheless; one in a read-only folder failed at the first change."""
    path = tmp_path / "vars"
    path.write_bytes(volume(BLOCK))
    shut = path if what == "it" else tmp_path
    monkeypatch.setattr(variables_file.os, "access", lambda asked, _mode: Path(asked) != shut)
    for _ in range(2):
        with pytest.raises(BootError, match=f"this user may not write {what};") as caught:
            VariablesFile(path, volume(BLOCK))
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    VariablesFile(path, volume(BLOCK)).close()


def test_a_link_stays_one_and_what_it_leads_to_is_locked(tmp_path: Path) -> None:
    """A link was replaced, so that two machines had one file by two names without noticing."""
    path, link = tmp_path / "vars", tmp_path / "link"
    link.symlink_to(path)
    with closing(VariablesFile(link, volume(BLOCK))) as file:
        for name in (path, link):
            with pytest.raises(BootError, match=f"--firmware-vars {name}: in use by another machine"):
                VariablesFile(name, volume(BLOCK))
        file.replace(volume(BLOCK)[:-1] + b"\0")
    assert (link.is_symlink(), path.read_bytes()[-1]) == (True, 0)


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path) -> None:
    """It was, for a process with the same number, as the first one of each container has."""
    path = tmp_path / "vars"
    with closing(VariablesFile(path, volume(BLOCK))) as file:
        (tmp_path / ".vars.new").write_bytes(b"half")
        file.replace(volume(BLOCK)[:-1] + b"\0")
        assert path.read_bytes()[-1] == 0
    assert [one.name for one in tmp_path.iterdir()] == ["vars"]


def test_two_machines_do_not_share_a_file(tmp_path: Path) -> None:
    """Also not while it is replaced all the time, and with the name of each moment."""
    path = tmp_path / "vars"
    with closing(VariablesFile(path, volume(BLOCK))) as file:
        end = threading.Event()

        def replace() -> None:
            while not end.is_set():
                file.replace(volume(BLOCK))

        thread = threading.Thread(target=replace)
        thread.start()
        try:
            for _ in range(200):
                with pytest.raises(BootError, match="in use by another machine") as caught:
                    VariablesFile(path, volume(BLOCK))
                assert "\n" not in str(caught.value)
        finally:
            end.set()
            thread.join()
    VariablesFile(path, volume(BLOCK)).close()
