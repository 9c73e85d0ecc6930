"""Whatever the host refuses, whenever: a named end or an answer, all closed, no thread left, and no hang."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from guest_agent import DRAIN, EOM_PENDING, SCRATCH, GuestStuckError
from guest_machine import Guest, Poster
from host_failures import ERRNOS, HostFailures

from hvkvm.abi import tlfs
from hvkvm.errors import HvkvmError

SECONDS = 30.0
OUTSIDE_RAM = 0xD000_0000
SINT = 3


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> HostFailures:
    return HostFailures(monkeypatch)


@pytest.fixture
def uncaught(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What no thread caught, and what was raised where nobody hears it."""
    found: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(repr(args.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", lambda args: found.append(repr(args.exc_value)))
    return found


def open_files() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the folder's own
    return found


class ToldSo(HvkvmError):
    """An interface for programs raised what it says that it raises."""


class Life:
    """One machine's: built, started, everything used once that asks something of the host, reset, closed."""

    def __init__(self, folder: Path) -> None:
        self.control, self.vsock = folder / "control", folder / "vsock"
        self.guest: Guest | None = None

    def live(self) -> None:
        guest = self.guest = Guest(
            cpus=2,
            hv="passthrough",
            synic="user",
            memory=16 << 20,
            vmbus="on",
            vsock=self.vsock,
            control=str(self.control),
        )
        guest.agent.seconds = SECONDS
        guest.start()
        self.use_the_synic(guest)
        self.ask("info")
        self.ask("dump")
        boots = guest.agent.boots
        guest.machine.request_reset("test")
        guest.agent.await_online(boots + 1)

    def use_the_synic(self, guest: Guest) -> None:
        guest.enlighten()
        cpu = guest[0]
        cpu.synic_on(simp=OUTSIDE_RAM, siefp=SCRATCH, sints={SINT: DRAIN | EOM_PENDING})
        cpu.simp(SCRATCH + 0x1000)
        cpu.do("WRMSR", tlfs.HV_X64_MSR_REFERENCE_TSC, SCRATCH + 0x2000 | 1)
        cpu.do("WRMSR", tlfs.HV_X64_MSR_STIMER0_CONFIG, SINT << 16 | 1 << 3)
        cpu.do("WRMSR", tlfs.HV_X64_MSR_STIMER0_CONFIG + 1, guest.machine.hyperv.reference_time() + 20_000)
        heard = threading.Event()
        try:
            added = guest.partition.connections.add_event(0x77, heard.set)
        except OSError as error:
            raise ToldSo(str(error)) from error  # as its documentation says: the caller's to answer
        assert added == 0
        cpu.hypercall(tlfs.HVCALL_SIGNAL_EVENT | 1 << 16, 0x77)
        guest.until(heard.is_set, "the event comes")
        poster = Poster(guest, 0, SINT)
        assert poster.post(b"x") == 0
        poster.await_completions(1)
        poster.close()

    def ask(self, what: str) -> dict[str, Any]:
        """One request on the control socket; nothing if it hangs up instead, which is an answer too."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(str(self.control))
            answer = b""
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(json.dumps({"do": what}).encode() + b"\n")
                while not answer.endswith(b"\n"):
                    more = client.recv(1 << 16)
                    if not more:
                        break
                    answer += more
        return dict(json.loads(answer or "{}"))

    def close(self) -> None:
        if self.guest is not None:
            self.guest.close()


def one_life(folder: Path, failures: HostFailures, at: int, number: int) -> tuple[str | None, str]:
    """What failed, if it came so far; and what became of it."""
    failures.fail(at, number)
    life = Life(folder)
    what = "went on"
    try:
        try:
            life.live()
        finally:
            life.close()
    except HvkvmError as error:
        what = f"{type(error).__name__}: {error}"
    except (GuestStuckError, OSError) as error:
        machine = life.guest.machine if life.guest is not None else None
        outcome = None if machine is None else machine.outcome
        what = f"ended: {outcome}"
        named = (number and os.strerror(number) in what) or "can't start new thread" in what
        assert named, f"{failures.failed}: {what}: {error!r}"
    return failures.failed, what


def nth_calls() -> Iterator[tuple[int, int]]:
    """Which call fails, and with what, until none does: all of them in a soak, else some of them."""
    if os.environ.get("HVKVM_SOAK"):
        return ((at, number) for at in count(1) for number in ERRNOS)
    return ((at, ERRNOS[at % len(ERRNOS)]) for at in count(1, 3))


@pytest.mark.kvm
@pytest.mark.user_synic
@pytest.mark.timeout(0 if "HVKVM_SOAK" in os.environ else 400)
def test_each_call_that_fails_has_an_answer(
    tmp_path: Path, failures: HostFailures, uncaught: list[str]
) -> None:
    one_life(tmp_path, failures, 0, 0)  # imports what is to be imported
    files, threads = open_files(), set(threading.enumerate())
    faults: list[str] = []
    seen: set[str] = set()
    for at, number in nth_calls():
        try:
            failed, what = one_life(tmp_path, failures, at, number)
        except Exception as error:
            failed, what = failures.failed, repr(error)
            faults.append(f"{failed}: {what}")
        gc.collect()
        left = {fd: target for fd, target in open_files().items() if files.get(fd) != target}
        more = {thread.name for thread in set(threading.enumerate()) - threads}
        names = os.listdir(tmp_path)
        if left or more or uncaught or names:
            faults.append(f"{failed}: {what}: left {left} {more} {names}, uncaught {uncaught}")
        if failed is None:
            break
        seen.add(failed.partition(":")[0])
    assert not faults, "\n".join(faults)
    assert len(seen) > 20
