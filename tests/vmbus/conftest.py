"""Fixtures for the VMBus room: a host and a guest in one process, and a device that echoes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from vsock_pairs import Make, open_fds

from hvkvm.abi import vmbus
from hvkvm.abi.ring import Packet
from hvkvm.memory.guest import GuestMemory
from hvkvm.testing.vmbus_loopback import Loopback, NoSlots
from hvkvm.testing.vsock_loopback import VsockLoopback
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.offer import Offer

ECHO = vmbus.guid("11111111-2222-3333-4444-555555555555")


class Echo:
    """Sends every in-band packet back, completes those that ask; what does not fit waits."""

    def __init__(self, number: int = 1, *, interface: bytes = ECHO, index: int = 0) -> None:
        self.offer = Offer(interface, bytes(15) + bytes([number]), f"echo{number}", sub_channel_index=index)
        self.io: ChannelIo | None = None
        self.log: list[str] = []
        self.backlog: list[Packet] = []
        self.got: list[Packet] = []

    def opened(self, io: ChannelIo) -> None:
        self.log.append("opened")
        self.io = io

    def received(self, packet: Packet) -> None:
        assert self.io is not None, "a packet for a device that is not open"
        self.got.append(packet)
        self.backlog.append(packet)
        self.ready()

    def ready(self) -> None:
        while self.backlog and self.io is not None:
            packet = self.backlog[0]
            if packet.wants_completion:
                sent = self.io.complete(packet, packet.payload)
            else:
                sent = self.io.send(packet.payload, trans_id=packet.trans_id)
            if not sent:
                return
            self.backlog.pop(0)

    def close(self, done: Callable[[], object]) -> None:
        self.log.append("closed")
        self.io = None
        self.backlog.clear()
        done()


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    """RAM without a VM."""
    with GuestMemory(NoSlots(), 1 << 20) as ram:
        yield ram


@pytest.fixture
def loopback() -> Iterator[Callable[..., Loopback]]:
    """Makes loopbacks, and closes them."""
    made: list[Loopback] = []

    def make(**options: Any) -> Loopback:
        made.append(Loopback(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def echo() -> type[Echo]:
    """The echoing device."""
    return Echo


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Real guests run on both SynICs, or on the one that HVKVM_SYNIC names."""
    if "each_synic" in metafunc.fixturenames:
        chosen = os.environ.get("HVKVM_SYNIC")
        metafunc.parametrize("each_synic", [chosen] if chosen else ["kernel", "user"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each kernel on one SynIC, each SynIC under one kernel; all pairs with HVKVM_SOAK=1 or HVKVM_SYNIC."""
    if os.environ.get("HVKVM_SYNIC") or os.environ.get("HVKVM_SOAK"):
        return
    items[:] = [item for item in items if _pair(item) not in (("user", "newer"), ("kernel", "stable"))]


def _pair(item: pytest.Item) -> tuple[object, object]:
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    return (params.get("each_synic"), params.get("kernel")) if params else (None, None)


@pytest.fixture
def each_synic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The SynIC that `linux_guest` takes."""
    monkeypatch.setenv("HVKVM_SYNIC", request.param)
    chosen: str = request.param
    return chosen


@pytest.fixture
def make_vsock(tmp_path: Path) -> Iterator[Make]:
    """Makes vsocks with a guest; closes them, and looks whether they left anything behind."""
    gc.collect()  # or what an earlier test dropped in a cycle is closed in the middle of this one
    before = open_fds()
    made: list[VsockLoopback] = []

    def new(seed: int = 0, **options: Any) -> VsockLoopback:
        made.append(VsockLoopback(tmp_path / f"v{len(made)}", Random(seed), **options))
        return made[-1]

    yield new
    for one in made:
        one.close()
        assert not one.path or not one.path.exists()
        assert one.io.readers == {}
        assert one.io.timers == 0
    assert open_fds() == before


@pytest.fixture
def mistakes_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device of a test raises stands for mistakes in hvkvm's own, of which no caller hears."""
    for name in ("channel_devices.is_callers", "channel_devices.is_callers_module", "host.is_callers"):
        monkeypatch.setattr(f"hvkvm.vmbus.{name}", lambda _what: False)
