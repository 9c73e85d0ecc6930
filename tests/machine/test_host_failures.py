"""Whatever the host refuses, whenever: a named end or an answer, all closed, no thread left, and no hang."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from guest_agent import DRAIN, EOM_PENDING, SCRATCH
from guest_machine import Guest, Poster
from host_failures import HostFailures
from host_lives import LIMIT, SECONDS, check_each_call

from hvkvm.abi import tlfs
from hvkvm.errors import HvkvmError

OUTSIDE_RAM = 0xD000_0000
SINT = 3


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


@pytest.mark.kvm
@pytest.mark.user_synic
@pytest.mark.timeout(LIMIT)
def test_each_call_that_fails_has_an_answer(
    tmp_path: Path, failures: HostFailures, uncaught: list[str]
) -> None:
    assert len(check_each_call(lambda: Life(tmp_path), tmp_path, failures, uncaught)) > 20
