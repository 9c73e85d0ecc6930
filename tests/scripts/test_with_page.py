"""scripts/steps/with_page.sh: the page that `make run` has for its guest, with a script in hvkvm's place."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from select import select

import pytest

WITH_PAGE = Path(__file__).parents[2] / "scripts/steps/with_page.sh"
TEXT = "a page for the guest"
# It tells its options and its process id, fetches the page once that is there, and ends with 7.
HVKVM = """#!/bin/sh
echo "$@"
echo $$
[ "$2" != --net ] || until busybox wget -q -O - http://127.0.0.1:PORT/; do sleep 0.1; done
exit 7
"""

needs_busybox = pytest.mark.skipif(
    shutil.which("busybox") is None, reason="no busybox; make setup installs it"
)


@pytest.fixture
def run(tmp_path):
    """`run(path)` starts it with that PATH: its process, and the page's port."""
    page = tmp_path / "a folder" / "index.html"
    page.parent.mkdir()
    page.write_text(f"{TEXT}\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    hvkvm = tmp_path / "hvkvm"
    hvkvm.write_text(HVKVM.replace("PORT", str(port)))
    hvkvm.chmod(0o755)

    def started(path):
        command = [WITH_PAGE, shutil.which("busybox"), str(port), page, hvkvm, "run", "--kernel", "a b"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": path}, check=False
        ), port

    return started


def links(folder, *names):
    """A folder with these programs alone."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def has_ended(port):
    """Whether nobody listens at `port` any more, or soon does not."""
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)):
                return True
        select([], [], [], 0.1)
    return False


@needs_busybox
@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup has it")
def test_the_page_is_there_while_hvkvm_runs(run):
    done, port = run(os.environ["PATH"])
    if "passt does not work here" in done.stderr:
        pytest.skip("passt does not work here")
    assert done.returncode == 7
    assert done.stdout.splitlines()[0] == "run --net user --module hv_netvsc --kernel a b"
    assert done.stdout.splitlines()[2] == TEXT
    assert has_ended(port)


@needs_busybox
def test_without_passt_a_line_says_so_and_hvkvm_runs_as_ever(run, tmp_path):
    done, _port = run(links(tmp_path / "bin", "sh", "busybox"))
    assert done.returncode == 7
    assert done.stdout.splitlines()[0] == "run --kernel a b"
    assert done.stderr == "run: no passt here, so the guest has no network (apt-get install passt)\n"


@needs_busybox
def test_a_passt_that_does_not_work_is_told(run, tmp_path):
    folder = links(tmp_path / "bin", "sh", "busybox", "false")
    (tmp_path / "bin" / "passt").symlink_to(shutil.which("false"))
    done, _port = run(folder)
    assert done.returncode == 7
    assert done.stdout.splitlines()[0] == "run --kernel a b"
    assert done.stderr.startswith("run: passt does not work here, so the guest has no network")
