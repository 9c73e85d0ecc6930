"""`hvkvm matrix --dask` with workers on loopback: files travel, a killed worker is not missed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from running_vm import command_line

from hvkvm.testing.micro_image import micro_image

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(400)]
if importlib.util.find_spec("distributed") is None:
    pytestmark.append(pytest.mark.skip(reason="needs Dask's distributed (hvkvm[dask])"))

SECONDS = 200.0
WORKERS = 3
MACHINE = '[machine]\nmemory = "16M"\nhv = "none"\nacpi = false\n'


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


class Cluster:
    """A scheduler, and workers that each have a cache of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        file = folder / "scheduler.json"
        self.scheduler = self._dask(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)
        )
        wait_for(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler's file")
        self.address = json.loads(file.read_text())["address"]
        self.workers = [self.add_worker(number) for number in range(WORKERS)]

    def add_worker(self, number: int) -> subprocess.Popen[bytes]:
        made = self.folder / f"made{number}"
        made.mkdir()
        own = {"HVKVM_CACHE": str(self.folder / f"cache{number}"), "TMPDIR": str(made)}
        words = ("worker", self.address, "--nthreads", "1", "--no-nanny", "--name", str(number))
        return self._dask(*words, "--local-directory", str(self.folder), **own)

    def _dask(self, *words: str, **more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
        log = self._stack.enter_context((self.folder / f"log{words[0]}{len(words)}").open("ab"))
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **more})
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def guests(self, number: int) -> list[int]:
        """The processes of a worker's cases."""
        mark = str(self.folder / f"made{number}").encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    for name, source in (
        ("good", 'print "hello\\n"\n'),
        ("spin", 'print "spinning\\n"\n1: jmp 1b\n'),
    ):
        (tmp_path / name).write_bytes(micro_image(source).read_bytes())
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def file(folder: Path, text: str) -> Path:
    path = folder / "m.toml"
    path.write_text(MACHINE + text)
    return path


def start(path: Path, cluster: Cluster, *more: object) -> subprocess.Popen[str]:
    command = command_line("matrix", path, "--dask", cluster.address, *more)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_cases_run_on_workers(cluster: Cluster, tmp_path: Path) -> None:
    ctrl_c_ends_the_guests_on_the_workers(cluster, tmp_path)
    a_killed_workers_cases_run_elsewhere(cluster, tmp_path)


def ctrl_c_ends_the_guests_on_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    path = file(tmp_path, 'kernel = "spin"\n[axes]\ncpus = [1, 2]\n')
    with start(path, cluster) as process:
        wait_for(lambda: any(cluster.guests(number) for number in range(WORKERS)), "a guest that runs")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, (out, err)
    assert out.splitlines()[-1] == "2 cases: 2 ended"
    wait_for(lambda: not any(cluster.guests(number) for number in range(WORKERS)), "the guests' end")


def a_killed_workers_cases_run_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    path = file(
        tmp_path,
        '[axes]\nkernel = ["spin", "good"]\ncpus = [1, 2, 3]\n[[command]]\nname = "boot"\nseconds = 5\n',
    )
    with start(path, cluster, "--json", tmp_path / "j.json") as process:
        wait_for(lambda: any(cluster.guests(number) for number in range(WORKERS)), "a guest that runs")
        lost = next(number for number in range(WORKERS) if cluster.guests(number))
        cluster.workers[lost].kill()
        wait_for(lambda: not cluster.guests(lost), "the end of its guest")
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, (out, err)
    assert out.splitlines()[-1] == "6 cases: 3 ok, 3 timeout"
    found = json.loads((tmp_path / "j.json").read_text())["cases"]
    assert [case["verdict"] for case in found] == ["timeout"] * 3 + ["ok"] * 3
    assert found[3]["output"] == "hello\n"
    assert len({case["where"] for case in found}) <= WORKERS
    caches = [tmp_path / f"cache{number}/parcels" for number in range(WORKERS) if number != lost]
    assert any(len(list(cache.iterdir())) == 2 for cache in caches if cache.exists())


def test_no_scheduler_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(micro_image("").read_bytes())
    path = file(tmp_path, 'kernel = "good"\n')
    command = command_line("matrix", path, "--dask", "tcp://127.0.0.1:1")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hvkvm: --dask tcp://127.0.0.1:1: no scheduler answers")
    assert "Traceback" not in done.stderr
