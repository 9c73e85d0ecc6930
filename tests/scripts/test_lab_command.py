"""The lab's command line, without starting one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from steps import artifacts, host_tsc, lab_host, lab_image, lab_kept, root_disk
from steps.distribution import StepError

PROJECT = Path(__file__).resolve().parents[2]
PLAN = lab_image.Plan(None, 1, "4G")
BOOTED = lab_image.Image(Path("/k"), Path("/i"))
NUMBERS = dict.fromkeys(lab_host.CHANNELS, 7)


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROJECT / "scripts/lab", *words], capture_output=True, text=True, check=False)


def options(plan: lab_image.Plan) -> str:
    return shlex.join(lab_host.command_line(plan, BOOTED, Path("/f"), NUMBERS))


def test_root_is_shared_read_only_and_chosen_folders_are_not() -> None:
    text = options(PLAN._replace(writable=(Path("/out"),)))
    assert "local,id=root,path=/,security_model=none,readonly=on" in text
    assert "local,id=rw0,path=/out,security_model=none,multidevs=remap" in text


def test_comma_in_a_path_cannot_become_an_option() -> None:
    assert "path=/a,,readonly=off," in options(PLAN._replace(writable=(Path("/a,readonly=off"),)))


@pytest.mark.parametrize(("khz", "words"), [(2445423, 1), (None, 0)])
def test_the_counter_s_frequency_is_told_where_it_is_known(
    khz: int | None, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_tsc, "khz", lambda: khz)
    assert options(PLAN).count(f" tsc_early_khz={khz}") == words
    assert options(PLAN).count("tsc_early_khz") == words


@pytest.mark.parametrize(("version", "cpus"), [(7, 1), (9, 1), (10, 2), (11, 2)])
def test_processors_follow_the_emulator_s_version(
    version: int, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_host, "qemu_version", lambda: version)
    assert lab_host.default_cpus() == cpus


def test_more_processors_than_the_emulator_bears_take_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = Path("/packages/newer/usr/bin/qemu-system-x86_64")
    monkeypatch.setattr(artifacts, "path", lambda name: {"qemu": newer}[name])
    monkeypatch.setattr(lab_host, "qemu_version", lambda: 7)
    assert lab_host.program(1) == lab_image.QEMU
    assert lab_host.program(2) == str(newer)
    assert options(PLAN._replace(cpus=2, qemu=lab_host.program(2))).startswith(f"{newer} ")
    monkeypatch.setattr(lab_host, "qemu_version", lambda: 10)
    assert lab_host.program(2) == lab_image.QEMU


def test_no_newer_emulator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> Path:
        raise StepError(f"no package {name}")

    monkeypatch.setattr(artifacts, "path", none)
    monkeypatch.setattr(lab_host, "qemu_version", lambda: 7)
    with pytest.raises(StepError, match=r"--cpus 2: this machine's QEMU 7 bears one, .*: no package qemu"):
        lab_host.program(2)


def test_missing_emulator_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StepError, match="qemu-system-x86"):
        lab_host.qemu_version()


@pytest.fixture
def place() -> Iterator[Path]:
    """Where a kept lab of our own lies; a socket's path is short by law."""
    with tempfile.TemporaryDirectory(prefix="hv-", dir=lab_host.place()) as folder:
        yield Path(folder)


@pytest.mark.parametrize("there", [True, False])
def test_a_runtime_folder_that_is_gone_is_not_missed(
    there: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = place if there else place / "gone"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert lab_kept.KeptLab().folder.parent == (runtime if there else Path(lab_host.place()))


def test_folders_that_no_socket_can_be_in_are_passed_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their path is too long, or leads elsewhere from elsewhere."""
    long = tmp_path / ("d" * 80)
    (long / "rel").mkdir(parents=True)
    monkeypatch.chdir(long)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    for runtime in (str(long), "rel"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        assert lab_kept.KeptLab().folder.parent == Path("/tmp")
        assert lab_host.place(str(place)) == str(place)
    folder = lab_kept.KeptLab().folder.with_name("hvkvm-lab-kept-4294967295")
    assert max(len(os.fsencode(folder / name)) for name in lab_host.CHANNELS) <= 107


@pytest.mark.parametrize("script", ["lab", "artifacts", "root-disk"])
def test_a_cache_that_cannot_be_made_is_one_line(script: str, tmp_path: Path) -> None:
    words = {
        "lab": ("--nested", "--", "true"),
        "artifacts": ("fetch", "busybox"),
        "root-disk": ("make",),
    }[script]
    (tmp_path / "file").touch()
    done = subprocess.run(
        [PROJECT / "scripts" / script, *words],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, HVKVM_CACHE=str(tmp_path / "file/cache")),
    )
    assert done.returncode in (1, 70)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "running in an emulated" not in line]
    assert line.startswith(f"{script}: ")


def test_last_words_are_the_end_of_the_console(tmp_path: Path) -> None:
    (tmp_path / "console").write_text("".join(f"line {n}\n" for n in range(50)))
    (tmp_path / "qemu").write_text("warning: TCG doesn't support requested feature\nqemu: fatal\n")
    assert lab_host.last_words(tmp_path, 3) == ["line 48", "line 49", "qemu: fatal"]


def test_last_words_name_the_complaint_above_a_long_dump(tmp_path: Path) -> None:
    dump = "".join(f"R{n}: 0\n" for n in range(50))
    (tmp_path / "console").write_text(f"booting\nOops: int3\n{dump}")
    assert lab_host.last_words(tmp_path, 2) == ["Oops: int3", "R48: 0", "R49: 0"]


def test_init_is_a_valid_script() -> None:
    subprocess.run(["sh", "-n", lab_image.INIT], check=True)


def test_no_command_is_a_usage_error() -> None:
    done = lab()
    assert done.returncode == 2
    assert "no command" in done.stderr


def test_writable_folder_has_a_name_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb").mkdir()
    done = lab("--rw", str(tmp_path / "a\nb"), "--", "true")
    assert done.returncode == 2
    assert "line feed" in done.stderr


def test_folders_whose_names_are_no_text_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "path", lambda *_: tmp_path)
    monkeypatch.setattr(artifacts, "booted", lambda *_: tmp_path)
    (tmp_path / "base").write_bytes(b"")
    monkeypatch.setattr(lab_image, "_base", lambda *_: tmp_path / "base")
    odd = Path("/out", os.fsdecode(b"\xff"))
    booted = lab_image.image(PLAN._replace(writable=(odd,), fresh=odd), tmp_path)
    assert booted.initramfs.read_bytes().count(b"/out/\xff") == 2


def test_writable_folder_must_exist() -> None:
    assert "no such folder" in lab("--rw", "/not/there", "--", "true").stderr


@pytest.mark.parametrize("script", ["artifacts", "root-disk"])
def test_an_interrupt_while_something_is_fetched_is_one_line(script: str, tmp_path: Path) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\nkill -INT $PPID\n")
    apt.chmod(0o755)
    for tool in ("dpkg-deb", *root_disk._TOOLS):
        shutil.copy(apt, tmp_path / tool)
    done = subprocess.run(
        [PROJECT / "scripts" / script, "fetch" if script == "artifacts" else "make"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, HVKVM_CACHE=str(tmp_path / "cache"), PATH=f"{tmp_path}:{os.environ['PATH']}"),
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == f"{script}: interrupted"
    assert "Traceback" not in done.stderr


@pytest.fixture
def can_start() -> None:
    if os.environ.get("HVKVM_IN_LAB"):
        pytest.skip("needs a machine that can start the lab; this is one inside it")
    try:
        lab_host.qemu_version()
        artifacts.path("lab-kernel", offline=True)
    except StepError as error:
        pytest.skip(f"needs the lab: {error}")


@pytest.mark.usefixtures("can_start")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_the_lab_starts_leaves_nothing(place: Path, number: signal.Signals) -> None:
    """Its folder has the initramfs: 7 MiB of the temporary folder each time."""
    qemu = place / lab_image.QEMU
    started = place / "started"
    qemu.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec echo version 7\n: >{started}\nexec sleep 1000\n'
    )
    qemu.chmod(0o755)
    folder = place / "t"
    folder.mkdir()
    settings = {"TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(place), "PATH": f"{place}:{os.environ['PATH']}"}
    words = [PROJECT / "scripts/lab", "--nested", "--", "true"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | settings) as running:
        while not started.exists():
            assert running.poll() is None
            time.sleep(0.01)
        assert list(folder.iterdir())
        running.send_signal(number)
        said = running.communicate()[1]
    assert (running.returncode, "Traceback" in said) == (128 + number, False)
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("can_start")
@pytest.mark.timeout(900)  # two starts of the lab on a busy machine
def test_a_command_runs_in_the_lab_with_its_own_status(tmp_path: Path) -> None:
    """Environment, folder, streams, writes, status."""
    (tmp_path / "file").write_text("seen\n")
    script = f"cat {tmp_path}/file; echo $HVKVM_PROBE >&2; touch {tmp_path}/lost; test -c /dev/kvm && exit 42"
    done = subprocess.run(
        [PROJECT / "scripts/lab", "--nested", "--timeout", "400", "--", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, HVKVM_PROBE="passed on"),
    )
    assert (done.returncode, done.stdout) == (42, "seen\n"), done.stderr
    assert "passed on" in done.stderr
    assert not (tmp_path / "lost").exists()


@pytest.mark.usefixtures("can_start")
@pytest.mark.timeout(900)
def test_a_kept_lab_serves_on_after_a_command_that_left_processes(place: Path) -> None:
    """Whatever session they are in and wherever they stand. hvkvm is found by its name, as README has it."""

    def kept(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROJECT / "scripts/lab", "--nested", *words],
            capture_output=True,
            text=True,
            check=False,
            env=dict(os.environ, XDG_RUNTIME_DIR=str(place)),
        )

    left = "sleep 4321 & setsid sleep 4321 & (setsid sh -c 'while :; do echo more; done' &); exit 3"
    try:
        first = kept("--keep", "--timeout", "400", "--", "sh", "-c", left)
        assert first.returncode == 3, first.stderr
        script = "hvkvm --version && ! grep -alsE '432[1]|echo mor[e]' /proc/[0-9]*/cmdline && echo alone"
        second = kept("--keep", "--timeout", "400", "--", "sh", "-c", script)
        assert second.returncode == 0, second.stderr
        assert second.stdout.startswith("hvkvm ")
        assert second.stdout.endswith("\nalone\n")
        assert "lab:" not in second.stderr  # the same machine, not another
    finally:
        assert kept("--stop").returncode == 0
