"""The file of a matrix: what it asks for, and one clear line for everything that it cannot."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hvkvm.errors import ConfigError
from hvkvm.testing.matrix import process, report
from hvkvm.testing.matrix.cases import ERROR, FAILED, OK, SKIPPED, Result
from hvkvm.testing.matrix.file import MAX_CASES, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "d.raw"):
        (tmp_path / name).write_bytes(bytes(4096))
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-1.2").write_bytes(b"k")
    (tmp_path / "lib/modules/1.2").mkdir(parents=True)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "m.toml"
    path.write_text(text)
    return path


def test_each_value_meets_each_other(folder: Path) -> None:
    cases = read(
        written(
            folder,
            """
            [machine]
            memory = "64M"
            vmbus = "on"
            [axes]
            kernel = ["a", "b"]
            cpus = [1, 4]
            disk = [{name = "none"}, {name = "raw", disks = ["d.raw"]}]
            [[command]]
            name = "one"
            run = ["true", "x y"]
            [[command]]
            run = "echo two"
            seconds = 7
            status = 3
            stdout = "two"
            """,
        )
    )
    assert len(cases) == 16
    assert [case.number for case in cases] == list(range(1, 17))
    first, second = cases[0], cases[1]
    assert first.title == "kernel=a cpus=1 disk=none one"
    assert first.config.command == ("true", "x y")
    assert (first.config.kernel, first.config.memory, first.config.timeout) == (folder / "a", 64 << 20, 300)
    assert second.config.command == ("sh", "-c", "echo two")
    assert (second.name, second.config.timeout, second.status, second.stdout) == ("echo two", 7, 3, "two")
    assert {case.config.cpus for case in cases} == {1, 4}
    assert first.group == second.group != 0
    with_disk = [case for case in cases if case.config.disks]
    assert len(with_disk) == 8
    assert all(case.config.disks[0].snapshot and case.group == 0 for case in with_disk)
    assert with_disk[0].config.disks[0].file == str(folder / "d.raw")
    assert len({case.group for case in cases if case.group}) == 4


def test_a_guest_without_a_command_and_one_that_must_boot(folder: Path) -> None:
    (only,) = read(written(folder, '[machine]\nkernel = "a"\n'))
    assert (only.config.command, only.config.command_io, only.group, only.title) == ((), "console", 0, "boot")
    text = 'warm = false\n[machine]\nkernel = "a"\n[[command]]\nrun = "x"\n[[command]]\nrun = "y"\n'
    assert [case.group for case in read(written(folder, text))] == [0, 0]


def test_each_case_writes_files_of_its_own(folder: Path) -> None:
    text = """
        [machine]
        kernel = "a"
        vmbus = "on"
        timeline = "t.svg"
        record = ["r.pcapng,depth=full", "/dev/null"]
        nets = ["user,pcap=n.pcap"]
        [axes]
        cpus = [1, 2]
    """
    for case in read(written(folder, text)):
        number = case.number
        assert case.config.timeline == folder / f"t-{number}.svg"
        assert [one.file for one in case.config.record] == [folder / f"r-{number}.pcapng", Path("/dev/null")]
        assert case.config.record[0].depth == "full"
        assert [nic.pcap for nic in case.config.nets] == [folder / f"n-{number}.pcap"]
    (only,) = read(written(folder, text.replace("[1, 2]", "[1]")))
    assert (only.config.timeline, only.config.record[0].file) == (folder / "t.svg", folder / "r.pcapng")
    own = '[machine]\nkernel = "a"\nvmbus = "on"\n[axes]\nrecord = [["x"], ["y"]]\n'
    assert [case.config.record[0].file.name for case in read(written(folder, own))] == ["x", "y"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('vsock = "v"', "vsock: {}/v is given to 2 cases, and each makes this socket; leave it out, give"),
        (
            'firmware = "auto"\nfirmware_vars = "f"',
            "firmware_vars: {}/f is given to 2 cases, and each writes it",
        ),
        ('control = "c"', "control: {}/c is given to 2 cases, and each makes this socket"),
        ('control = "auto"\nname = "n"', "name: n is given to 2 cases, and each makes a control socket"),
        ('nets = ["listen=l"]', "nets listen: {}/l is given to 2 cases"),
        ('nets = ["tap=t"]', "nets tap: t is given to 2 cases"),
        ('nets = ["create,name=t"]', "nets name: t is given to 2 cases"),
        ('nets = ["user,forward=2222-22"]', "nets forward: tcp:127.0.0.1:2222 is given to 2 cases"),
        ('record = ["pipe"]', "record: {}/pipe is a pipe, and several cases write to it; name a file"),
    ],
)
def test_what_only_one_machine_can_have_is_not_given_to_several(folder: Path, keys: str, said: str) -> None:
    os.mkfifo(folder / "pipe")
    machine = f'[machine]\nkernel = "a"\nvmbus = "on"\n{keys}\n'
    assert len(read(written(folder, machine))) == 1
    with pytest.raises(ConfigError) as caught:
        read(written(folder, f"{machine}[axes]\ncpus = [1, 2]\n"))
    assert str(caught.value).endswith("run them with --jobs 1")
    assert len(read(written(folder, f"{machine}[axes]\ncpus = [1, 2]\n"), alone=True)) == 2
    assert str(caught.value).startswith(f"{folder}/m.toml: {said.format(folder)}")
    assert "\n" not in str(caught.value)


def test_a_name_that_leads_to_no_socket_may_be_shared_and_a_made_name_not_be_anothers(folder: Path) -> None:
    machine = '[machine]\nkernel = "a"\nvmbus = "on"\nname = "n"\n'
    assert len(read(written(folder, machine + "[axes]\ncpus = [1, 2]\n"))) == 2
    values = ", ".join(f"{{name = '{n}', record = ['{file}']}}" for n, file in enumerate(("r", "r", "r-1")))
    with pytest.raises(ConfigError, match=r"/r of case 1 is .*/r-1, which is given, too; name another"):
        read(written(folder, f"{machine}[axes]\nfile = [{values}]\n"))


def test_a_title_is_one_line(folder: Path) -> None:
    text = '''
        [machine]
        kernel = "a"
        [[command]]
        run = """

          set -e
          true"""
        [[command]]
        run = "set -e\\nfalse\\n"
        [[command]]
        run = ["sh", "-c", "%s\\ntrue"]
        [[command]]
        run = "uname\\n"
        [[command]]
        name = "own"
        run = "set -e\\ntrue"
    '''
    found = read(written(folder, text.replace("%s", "x" * 100)))
    assert [case.title for case in found] == [
        "set -e ...",
        "set -e ... (2)",
        f"sh -c {'x' * 54} ...",
        "uname",
        "own",
    ]
    assert found[1].config.command == ("sh", "-c", "set -e\nfalse\n")


def test_modules_are_found_beside_the_kernel(folder: Path) -> None:
    (case,) = read(written(folder, '[machine]\nkernel = "boot/vmlinuz-1.2"\nmodules = ["hv_utils"]\n'))
    assert case.config.modules_dir is not None
    assert case.config.modules_dir.samefile(folder / "lib/modules/1.2")
    (in_folder,) = read(written(folder, '[axes]\nkernel = ["."]\n'))
    assert in_folder.config.kernel is not None
    assert in_folder.config.kernel.samefile(folder / "boot/vmlinuz-1.2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[machine", "give a readable TOML file"),
        ("[machin]", "m.toml: machin: unknown; the tables are machine, axes, command, warm"),
        ("machine = 1", "m.toml: machine: no table; write [machine]"),
        ("warm = 3", "m.toml: warm: 3 is no bool"),
        ("[machine]\nkernal = 'a'", "m.toml: [machine] kernal: unknown; the keys are "),
        ("[machine]\nkernel = 'no'", "no: no such file; check the path"),
        ("[machine]\nkernel = 'lib'", "m.toml: [machine] kernel: "),
        (
            "[machine]\nkernel = 'a'\ntimeout = 3",
            "m.toml: [machine] timeout: is a case's own; give seconds to",
        ),
        ("[machine]\nkernel = 'a'\ncpus = 'x'", "[machine] cpus: 'x'"),
        ("[machine]\nkernel = 'a'\n[axes]\ncpus = [0]", "m.toml: the case cpus=0: --cpus 0: "),
        ("[machine]\ncpus = 1", "m.toml: [machine]: kernel: missing; name one in [machine] or [axes]"),
        ("[axes]\nkernel = 'a'", "m.toml: [axes] kernel: no list"),
        ("[axes]\nkernel = []", "m.toml: [axes] kernel: no list"),
        ("[axes]\nkernel = ['a', 'a']", "m.toml: [axes] kernel: a is there twice"),
        ("[axes]\nthing = [1]", "m.toml: [axes] thing: no key of a machine; write tables"),
        ("[axes]\nthing = [{cpus = 1}]", "m.toml: [axes] thing: a table without a name"),
        ("[axes]\nthing = [{name = 'x', cpuss = 1}]", "m.toml: [axes] thing cpuss: unknown"),
        ("command = 3", "m.toml: command: no list of tables; write [[command]]"),
        ("[[command]]\nrum = 'x'", "m.toml: [[command]] rum: unknown; the keys are name, run"),
        ("[[command]]\nrun = 3", "m.toml: [[command]] run: 3 has the wrong type; write text in quotes, or"),
        ("[[command]]\nrun = []", "m.toml: [[command]] run: no command"),
        ("[[command]]\nrun = [1]", "m.toml: [[command]] run: no command"),
        ('[[command]]\nname = "a\\nb"', "m.toml: [[command]] name: 'a\\nb' has several lines; write one"),
        ('[axes]\nx = [{name = "a\\nb"}]', "m.toml: [axes] x: 'a\\nb' has several lines; write one"),
        ('[axes]\n"a\\nb" = [1]', "m.toml: [axes]: 'a\\nb' has several lines; write one"),
        ("[[command]]\nseconds = 0", "m.toml: [[command]] seconds: 0 is no time limit"),
        ("[[command]]\nseconds = true", "m.toml: [[command]] seconds: true has the wrong type; write a num"),
        ("[[command]]\nstatus = 256", "m.toml: [[command]] status: 256 is no exit status"),
        ("[[command]]\nrun = 'x'\n[[command]]\nrun = 'x'", "m.toml: [[command]] name: x is there twice"),
    ],
)
def test_every_error_is_one_line_with_table_key_reason_and_remedy(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(written(folder, text))
    line = str(caught.value)
    assert said in line
    assert "\n" not in line
    assert line.startswith(f"{folder}/m.toml: ")


def test_too_many_cases_are_refused_before_they_are_made(folder: Path) -> None:
    many = ", ".join(f'{{name = "{n}"}}' for n in range(101))
    with pytest.raises(ConfigError, match=f"10201 cases, more than {MAX_CASES}"):
        read(written(folder, f'[machine]\nkernel = "a"\n[axes]\none = [{many}]\ntwo = [{many}]\n'))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; give a readable TOML file"):
        read(tmp_path / "no.toml")


def test_the_reports_say_the_same(folder: Path) -> None:
    cases = read(written(folder, '[machine]\nkernel = "a"\n[axes]\ncpus = [1, 2, 3, 4]\n'))
    found = [
        Result(OK, "", 0, 1.5, "user", True),
        Result(FAILED, "status 3", 3, 2.0, "", False, "", "bell \x07", "last words\n" * 40),
        Result(SKIPPED, "no KVM"),
        Result(ERROR, "crashed", 254, 1.0),
    ]
    results = dict(enumerate(found, 1))
    lines = list(report.table(results, cases))
    assert lines[0].split() == ["CPUS", "COMMAND", "RESULT", "SECONDS", "SYNIC"]
    assert lines[1].split() == ["1", "boot", "ok", "1.5,", "warm", "user"]
    assert lines[-1] == "4 cases: 1 ok, 1 failed, 1 error, 1 skipped"
    shown = "\n".join(report.shown(cases[1], found[1]))
    assert "cpus=2 boot: failed: status 3" in shown
    assert "| bell ?" in shown
    assert "(10 lines before)" in shown
    suite = ET.fromstring(report.junit(results, cases, "m.toml"))
    numbers = [suite.get(key) for key in ("tests", "failures", "errors", "skipped")]
    assert numbers == ["4", "1", "1", "1"]
    assert [case.get("classname") for case in suite] == ["cpus=1", "cpus=2", "cpus=3", "cpus=4"]
    text = json.loads(json.dumps(report.as_json(results, cases)))
    assert text["counts"] == {"ok": 1, "failed": 1, "error": 1, "skipped": 1}
    assert text["cases"][1]["place"] == {"cpus": "2"}


@pytest.mark.parametrize("record", ["[" * 60_000, "1" * 5000 + "}", "", '"quit"'])
def test_a_record_that_cannot_be_read_stays_among_the_errors(record: str) -> None:
    errors = f'a warning\n{{"ending": {record}\n'
    assert process._split(errors) == (errors, {})


def test_the_pages_table_is_that_of_its_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/matrix.md").read_text()
    shown = [
        line for line in page.partition("$ hvkvm matrix")[2].partition("```")[0].splitlines()[1:] if line
    ]
    for version in ("6.1", "6.12"):
        kernel = tmp_path / f"vmlinuz-{version}"
        (kernel / "boot").mkdir(parents=True)
        (kernel / f"boot/vmlinuz-{version}").write_bytes(b"k")
        (kernel / f"lib/modules/{version}").mkdir(parents=True)
    (tmp_path / "d.vhdx").write_bytes(b"\0")
    cases = read(written(tmp_path, page.partition("```toml\n")[2].partition("```")[0]))
    missing = "'hv_storvsc' is not in its output"
    results = {}
    for case in cases:
        place = dict(case.place)
        bad = case.name == "drivers" and place["disk"] == "none"
        seconds = 1.2 if bad else 1.3 if case.group else 5.1
        verdict, why = (FAILED, missing) if bad else (OK, "")
        results[case.number] = Result(verdict, why, 0, seconds, place["synic"], bool(case.group))
    said = list(report.table(results, cases))
    assert shown == [*said[:4], "...", said[-1]]
