"""Paths that this user may not reach, or that are too long to be: one line with flag, reason and remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import guest_images
import pytest
from running_vm import command_line

import hvkvm.cli
from hvkvm.boot.variables_file import VariablesFile
from hvkvm.errors import BootError

LONG = "n" * 300
WITHOUT_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""root without its override of file modes is a user like any other."""
RUN = ("run", "--memory", "16M")
DEVICES = ("--kernel", "KERNEL", "--vmbus", "on", "--synic", "user")


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder of files, in a folder that nobody may enter."""
    inside = tmp_path / "closed" / "in"
    inside.mkdir(parents=True)
    (inside / "k").write_bytes(b"x")
    inside.parent.chmod(0)
    yield inside
    inside.parent.chmod(0o700)  # who removes it has to look inside


def answer(
    tmp_path: Path, arguments: tuple[str, ...], *, code: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    """What the command, or Python of `code`, says in `tmp_path`, with `more` in its environment."""
    named = {"KERNEL": str(guest_images.image("agent")) if "KERNEL" in arguments else ""}
    command = command_line(*(named.get(word, word) for word in arguments))
    if code:
        command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("as root this needs setpriv, which gives up root's override of file modes")
        command = [*WITHOUT_OVERRIDE, *command]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
        env={**os.environ, **more},
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)


@pytest.mark.parametrize("arguments", [("warm", "-o"), ("matrix", "m", "--junit"), ("matrix", "m", "--json")])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("closed/in/x", "closed/in: Permission denied; name a folder"),
        (LONG, "File name too long; name another"),
    ],
)
def test_a_result_that_cannot_be_written_there(
    closed: Path, tmp_path: Path, arguments: tuple[str, ...], file: str, reason: str
) -> None:
    refused(answer(tmp_path, (*arguments, file)), f"{arguments[-1]} {file}: no file can be there: {reason}")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("closed/in/k", "Permission denied; make it readable for this user"),
        (LONG, "File name too long; check the path"),
    ],
)
def test_a_kernel_of_a_matrix(closed: Path, tmp_path: Path, file: str, reason: str) -> None:
    (tmp_path / "m.toml").write_text(f'[machine]\nkernel = "{file}"\n')
    refused(answer(tmp_path, ("matrix", "m.toml", "--list")), f"m.toml: [machine] kernel {file}: {reason}")


@pytest.mark.parametrize("flag", ["--vsock closed/in/x", "--net socket=closed/in/x"])
@pytest.mark.kvm
def test_a_socket(closed: Path, tmp_path: Path, flag: str) -> None:
    reason = "closed/in: Permission denied; name a folder that this user may enter"
    refused(answer(tmp_path, (*RUN, *DEVICES, *flag.split())), f"{flag}: {reason}")


def test_a_folder_of_modules(closed: Path, tmp_path: Path) -> None:
    """Asked of the class: only with a Linux kernel does the command look into it."""
    code = (
        "import sys; from pathlib import Path; from hvkvm.boot.kmod import ModuleTree\n"
        "from hvkvm.cli import guarded; sys.exit(guarded(lambda: ModuleTree(Path('closed'))))"
    )
    refused(answer(tmp_path, (), code=code), "--modules-dir closed: Permission denied; name a lib/modules")
    (tmp_path / "modules.order").touch(mode=0)
    refused(
        answer(tmp_path, (), code=code.replace("closed", ".")),
        "--modules-dir: modules.order: Permission denied; name a lib/modules",
    )


def test_the_variables_of_firmware(closed: Path, tmp_path: Path) -> None:
    (tmp_path / "unreadable").touch(mode=0o200)
    code = (
        "import sys; from pathlib import Path; from hvkvm.boot.variables_file import VariablesFile\n"
        "from hvkvm.cli import guarded; sys.exit(guarded(lambda: VariablesFile(Path('FILE'), b'')))"
    )
    for name in ("closed/in/k", "unreadable"):
        said = answer(tmp_path, (), code=code.replace("FILE", name))
        refused(said, f"--firmware-vars {name}: Permission denied; name a file that can be made")


def test_a_cache_that_keeps_no_image(closed: Path, tmp_path: Path) -> None:
    refused(
        answer(tmp_path, ("conform", "--vmm", "qemu"), HVKVM_CACHE=str(closed)),
        f"{closed}/micro/",
        "Permission denied; set HVKVM_CACHE to a folder with room",
    )


@pytest.mark.kvm
def test_a_cache_that_keeps_no_seed(closed: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycdlib")
    (tmp_path / "user-data").write_bytes(b"#cloud-config\n")
    refused(
        answer(tmp_path, (*RUN, *DEVICES, "--cloud-init", "."), HVKVM_CACHE=str(closed)),
        f"--cloud-init .: {closed}/cloud-init/",
        "Permission denied; set HVKVM_CACHE to a folder with room",
    )


def test_a_folder_of_control_sockets(closed: Path, tmp_path: Path) -> None:
    """It is the user's own and closed to others, and closed to its user too."""
    result = answer(tmp_path, ("ctl", "list"), HVKVM_CONTROL_DIR=str(closed.parent))
    assert (result.returncode, result.stdout, result.stderr) == (0, "no VM is running\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("ctl", "save", "x"), "x"),
        (("ctl", "screenshot", "x"), "x"),
        (("ctl", "disk", "add", "nbd:unix:x"), "nbd:unix:x"),
        (("ctl", "disk", "insert", "cd0", "x"), "x"),
        (("ctl", "net", "add", "listen=x"), "x"),
        ((*RUN, *DEVICES, "--record", "x"), "--record x"),
        ((*RUN, *DEVICES, "--timeline", "x.svg"), "--timeline x.svg"),
        ((*RUN, *DEVICES, "--net", "listen=x,pcap=y"), "--net pcap=y"),
        (("warm", *DEVICES, "-o", "x"), "-o x"),
    ],
)
def test_a_name_in_a_folder_that_is_gone(
    arguments: tuple[str, ...],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(guest_images.image("agent")) if word == "KERNEL" else word for word in arguments]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert hvkvm.cli.main(words) == 2
    said = capsys.readouterr().err
    assert said == f"hvkvm: {named}: the folder that you are in is gone; cd to another\n"


def test_variables_in_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BootError, match=r"^--firmware-vars x: No such file or directory; name a file"):
        VariablesFile(Path("x"), b"")
