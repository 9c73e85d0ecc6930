"""docs/control.md has every request of the control socket, its fields, and every kind of failure."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import guest_images
import pytest
from running_vm import running_vm

MACHINE = Path(__file__).parents[2] / "hvkvm/machine"
PAGE = (MACHINE.parents[1] / "docs/control.md").read_text()
SOURCES = [*MACHINE.glob("control*.py"), MACHINE.parent / "observe/control_socket.py"]


def rows() -> dict[str, str]:
    """Each request, with what stands beside it."""
    table = PAGE.partition('| `"do"` |')[2]
    cells = re.findall(r"^\| (`\w+`[^|]*) (\|.*)$", table, re.MULTILINE)
    return {name: rest for names, rest in cells for name in re.findall(r"`(\w+)`", names)}


def test_each_field_and_each_kind_of_failure_is_in_it() -> None:
    code = "".join(source.read_text() for source in SOURCES)
    fields = set(re.findall(r"""request(?:\.get\(|\[)"(\w+)\"""", code))
    fields |= set(re.findall(r"""text\(request, "(\w+)\"""", code))
    fields |= set(re.findall(r'"(\w+)" in request', code))
    shown = set(re.findall(r'`"?(\w+)"?`', PAGE))
    assert fields - shown == set()
    kinds = set(re.findall(r"""\bfail\(\s*"(\w+)\"""", code))
    assert kinds | {"internal"} == set(re.findall(r"^- `(\w+)`:", PAGE, re.MULTILINE))


@pytest.mark.kvm
def test_each_request_is_in_it_and_its_example_is_right(tmp_path: Path) -> None:
    agent = ("--kernel", guest_images.image("agent"), "--memory", "64M", "--synic", "user", "--quiet")
    with running_vm(tmp_path, *agent, "--name", "one") as vm:
        vm.wait_until_listening()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "hvkvm/one.sock"))
            with client.makefile("rw") as lines:

                def ask(text: str) -> Any:
                    print(text, file=lines, flush=True)
                    return json.loads(lines.readline())

                unknown = ask('{"do": "?", "id": 7}')
                (example,) = re.findall(r"echo '(.*)' \| socat", PAGE)
                disks = ask(example)
    assert (unknown["ok"], unknown["kind"], unknown["id"]) == (False, "usage", 7)
    assert set(unknown["error"].partition("there are ")[2].split(", ")) == set(rows())
    assert disks["ok"] is False  # without a bus for them
    assert "no bus for disks" in disks["error"]
