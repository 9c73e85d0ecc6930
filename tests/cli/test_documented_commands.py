"""Every command in README.md, docs/ and the help texts is understood, by the parsers that users meet.

What is cheap is run. A guest's command line is taken as far as a checked
configuration; the guests themselves are other tests' business.
"""

from __future__ import annotations

import ast
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import hvkvm as package
from hvkvm.boot.firmware import OVMF
from hvkvm.cli import (
    VERBS,
    completion,
    conform,
    ctl,
    disk,
    doctor,
    explain,
    features,
    man,
    matrix,
    replay,
    run,
    top,
    trace,
    usage,
    warm,
)
from hvkvm.cli.arguments import split_command
from hvkvm.cli.parsers import all_parsers
from hvkvm.errors import CapabilityMissing, ConfigError, HostExhausted, KvmIoctlError, Stuck
from hvkvm.hyperv.features import parse_features
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.outcome import Ending, of_fault
from hvkvm.record.explain import from_hex

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]


class Command(NamedTuple):
    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def blocks(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The fenced blocks: first line's number, language, lines."""
    inside: list[str] | None = None
    start, language = 0, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside, start, language = [], number + 1, line[3:].strip()
            else:
                yield start, language, inside
                inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None, f"{page}: a block that does not end"


PROGRAMS = ("hvkvm", "make", "scripts/", ".venv/bin/", "python", "socat")


def commands_of(name: str, first: int, lines: list[str]) -> Iterator[Command]:
    """The lines that begin with a program we know; in a block with prompts, those behind a prompt."""
    prompts = any(line.startswith("$ ") for line in lines)
    for number, line in enumerate(lines, first):
        text = line.strip().removeprefix("$ ")
        if prompts != line.startswith("$ ") or not text.startswith(PROGRAMS):
            continue
        if text.startswith("make "):
            text = re.split(r"\s{2,}", text)[0]  # a list of targets has each one's purpose behind two spaces
        words = shlex.split(re.sub(r"\s\.\.\.( |$)", r"\1", text), comments=True)
        if text.startswith("hvkvm: ") or not words:
            continue
        yield Command(f"{name}:{number}", tuple(word for word in words if word != "&"))


def inline_of(page: Path) -> Iterator[Command]:
    """Commands within sentences: what stands in back quotes and has more than a name."""
    outside = re.sub(
        r"^```.*?^```", lambda found: "\n" * found[0].count("\n"), page.read_text(), flags=re.M | re.S
    )
    for number, line in enumerate(outside.splitlines(), 1):
        for text in re.findall(r"`([^`]+)`", line):
            if text.startswith(PROGRAMS) and " " in text and "*" not in text:
                yield Command(f"{page.name}:{number}", tuple(shlex.split(text)))


def every_command() -> list[Command]:
    found: list[Command] = []
    for page in PAGES:
        for first, language, lines in blocks(page):
            if language != "python":
                found += commands_of(page.name, first, lines)
        found += inline_of(page)
    for name, text in (
        ("run.EPILOG", run.EPILOG),
        ("warm.EPILOG", warm.EPILOG),
        ("trace.EPILOG", trace.EPILOG),
        ("explain.EPILOG", explain.EPILOG),
        ("man.EPILOG", man.EPILOG),
        ("completion.EPILOG", completion.EPILOG),
        ("conform.EPILOG", conform.EPILOG),
        ("matrix.EPILOG", matrix.EPILOG),
    ):
        examples = [line for line in text.splitlines() if line.startswith("  hvkvm ")]
        found += commands_of(name, 1, examples)
    return found


COMMANDS = every_command()


def test_the_pages_have_commands() -> None:
    """So that a page written otherwise is not passed over in silence."""
    names = {command.where.partition(":")[0] for command in COMMANDS}
    assert {"README.md", "cookbook.md", "linux-guests.md", "run.EPILOG", "trace.EPILOG"} <= names
    verbs = {command.words[1] for command in COMMANDS if command.words[0] == "hvkvm"}
    assert verbs >= set(VERBS)
    assert len(COMMANDS) > 40


def check_hvkvm(words: tuple[str, ...]) -> None:
    verb, rest = words[0], list(words[1:])
    assert verb in VERBS
    if "--help" in rest or not rest:
        return  # a verb by its name
    if verb == "run":
        config, _options = run.config_from(rest)
        assert isinstance(config, MachineConfig)
        parse_features(config.hv)
    elif verb == "warm":
        config, _options = warm.parse(rest)
        assert config.awaits
    elif verb == "ctl":
        assert len(rest) > 1 or rest[0] in ctl.VERBS
        if len(rest) > 1 or rest[0] not in ("save", "kvp"):  # those by their names alone
            ctl.parse(rest)
    elif verb == "disk":
        disk.parse(rest)
    elif verb == "conform":
        conform.parse(rest)
    elif verb == "matrix":
        matrix.parse(rest)
    elif verb == "man":
        man.parse(rest)
    elif verb == "completion":
        completion.parse(rest)
    elif verb == "top":
        top.parse(rest)
    elif verb == "replay":
        replay.parser().parse_args(rest)
    elif verb == "explain":
        options = explain.parse(rest)
        if options.what and options.what != ["FILE"]:
            text = from_hex(" ".join(options.what), options.protocol)
            assert re.match(r"[A-Z_]+ \w+=|type=[A-Z_]+ \w+=", text), text
    elif verb == "features":
        options = features.parser().parse_args(rest)
        parse_features(options.list)
    elif verb == "doctor":
        doctor.parser().parse_args(rest)
    else:
        ours, command = split_command(rest)
        options = trace.parser().parse_args(ours)
        assert (options.pid is None) == bool(command)
        if options.filter:
            trace.wanted_requests(options.filter)
        if command[:1] == ("hvkvm",):
            check_hvkvm(command[1:])


def check(words: tuple[str, ...]) -> None:
    program, rest = words[0], words[1:]
    if program in ("hvkvm", ".venv/bin/hvkvm"):
        check_hvkvm(rest)
    elif program == "make":
        dry = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
        for word in rest:
            if word.startswith("CMD="):
                check(tuple(shlex.split(word.removeprefix("CMD="))))
    elif program.startswith("scripts/"):
        script = ROOT / program
        assert script.is_file()
        assert script.stat().st_mode & 0o111
        text = "".join(path.read_text() for path in (script, *(ROOT / "scripts/steps").glob("*.py")))
        for word in rest[: rest.index("--") if "--" in rest else None]:
            assert not word.startswith("--") or f'"{word}"' in text, f"{program} has no {word}"
        inner = rest[rest.index("--") + 1 :] if "--" in rest else ()
        if inner and inner[0] != "COMMAND":
            check(inner)
    elif program in ("python", ".venv/bin/python"):
        if rest[0] == "-m":
            assert rest[1] == "pytest"
            for word in rest[2:]:
                assert "/" not in word or (ROOT / word).exists(), word
        else:
            assert (ROOT / rest[0]).is_file()
    else:
        assert program == "socat"


@pytest.fixture(autouse=True)
def named_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands name is there, where they are run."""
    images = ("disk.raw", "d.vhdx", "data.raw", "golden.raw", "install.iso")
    for name in ("vmlinuz", "x.flat", "initrd.img", "FILE", "guest.state", "warm.state", "test", *images):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "guest.toml").write_text('kernel = "vmlinuz"\n')
    for name in ("DIR", "modules"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_is_understood(command: Command) -> None:
    check(command.words)


def test_a_command_that_does_not_exist_is_found_out() -> None:
    wrong = ("hvkvm rum", "hvkvm run --kernel k --no-such", "hvkvm ctl explode --json", "make nothing")
    for text in (*wrong, "scripts/no", "scripts/lab --no-such -- hvkvm doctor"):
        with pytest.raises((ConfigError, AssertionError)):
            check(tuple(text.split()))


def cheap() -> list[tuple[str, ...]]:
    """Those that need no guest, once each."""
    asks_the_host = {command.words for command in COMMANDS if command.words[:1] == ("hvkvm",)}
    return sorted(
        words for words in asks_the_host if words[1] in ("doctor", "features") or words[-1] == "--help"
    )


@pytest.mark.kvm
@pytest.mark.parametrize("words", cheap(), ids=" ".join)
def test_a_cheap_one_runs(hvkvm: Hvkvm, words: tuple[str, ...]) -> None:
    result = hvkvm(*words[1:])
    status = 0
    if "--windows" in words and not any(path.is_file() for path in OVMF):
        status = CapabilityMissing.exit_status  # the firmware that a Windows guest would need
        assert "apt install ovmf" in result.stdout, result
    assert (result.returncode, result.stderr) == (status, ""), result


def known_flags() -> set[str]:
    found = {
        name
        for parser in all_parsers().values()
        for action in parser._actions
        for name in action.option_strings
    }
    plugin = (ROOT / "hvkvm/testing/fixtures.py").read_text()
    found |= set(re.findall(r'"(--hvkvm-[a-z]+)"', plugin)) | {"--junitxml", "--device"}
    for script in (ROOT / "scripts").rglob("*"):
        if script.is_file() and script.suffix in ("", ".py"):
            found |= set(re.findall(r"--[a-z][a-z-]*[a-z]", script.read_text()))
    of_others = {
        "--write",
        "--nthreads",
        "--no-dashboard",
        "--rm",
        "--group-add",
        "--inquiry",
        "--all",
    }  # probe.py's, dask's, docker's, sdparm's
    return found | of_others


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_flag_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page.read_text()))
    assert named - known_flags() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_is_about_what_there_is(page: Path) -> None:
    for _first, language, lines in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse("\n".join(lines))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "hvkvm"
            ):
                assert hasattr(package, node.attr), node.attr
            called = node.func if isinstance(node, ast.Call) else None
            if (
                isinstance(node, ast.Call)
                and isinstance(called, ast.Attribute)
                and called.attr == "MachineConfig"
            ):
                assert {keyword.arg for keyword in node.keywords} <= set(MachineConfig._fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, (target, anchor)


def statuses(verb: str) -> str:
    """Where exit statuses are listed: of a verb, in a page, or of all."""
    if verb.endswith(".md"):
        return (ROOT / verb).read_text()
    return all_parsers()[verb].format_help() if verb else man.overview()


@pytest.mark.parametrize("verb", ["run", "warm", "README.md", "docs/ci.md", ""])
def test_the_status_of_a_host_without_room_is_listed(verb: str) -> None:
    text = " ".join(statuses(verb).split())
    left = "the host has no files, memory or threads left"
    assert f"{HostExhausted.exit_status} KVM unavailable, or {left}; 74" in text
    fault = of_fault(HostExhausted(""), "")
    assert fault.ending is Ending.HOST_EXHAUSTED
    assert of_fault(ValueError(), "") == (Ending.HOST_ERROR, fault.status, "")
    ours = "KVM internal error or refusal, a reset without a kernel any more"
    ours += f", {Ending.HOST_ERROR.value}, {Ending.STUCK.value}"
    assert Stuck.exit_status == KvmIoctlError(22, "KVM_RUN", "vcpu").exit_status == fault.status
    assert f"{fault.status} triple fault, {ours}, or {left} while the guest runs; 255" in text


@pytest.mark.parametrize("verb", ["run", "warm", "matrix", "README.md", "docs/ci.md", "docs/matrix.md", ""])
def test_the_status_of_each_signal_that_ends_a_run_is_listed(verb: str) -> None:
    """128 and the signal's number, wherever exit statuses are listed; `test_run` has each seen."""
    text = statuses(verb)
    numbers = {name: 128 + getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM")}
    wanted = "{SIGINT} interrupted ({SIGHUP} by SIGHUP, {SIGTERM} by SIGTERM)".format(**numbers)
    assert wanted in " ".join(text.split())


def test_what_stands_in_place_of_a_verb_is_in_the_help() -> None:
    assert "`hvkvm --version`" in usage()
