"""The one PCI bus: who sits in which slot, where BARs are decoded, and whose INTx pulls which line.

Configuration accesses come on vCPU threads by way of `config_ports`. A BAR that moves is laid onto the
MMIO bus at once, on the thread of the vCPU that wrote it, so the guest's next access finds it there.

A device whose code raises is ended by its guard. Then its slot is empty: configuration space gives all ones,
by which drivers know a device that was pulled out. Its BARs stay where they are, and give what it chose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from hvkvm.abi import pci
from hvkvm.devices.mmio_bus import MmioBus, MmioDevice, MmioRange
from hvkvm.devices.pci.function import Bar, Function, FunctionState
from hvkvm.errors import ConfigError
from hvkvm.runtime.guard import Guard
from hvkvm.tuples import NamedTuple


class PciDevice(Protocol):
    """Something in a slot. `function` is what a guest sees of it in configuration space."""

    name: str
    function: Function
    guard: Guard
    """Runs its code; who plugs it in attaches it."""
    reads_when_failed: int
    """What its BARs give when that has ended it."""

    def region(self, bar: Bar) -> MmioDevice:
        """Who answers in a BAR. Asked once, when the device is plugged in."""
        ...

    def moved(self, bar: Bar, gpa: int | None) -> None:
        """A BAR is decoded at `gpa` from now on, or nowhere (None). The writing vCPU's thread."""
        ...


_DEVICE_ID = slice(pci.PCI_DEVICE_ID, pci.PCI_DEVICE_ID + 2)


class BusState(NamedTuple):
    """Each function's registers, by "slot.function"."""

    functions: dict[str, FunctionState]

    def device_id(self, slot: int, number: int) -> int:
        """That of the function which was there; 0 for none."""
        function = self.functions.get(f"{slot}.{number}")
        return 0 if function is None else int.from_bytes(function.config[_DEVICE_ID], "little")


class _Plugged(NamedTuple):
    slot: int
    device: PciDevice
    memory: dict[Bar, MmioDevice]


class _Region:
    """A BAR of a guarded device."""

    __slots__ = ("_guard", "_reads_when_failed", "_region")

    def __init__(self, region: MmioDevice, device: PciDevice) -> None:
        self._region = region
        self._guard = device.guard
        self._reads_when_failed = device.reads_when_failed

    def read(self, offset: int, size: int) -> int:
        """See `MmioDevice`."""
        if not self._guard.failed:
            try:
                return self._region.read(offset, size)
            except Exception as error:
                self._guard.fail(error)
        return self._reads_when_failed

    def write(self, offset: int, size: int, value: int) -> None:
        """See `MmioDevice`."""
        self._guard.run(self._region.write, offset, size, value)


class PciBus:
    """Slots 0 to 31. `set_gsi(gsi, level)` drives a level-triggered line; any thread may call it."""

    def __init__(self, mmio: MmioBus, set_gsi: Callable[[int, bool], object]) -> None:
        self._mmio = mmio
        self._set_gsi = set_gsi
        self._functions: dict[tuple[int, int], Function] = {}
        self._lock = threading.RLock()
        self._devices: list[_Plugged] = []
        self._ended: set[int] = set()  # slots whose device has failed
        self._decoded: dict[tuple[Function, Bar], MmioRange] = {}
        self._asserted: set[int] = set()  # slots whose INTx is asserted, disabled or not
        self._pulling: dict[int, set[int]] = {}  # by GSI: the slots that keep it up
        self.devices: dict[int, PciDevice] = {}
        """By slot: what was plugged in."""

    def add_function(self, slot: int, number: int, function: Function) -> None:
        """Put a function without BARs there: the board's own. ConfigError where one is already."""
        if (slot, number) in self._functions:
            raise ConfigError(f"PCI {slot:02x}.{number}: taken already")
        self._functions[slot, number] = function

    def set_function(self, slot: int, number: int, function: Function) -> None:
        """Have one of the board's own there, without BARs, in the place of another. No vCPU runs."""
        self._functions[slot, number] = function

    def plug(self, device: PciDevice, slot: int | None = None) -> int:
        """Put a device in `slot`, or the first free one, and return it. ConfigError when all are taken."""
        if slot is None:
            free = (n for n in range(pci.FIRST_FREE_SLOT, pci.DEVICES) if (n, 0) not in self._functions)
            slot = next(free, None)
            if slot is None:
                raise ConfigError(f"{device.name}: all {pci.DEVICES} PCI slots are taken; use fewer devices")
        self.add_function(slot, 0, device.function)
        self.devices[slot] = device
        regions: dict[Bar, MmioDevice] = {
            bar: _Region(device.region(bar), device) for bar in device.function.bars
        }
        plugged = _Plugged(slot, device, regions)
        self._devices.append(plugged)
        device.function.on_decoding = lambda: self._command_or_bar_written(slot, plugged)
        return slot

    def function(self, slot: int, number: int) -> Function | None:
        """Who answers there, if anybody."""
        return None if slot in self._ended else self._functions.get((slot, number))

    def read(self, slot: int, number: int, offset: int, size: int) -> int:
        """A guest's read of `size` bytes of configuration space: all ones where nobody is. vCPU threads."""
        function = self.function(slot, number)
        if function is not None:
            try:
                return function.read(offset, size)
            except Exception as error:
                self._blame(slot, error)
        return -1

    def write(self, slot: int, number: int, offset: int, size: int, value: int) -> None:
        """A guest's write there. vCPU threads."""
        function = self.function(slot, number)
        if function is not None:
            try:
                function.write(offset, size, value)
            except Exception as error:
                self._blame(slot, error)

    def _blame(self, slot: int, error: Exception) -> None:
        """The device in `slot` has raised; the board's own functions have no guard."""
        device = self.devices.get(slot)
        if device is None:
            raise error
        device.guard.fail(error)

    def end(self, slot: int) -> None:
        """The device in `slot` has failed: nobody answers there any more. Idempotent, any thread."""
        with self._lock:
            self._ended.add(slot)
            self._asserted.discard(slot)
            self._pull(slot)

    # Where BARs are.

    def _command_or_bar_written(self, slot: int, plugged: _Plugged) -> None:
        self._decode(plugged)
        self._pull(slot)

    def _decode(self, plugged: _Plugged) -> None:
        function = plugged.device.function
        with self._lock:
            for bar in function.bars:
                where = function.where(bar)
                known = self._decoded.get((function, bar))
                if where == (None if known is None else known.gpa):
                    continue
                if known is not None:
                    self._mmio.remove(known)
                    del self._decoded[function, bar]
                if where is not None:
                    self._decoded[function, bar] = self._mmio.add(where, bar.size, plugged.memory[bar])
                if plugged.slot not in self._ended:
                    plugged.device.moved(bar, where)

    # Interrupt lines.

    def set_intx(self, slot: int, level: bool) -> None:
        """Assert or release the INTx of function 0 in `slot`. Lines are shared: one holder keeps it up."""
        self._functions[slot, 0].set_interrupt_status(level)
        with self._lock:
            if level and slot not in self._ended:
                self._asserted.add(slot)
            else:
                self._asserted.discard(slot)
            self._pull(slot)

    def _pull(self, slot: int) -> None:
        function = self._functions[slot, 0]
        if not function.identity.pin:
            return
        gsi = pci.gsi_of(slot, function.identity.pin)
        with self._lock:
            pulling = self._pulling.setdefault(gsi, set())
            before = bool(pulling)
            if slot in self._asserted and not function.command & pci.PCI_COMMAND_INTX_DISABLE:
                pulling.add(slot)
            else:
                pulling.discard(slot)
            if bool(pulling) != before:
                self._set_gsi(gsi, bool(pulling))

    # State. vCPUs paused.

    def reset(self) -> None:
        """Every function as at power-on: no BAR is decoded and no line asserted."""
        for function in self._functions.values():
            function.reset()
        for plugged in self._devices:
            self._decode(plugged)
        self._release_lines()

    def _release_lines(self) -> None:
        with self._lock:
            self._asserted.clear()
            for gsi, pulling in self._pulling.items():
                pulling.clear()
                self._set_gsi(gsi, False)

    def save(self) -> BusState:
        """Every function's registers."""
        return BusState({f"{slot}.{number}": one.save() for (slot, number), one in self._functions.items()})

    def load(self, state: BusState) -> None:
        """Take them, and decode BARs where they were; devices assert their INTx anew. ValueError."""
        names = {f"{slot}.{number}": one for (slot, number), one in self._functions.items()}
        if set(names) != set(state.functions):
            raise ValueError("other PCI devices were there when it was saved")
        for name, one in names.items():
            one.load(state.functions[name])
        for plugged in self._devices:
            self._decode(plugged)

    def inspect(self) -> dict[str, object]:
        """What sits where, and where its BARs are."""
        with self._lock:
            decoded = dict(self._decoded)
        found: dict[str, object] = {}
        for (slot, number), function in sorted(self._functions.items()):
            one = function.identity
            device = self.devices.get(slot)
            found[f"{slot:02x}.{number}"] = {
                "id": f"{one.vendor:04x}:{one.device:04x}",
                "name": device.name if device is not None else None,
                "command": f"{function.command:#06x}",
                "bars": {
                    str(bar.register): f"{known.gpa:#x}"
                    for (owner, bar), known in decoded.items()
                    if owner is function
                },
            }
        return found
