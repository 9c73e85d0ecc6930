"""Fixtures of the PCI tests: a bus whose lines and MSIs are written down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.abi import pci
from hvkvm.devices.mmio_bus import MmioBus
from hvkvm.devices.pci.bus import PciBus
from hvkvm.devices.pci.config_ports import Mechanism1
from hvkvm.devices.pci.function import Bar, Function, Identity
from hvkvm.runtime.guard import Guard

# A module for tests, not part of the package.
sys.path.insert(0, str(Path(__file__).parent))


class Memory:
    """A BAR that remembers who asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.calls.append(("r", offset, size))
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("w", offset, size, value))


class Device:
    """A device with the BARs asked for."""

    def __init__(self, *bars: Bar, name: str = "device", pin: int = 1) -> None:
        self.name = name
        self.guard = Guard()
        self.reads_when_failed = -1
        self.function = Function(Identity(0x1234, 0x5678, 0xFF0000, pin=pin), bars)
        self.memories = {bar: Memory(f"{name}.{bar.register}") for bar in bars}
        self.moves: list[tuple[int, int | None]] = []

    def region(self, bar: Bar) -> Memory:
        return self.memories[bar]

    def moved(self, bar: Bar, gpa: int | None) -> None:
        self.moves.append((bar.register, gpa))


class Routes:
    """Lines that count, by where they lead."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.open_now: list[tuple[int, int]] = []
        self.broken = False
        self.later: list[Callable[[], object]] = []

    def call_later(self, _seconds: float, fn: Callable[[], object]) -> Any:
        self.later.append(fn)
        return SimpleNamespace(cancel=lambda: self.later.remove(fn))

    def open(self, address: int, data: int) -> Any:
        if self.broken:
            raise OSError(24, "no more files")
        where = address, data
        self.open_now.append(where)
        return SimpleNamespace(
            signal=lambda: self.sent.append(where), close=lambda: self.open_now.remove(where)
        )


class Board:
    """Configuration ports, the bus behind them, and the lines it drives."""

    def __init__(self) -> None:
        self.mmio = MmioBus()
        self.levels: dict[int, bool] = {}
        self.bus = PciBus(self.mmio, self.levels.__setitem__)
        self.resets = 0
        self.ports = Mechanism1(self._reset)
        self.ports.bus = self.bus

    def _reset(self) -> None:
        self.resets += 1

    def read(self, slot: int, offset: int, size: int = 4, function: int = 0) -> int:
        self._choose(slot, function, offset)
        return self.ports.read(4 + (offset & 3), size) & (1 << 8 * size) - 1

    def write(self, slot: int, offset: int, value: int, size: int = 4, function: int = 0) -> None:
        self._choose(slot, function, offset)
        self.ports.write(4 + (offset & 3), size, value)

    def _choose(self, slot: int, function: int, offset: int) -> None:
        self.ports.write(0, 4, pci.PCI_CONFIG_ENABLE | slot << 11 | function << 8 | offset & 0xFC)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture(scope="session")
def new_routes() -> type[Routes]:
    """For properties, which need a fresh one for each example. So are the next two."""
    return Routes


@pytest.fixture(scope="session")
def new_board() -> type[Board]:
    return Board


@pytest.fixture
def routes() -> Routes:
    return Routes()


@pytest.fixture(scope="session")
def new_device() -> type[Device]:
    return Device
