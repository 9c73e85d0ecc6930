"""Where control sockets lie: whose folder, whose socket, and which are dead."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from control_listener import listen

from hvkvm.errors import ConfigError, FolderUnusable, NameTaken
from hvkvm.observe import control_path
from hvkvm.runtime import unix_listener


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An $XDG_RUNTIME_DIR, and no other folder."""
    monkeypatch.delenv("HVKVM_CONTROL_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(control_path, "folders", lambda folders=control_path.folders: folders()[:1])
    return tmp_path


def dead_socket(path: Path) -> None:
    """What a killed VM leaves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))


def test_folders_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HVKVM_CONTROL_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    ours = Path(f"/tmp/hvkvm-{os.geteuid()}")
    assert control_path.folders() == [Path("/run/user/7/hvkvm"), ours]
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert control_path.folders() == [ours]
    monkeypatch.setenv("HVKVM_CONTROL_DIR", "/x/y")
    assert control_path.folders() == [Path("/x/y")]
    monkeypatch.setenv("HVKVM_CONTROL_DIR", "x/y")
    with pytest.raises(ConfigError, match=r"^HVKVM_CONTROL_DIR=x/y: not an absolute path; "):
        control_path.folders()


def test_folder_and_socket_are_closed_to_others(runtime: Path) -> None:
    before = os.umask(0)
    try:
        folder = control_path.make_folder()
        assert folder == runtime / "hvkvm"
        with listen(folder / "a.sock"):
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
            assert stat.S_IMODE(os.stat(folder / "a.sock").st_mode) == 0o600
    finally:
        os.umask(before)
    assert control_path.make_folder() == folder  # twice is fine


@pytest.mark.parametrize("wrong", ["open", "file", "link", "missing", "foreign"])
def test_a_folder_that_others_could_use_is_not_used(
    runtime: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runtime / "hvkvm"
    if wrong == "open":
        folder.mkdir()
        folder.chmod(0o750)
    elif wrong == "file":
        folder.touch(mode=0o700)
    elif wrong == "link":
        (runtime / "real").mkdir(mode=0o700)
        folder.symlink_to(runtime / "real")
    elif wrong == "missing":
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "nowhere"))
    else:
        folder.mkdir(mode=0o700)
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(FolderUnusable, match=str(runtime)):
        control_path.make_folder()
    assert control_path.sockets() == []


def test_the_second_folder_is_taken_when_the_first_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_path, "folders", lambda: [tmp_path / "no" / "hvkvm", tmp_path / "yes"])
    assert control_path.make_folder() == tmp_path / "yes"


@pytest.mark.parametrize("reason", ["107 bytes", "Permission denied"])
def test_the_second_folder_is_taken_when_the_first_takes_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    first, second = tmp_path / ("x" * (100 if reason == "107 bytes" else 1)), Path("yes")
    monkeypatch.chdir(tmp_path)  # its own path may be too long already
    monkeypatch.setattr(control_path, "folders", lambda: [first, second])
    listen_fd = control_path.listen_fd

    def refuse(path: Path) -> int:
        if path.parent == first and reason == "Permission denied":
            raise PermissionError(errno.EACCES, reason)
        return listen_fd(path)

    monkeypatch.setattr(control_path, "listen_fd", refuse)
    fd, path = control_path.listen_as("a")
    os.close(fd)
    assert path == second / "a.sock"
    monkeypatch.setattr(control_path, "folders", lambda: [first, tmp_path / "no" / "such"])
    with pytest.raises(FolderUnusable, match=rf"{first}/a.sock: .*{reason}.*; {tmp_path}/no/such: No such"):
        control_path.listen_as("a")


def test_a_dead_vms_socket_is_replaced_and_a_live_ones_is_not(runtime: Path) -> None:
    path = control_path.make_folder() / "a.sock"
    dead_socket(path)
    with listen(path), pytest.raises(NameTaken):
        listen(path)
    with listen(path):
        assert control_path.sockets() == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_left_alone(runtime: Path, kind: str) -> None:
    path = control_path.make_folder() / "a.sock"
    path.write_text("mine") if kind == "file" else path.mkdir()
    with pytest.raises(NameTaken, match="no socket"):
        listen(path)
    assert path.exists()
    assert control_path.sockets() == []


def test_of_many_that_start_at_once_one_gets_the_name(runtime: Path) -> None:
    path = control_path.make_folder() / "a.sock"
    for _ in range(20):
        dead_socket(path)
        got: list[socket.socket] = []
        refused: list[NameTaken] = []
        barrier = threading.Barrier(4)

        def start(
            barrier: threading.Barrier = barrier,
            got: list[socket.socket] = got,
            refused: list[NameTaken] = refused,
        ) -> None:
            barrier.wait()
            try:
                got.append(listen(path))
            except NameTaken as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 3)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
        unix_listener.remove(path, unix_listener.identity(path))
        got[0].close()


def test_listing_removes_the_dead_and_keeps_the_rest(runtime: Path) -> None:
    folder = control_path.make_folder()
    dead_socket(folder / "dead.sock")
    dead_socket(folder / "other")
    (folder / "note.sock").write_text("no socket")
    with listen(folder / "b.sock"), listen(folder / "a.sock"):
        assert control_path.sockets() == [folder / "a.sock", folder / "b.sock"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.sock", "b.sock", "note.sock", "other"]


def test_removing_leaves_a_successors_socket(runtime: Path) -> None:
    path = control_path.make_folder() / "a.sock"
    with listen(path) as first:
        owned = unix_listener.identity(path)
        path.unlink()
        with listen(path) as second:
            unix_listener.remove(path, owned)
            assert path.exists()
            unix_listener.remove(path, unix_listener.identity(path))
            assert not path.exists()
            assert first.fileno() != second.fileno()
    unix_listener.remove(path, owned)
    unix_listener.remove(runtime / "nowhere" / "x.sock", owned)


def test_a_path_too_long_is_an_error_with_a_reason(runtime: Path) -> None:
    with pytest.raises(OSError, match="107 bytes"):
        listen(runtime / ("x" * 120))


def test_a_lock_that_is_kept_is_not_waited_for_without_end(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix_listener, "LOCK_SECONDS", 0.05)
    folder = control_path.make_folder()
    dead_socket(folder / "dead.sock")
    with listen(folder / "a.sock"), unix_listener.locked(folder):
        assert control_path.sockets() == [folder / "a.sock"]
        assert (folder / "dead.sock").exists()  # it might be about to listen
        with pytest.raises(OSError, match=r"keeps .* locked"):
            listen(folder / "b.sock")
        unix_listener.remove(folder / "a.sock", unix_listener.identity(folder / "a.sock"))
        assert (folder / "a.sock").exists()
    assert control_path.sockets() == []
    assert list(folder.iterdir()) == []
