"""`hvkvm matrix --dask` with workers on loopback: files travel, a killed worker is not missed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from dask_cluster import SECONDS, WORKERS, Cluster, wait_for
from running_vm import command_line

from hvkvm.testing.matrix.parcels import CHUNK_BYTES, Store, digest_of
from hvkvm.testing.matrix.remote import RemoteRun
from hvkvm.testing.matrix.worker import Booted
from hvkvm.testing.micro_image import micro_image

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(400)]
if importlib.util.find_spec("distributed") is None:
    pytestmark.append(pytest.mark.skip(reason="needs Dask's distributed (hvkvm[dask])"))

SLOW = """
    rdtsc
    shlq    $32, %rdx
    leaq    (%rax, %rdx), %rbx
    movabsq $10000000000, %rax      # some seconds
    addq    %rax, %rbx
1:  pause
    rdtsc
    shlq    $32, %rdx
    addq    %rdx, %rax
    cmpq    %rbx, %rax
    jb      1b
"""
MACHINE = '[machine]\nmemory = "16M"\nhv = "none"\nacpi = false\n'


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    for name, source in (
        ("good", 'print "hello\\n"\n'),
        ("slow", SLOW),
        ("spin", "1: jmp 1b"),
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
    what_one_worker_has_travels_to_the_others(cluster, tmp_path)
    a_guest_that_does_not_become_warm_is_booted(cluster, tmp_path)
    ctrl_c_ends_the_guests_on_the_workers(cluster, tmp_path)
    a_killed_workers_cases_run_elsewhere(cluster, tmp_path)
    a_scheduler_that_goes_is_told(cluster, tmp_path)


def what_one_worker_has_travels_to_the_others(cluster: Cluster, tmp_path: Path) -> None:
    """As a warm guest does, which one worker has made."""
    made = tmp_path / "made-there"
    made.write_bytes(os.urandom(CHUNK_BYTES + 12345))
    digest = digest_of(made)
    stores = [Store(tmp_path / f"cache{number}/parcels") for number in range(WORKERS)]
    stores[1].path(digest).parent.mkdir(parents=True)
    made.rename(stores[1].path(digest))
    with RemoteRun([], lambda case, result: None, cluster.address, print) as run:
        run._client.wait_for_workers(WORKERS, timeout=SECONDS)  # they come one after the other
        assert run._fetch(Booted(digest, CHUNK_BYTES + 12345))
        assert not run._fetch(Booted("0" * 64, 1))
        run._send([digest])
    assert [digest_of(store.path(digest)) for store in stores] == [digest] * WORKERS
    for store in stores:
        store.path(digest).unlink()


def a_guest_that_does_not_become_warm_is_booted(cluster: Cluster, tmp_path: Path) -> None:
    commands = "".join(f'[[command]]\nrun = "{name}"\n' for name in ("true", "false"))
    with start(file(tmp_path, f'kernel = "good"\n{commands}'), cluster) as process:
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, (out, err)
    assert out.count("takes no initramfs for a command") == 2
    assert out.splitlines()[-1] == "2 cases: 2 error"


def ctrl_c_ends_the_guests_on_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    path = file(tmp_path, 'kernel = "spin"\n[axes]\ncpus = [1, 2]\n')
    with start(path, cluster) as process:
        wait_for(cluster.busy, "a guest that runs")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, (out, err)
    assert out.splitlines()[-1] == "2 cases: 2 ended"
    wait_for(lambda: not cluster.busy(), "the guests' end")


def a_killed_workers_cases_run_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    path = file(tmp_path, '[axes]\nkernel = ["slow", "good"]\ncpus = [1, 2, 3]\n')
    with start(path, cluster, "--json", tmp_path / "j.json") as process:
        lost = wait_for(cluster.busy, "a guest that runs")[0]
        cluster.workers[lost].kill()
        wait_for(lambda: not cluster.guests(lost), "the end of its guest")
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, (out, err)
    assert out.splitlines()[-1] == "6 cases: 6 ok"
    found = json.loads((tmp_path / "j.json").read_text())["cases"]
    assert found[3]["output"] == "hello\n"
    caches = [tmp_path / f"cache{number}/parcels" for number in range(WORKERS) if number != lost]
    assert any(len(list(cache.iterdir())) >= 2 for cache in caches if cache.exists())


def a_scheduler_that_goes_is_told(cluster: Cluster, tmp_path: Path) -> None:
    path = file(tmp_path, 'kernel = "spin"\n')
    with start(path, cluster) as process:
        wait_for(cluster.busy, "a guest that runs")
        cluster.scheduler.kill()
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, (out, err)
    assert "error: the scheduler is gone" in out
    assert "Traceback" not in err
    assert out.splitlines()[-1] == "1 cases: 1 error"


def test_no_scheduler_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(micro_image("").read_bytes())
    path = file(tmp_path, 'kernel = "good"\n')
    command = command_line("matrix", path, "--dask", "tcp://127.0.0.1:1")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hvkvm: --dask tcp://127.0.0.1:1: no scheduler answers")
    assert "Traceback" not in done.stderr


def test_an_answer_that_was_lost_with_its_worker_is_waited_for_again() -> None:
    """Dask has the case run once more: it was done, and then it is not."""
    again: list[object] = []
    lost = SimpleNamespace(key="k", status="lost", add_done_callback=again.append)
    run = RemoteRun.__new__(RemoteRun)
    run._done = SimpleQueue()
    run._futures = {"k": (lost, 1)}
    run._take(lost)
    assert (run._futures, again) == ({"k": (lost, 1)}, [run._done.put])


def test_a_scheduler_that_is_seen_to_be_gone_first_is_told_of_the_same() -> None:
    """Before its futures are: each case that is left was told as one that somebody had ended."""
    told: list[tuple[object, object]] = []
    run = RemoteRun.__new__(RemoteRun)
    run._client = SimpleNamespace(status="connecting")
    run._left = {number: SimpleNamespace(number=number) for number in range(2)}  # type: ignore[misc]
    run._told = lambda case, result: told.append((case.number, (result.verdict, result.why)))
    assert not run.turn()
    assert told == [(0, ("error", "the scheduler is gone")), (1, ("error", "the scheduler is gone"))]
    assert not run._left
