"""The ways a PC guest asks for a reset: port 0xcf9, the keyboard controller's pulse, port 0x92.

`on_reset` runs on the writing vCPU's thread, perhaps more than once, and must
not wait for that thread. 0xcf9 lies amid the PCI configuration ports, so one
device has all eight, and a 32-bit configuration address is never mistaken for a reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.board import I8042_COMMAND_PORT, RESET_PORT

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus

I8042_DATA_PORT = 0x60
SYSTEM_CONTROL_A_PORT = 0x92
PCI_CONFIG_PORT = 0xCF8
PCI_CONFIG_SIZE = 8
_ADDRESS_BITS = 0x80FFFFFC

_CF9 = RESET_PORT - PCI_CONFIG_PORT
_CF9_RESET_CPU = 1 << 2
_I8042_NO_CONTROLLER = 0xFD
_PORT92_RESET = 1 << 0
_PORT92_A20 = 1 << 1


class PciConfigPorts:
    """0xcf8-0xcff: PCI's configuration ports with nobody behind them; the reset control register amid them.

    The address reads back as it was written, as behind every host bridge, or Linux says on the console that
    it is fatal to have none. All ones are read of every function.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._control = 0
        self._address = 0

    @property
    def address(self) -> int:
        """What was written to 0xcf8 last. One register for the whole machine: guests take turns."""
        return self._address

    @address.setter
    def address(self, value: int) -> None:
        self._address = value & _ADDRESS_BITS

    def attach(self, bus: PortBus) -> None:
        """Claim the eight ports; ConfigError when one is taken."""
        bus.add(PCI_CONFIG_PORT, PCI_CONFIG_SIZE, self)

    def save(self) -> int:
        """The reset control register, and above its eight bits the address."""
        return self._control | self._address << 8

    def load(self, value: int) -> None:
        """Put both back; resets nothing. Power-on is 0."""
        self._control = value & 0xFF & ~_CF9_RESET_CPU
        self.address = value >> 8

    def read(self, offset: int, size: int) -> int:
        """The address, the reset control register, or all ones."""
        if offset == 0 and size == 4:
            return self._address
        return self._control if offset == _CF9 and size == 1 else -1

    def write(self, offset: int, size: int, value: int) -> None:
        """Name a register, or reset on bit 2 of a byte written to 0xcf9."""
        if offset == 0 and size == 4:
            self.address = value
        elif offset == _CF9 and size == 1:
            self._control = value & ~_CF9_RESET_CPU
            if value & _CF9_RESET_CPU:
                self._on_reset()


class I8042Reset:
    """0x60 and 0x64 as far as a board without a keyboard controller needs them.

    The status reads 0xfd: "output full" for ever, which makes Linux's flush give
    up at once with "no controller found" (0 would cost it half a second of
    selftest time-out), but never "input full", for which a reboot would wait.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def attach(self, bus: PortBus) -> None:
        """Claim both ports; ConfigError when one is taken."""
        for port in (I8042_DATA_PORT, I8042_COMMAND_PORT):
            bus.add(port, 1, I8042Port(self._on_reset, is_command=port == I8042_COMMAND_PORT))


class I8042Port:
    """One of the two ports."""

    def __init__(self, on_reset: Callable[[], None], *, is_command: bool) -> None:
        self._on_reset = on_reset
        self._is_command = is_command

    def read(self, offset: int, size: int) -> int:
        """The status of no controller, or its data."""
        return _I8042_NO_CONTROLLER if self._is_command else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on a command 0xf0-0xff that pulses output line 0 (the usual one is 0xfe)."""
        if self._is_command and value & 0xF1 == 0xF0:
            self._on_reset()


class SystemControlA:
    """0x92: bit 0 is the fast reset, bit 1 the A20 gate, which is always open here."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def attach(self, bus: PortBus) -> None:
        """Claim the port; ConfigError when taken."""
        bus.add(SYSTEM_CONTROL_A_PORT, 1, self)

    def read(self, offset: int, size: int) -> int:
        """A20 open, no reset."""
        return _PORT92_A20

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on bit 0."""
        if value & _PORT92_RESET:
            self._on_reset()
