"""The port devices of a machine and its console: what `abi.board` promises, built and wired.

A `part.Part`, made by `Machine` before the vCPUs run. Device callbacks come on
vCPU threads and only name the machine's next step (`finish`, `request_reset`);
output reaches the sink on the I/O loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm.abi import board
from hvkvm.backends.console_tail import ConsoleTail
from hvkvm.devices.port.acpi_gpe import AcpiGpeBlock, GpeState, SharedLine
from hvkvm.devices.port.acpi_pm import AcpiControlBlock, AcpiEventBlock, AcpiEventState
from hvkvm.devices.port.bus import MmioHole, PortBus
from hvkvm.devices.port.cmos import Cmos, CmosState
from hvkvm.devices.port.debug_exit import DebugExit, GuestExit, debug_exit_status
from hvkvm.devices.port.fw_cfg import FirmwareFwCfg, FwCfg, FwCfgState
from hvkvm.devices.port.quiet import absorb_writes, quiet_ports
from hvkvm.devices.port.reset import I8042Reset, PciConfigPorts, SystemControlA
from hvkvm.devices.port.serial import Serial16550
from hvkvm.devices.port.serial_coalesced import CoalescedSerial
from hvkvm.devices.port.serial_state import SerialState
from hvkvm.devices.port.testdev_state import TestdevState
from hvkvm.errors import CapabilityMissing, StateError
from hvkvm.kvm.irqfd import Irqfd
from hvkvm.machine.command_way import CommandState
from hvkvm.machine.outcome import Ending
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.backends.console import Console
    from hvkvm.devices.port.hyperv_testdev import HypervTestdev
    from hvkvm.devices.port.rtc import Rtc
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.platform import Platform


class BoardState(NamedTuple):
    """Each port device that remembers something."""

    serial: SerialState
    command_ports: tuple[SerialState, ...]
    event_block: AcpiEventState
    general_events: GpeState
    control_block: int
    reset_control: int
    fw_cfg: FwCfgState
    cmos: CmosState
    testdev: TestdevState | None
    command: CommandState | None
    """None where nobody has a command's streams."""


class Board:
    """The devices. `stack` closes what they hold, in reverse order."""

    name = "board"
    State = BoardState

    def __init__(self, platform: Platform, lifecycle: Lifecycle, stack: ExitStack) -> None:
        self._platform = platform
        self._stack = stack
        self.tail = ConsoleTail()
        """The guest's last console lines."""
        self.on_first_output: Callable[[], None] | None = None
        self.on_reset: Callable[[], object] | None = None
        """Called when the devices are reset. vCPUs paused."""
        self.command_state: Callable[[], CommandState | None] = lambda: None
        """What a saved machine has of a command's streams; whoever has them sets it."""
        self.command_loaded: CommandState | None = None
        """What the file of the machine had of them."""
        self._sink: Callable[[bytes], object] | None = None
        self.testdev: HypervTestdev | None = None
        self.rtc: Rtc | None = None
        """On a machine with PCI."""
        self.ports = PortBus(platform.observer)
        self.ports.expect(quiet_ports())
        self.mmio = _mmio(platform)
        for vcpu in platform.vcpus:
            stack.callback(self.ports.forget, vcpu)
        self._add_serial(platform, stack)
        self.command_ports: list[Serial16550] = []
        """COM2 to COM4, where a command's streams may need them (see `abi.guest_command`)."""
        self._add_command_ports(platform, stack)
        self._add_chipset(platform, lifecycle, stack)

    def _add_serial(self, platform: Platform, stack: ExitStack) -> None:
        irqfd = Irqfd(platform.vm, board.COM1_IRQ)
        stack.callback(irqfd.close)
        self._com1_line = irqfd
        self.serial = Serial16550(self._com1_line, self._output, platform.io)
        self._coalesced: CoalescedSerial | None = None
        try:
            self._coalesced = CoalescedSerial(self.serial, platform.vm, platform.vcpus[0], platform.io)
            self._coalesced.attach(self.ports)
            stack.callback(self._coalesced.close)
        except CapabilityMissing:
            self.serial.attach(self.ports)

    def _add_command_ports(self, platform: Platform, stack: ExitStack) -> None:
        """No coalescing: KVM has one ring for all of them, and COM1 is its only reader."""
        lines = {board.COM1_IRQ: self._com1_line}
        for port, irq in board.COM_PORTS[1 : platform.config.serial_ports]:
            if irq not in lines:
                irqfd = Irqfd(platform.vm, irq)
                stack.callback(irqfd.close)
                lines[irq] = irqfd
            serial = Serial16550(lines[irq], lambda _data: None, platform.io)
            serial.attach(self.ports, port)
            self.command_ports.append(serial)

    def _add_chipset(self, platform: Platform, lifecycle: Lifecycle, stack: ExitStack) -> None:
        def reset() -> None:
            lifecycle.request_reset("the guest asked for a reset")

        def debug_exit(value: int) -> None:
            lifecycle.finish(Ending.DEBUG_EXIT, debug_exit_status(value), f"{value:#x} written")

        def guest_exit(status: int) -> None:
            lifecycle.finish(Ending.COMMAND_EXITED, status)

        has_pci = platform.config.has_pci
        self.pci_ports = _pci_ports(platform, reset)
        self.pci_ports.attach(self.ports)
        I8042Reset(reset).attach(self.ports)
        SystemControlA(reset).attach(self.ports)
        DebugExit(debug_exit).attach(self.ports)
        GuestExit(guest_exit).attach(self.ports)
        self.fw_cfg = _fw_cfg(platform)
        self.fw_cfg.attach(self.ports)
        self.cmos = self._cmos(platform, stack)
        self.cmos.attach(self.ports)
        off_types = (board.S5_SLP_TYP, board.PIIX4_S5_SLP_TYP) if has_pci else (board.S5_SLP_TYP,)
        self.sleep = AcpiControlBlock(lambda: lifecycle.finish(Ending.POWERED_OFF, 0), off_types)
        sci = SharedLine(lambda level: platform.vm.irq_line(board.SCI_IRQ, int(level)))
        self.power = AcpiEventBlock(sci.add())
        if self.rtc is not None:
            self.rtc.on_alarm = self.power.raise_alarm
        self.gpe = AcpiGpeBlock(sci.add())
        self.gpe.attach(self.ports)
        if not has_pci:  # else a function of the PCI bus says where they are
            self.sleep.attach(self.ports)
            self.power.attach(self.ports)
        for doorbell in absorb_writes(platform.vm):
            stack.callback(doorbell.close)

    def _cmos(self, platform: Platform, stack: ExitStack) -> Cmos:
        """With an RTC's interrupts on a machine whose tables say that there is one: a PC's."""
        if not platform.config.has_pci:
            return Cmos()
        from hvkvm.devices.port.rtc import Rtc

        line = Irqfd(platform.vm, board.RTC_IRQ)
        stack.callback(line.close)
        self.rtc = Rtc(platform.io, line.signal)
        self.rtc.tell_memory(platform.config.memory)
        return self.rtc

    def renew_generation(self, *, tell: bool) -> None:
        """Give the guest another VM generation id, and `tell` it. Before it runs, or while it is at rest.

        Each machine has its own, and so has each that goes on from a file: a guest that is told of a change
        draws its random numbers anew, as every copy of it must.
        """
        if self._platform.config.acpi and self._platform.config.firmware is None:
            self._platform.memory.write(board.GENERATION_ADDRESS, os.urandom(board.GENERATION_SIZE))
            if tell:
                self.gpe.raise_event(board.GPE_GENERATION)

    def add_optional_devices(self, names: tuple[str, ...], hyperv: Hyperv) -> None:
        """Add the devices asked for by `--device`. ConfigError when one lacks what it stands on."""
        for name in dict.fromkeys(names):
            if name == "hyperv-testdev":
                from hvkvm.devices.port.hyperv_testdev import HypervTestdev

                partition = hyperv.require_synic(f"--device {name}", "drives")
                self.testdev = HypervTestdev(partition, self._platform.observer)
                self._stack.callback(self.testdev.close)
                self.testdev.attach(self.ports)

    def attach_console(self, console: Console) -> None:
        """Give the UART's output to `console` and its input to the UART. Before `Machine.start`."""
        console.connect(self.serial)
        self._sink = console.output.write

    def attach_terminal(self, console: Console) -> None:
        """Give `console` the serial port that is a command's terminal. Before `Machine.start`."""
        serial = self.command_ports[0]
        console.connect(serial)

        def show(data: bytes) -> None:
            self.note_output()
            console.write(data)

        serial.output.sink = show

    def attach_sink(self, sink: Callable[[bytes], object]) -> None:
        """Give the UART's output to `sink(data)`, on the I/O loop. Before `Machine.start`.

        It takes the place of the sink before it: the one of a test's `guest.console`, say. What it raises
        ends the run, and it gets no more.
        """
        self._sink = sink

    def _output(self, data: bytes) -> None:
        """The UART's sink: the I/O loop, or the stopping thread at the end."""
        self.tail.add(data)
        if self._sink is not None:
            self.note_output()
            try:
                self._sink(data)
            except BaseException:
                self._sink = None  # the last output, at the end, would raise it again
                raise

    def note_output(self) -> None:
        """The guest's first word that anybody is shown has come. The I/O loop."""
        first, self.on_first_output = self.on_first_output, None
        if first is not None:
            first()

    def console_panic(self, *, hung: bool = False) -> str | None:
        """The message of the panic that the console ends in, or None; see `linux_panic`. Any thread."""
        from hvkvm.backends import linux_panic

        return linux_panic.panic(self.tail.lines(), hung=hung)

    def console_panic_report(self) -> str | None:
        """What the console says of a panic of which something better knows, or None. Any thread."""
        from hvkvm.backends import linux_panic

        report = linux_panic.last_report(self.tail.lines())
        return None if report is None else report.message

    def flush(self) -> None:
        """Take what the guest printed last out of KVM's ring and the UART. The I/O loop, or after its end."""
        if self._coalesced is not None:
            self._coalesced.drain()
        for serial in (self.serial, *self.command_ports):
            serial.output.flush(even_if_held=True)

    def start(self) -> None:
        """See `Part.start`."""
        if self.rtc is not None:
            self.rtc.start()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`: what the guest printed last is on its way."""
        if self.rtc is not None:
            self.rtc.stop()
        self.flush()
        done()

    def save(self) -> BoardState:
        """See `Part.save`."""
        return BoardState(
            self.serial.save(),
            tuple(serial.save() for serial in self.command_ports),
            self.power.save(),
            self.gpe.save(),
            self.sleep.save(),
            self.pci_ports.save(),
            self.fw_cfg.save(),
            self.cmos.save(),
            None if self.testdev is None else self.testdev.save(),
            self.command_state(),
        )

    def load(self, state: BoardState) -> None:
        """See `Part.load`."""
        if (self.testdev is None) != (state.testdev is None):
            raise StateError(f"{self.name}: --device hyperv-testdev must be given as it was when saved")
        if len(self.command_ports) != len(state.command_ports):
            raise StateError(f"{self.name}: other serial ports than there are")
        try:
            self.cmos.load(state.cmos)
            if self.testdev is not None and state.testdev is not None:
                self.testdev.load(state.testdev)
        except ValueError as error:
            raise StateError(f"{self.name}: {error}") from None
        for serial, registers in zip(
            (self.serial, *self.command_ports), (state.serial, *state.command_ports), strict=True
        ):
            serial.load(registers)
        self.power.load(state.event_block)
        self.gpe.load(state.general_events)
        self.sleep.load(state.control_block)
        self.pci_ports.load(state.reset_control)
        self.fw_cfg.load(state.fw_cfg)
        self.command_loaded = state.command

    def reset(self) -> None:
        """Power-on state of every device; the SynIC's users give their routes up (S7). vCPUs paused."""
        if self.testdev is not None:
            self.testdev.reset()
        self.power.reset()
        self.gpe.reset()
        self.sleep.reset()
        self.pci_ports.load(0)
        self.fw_cfg.reset()
        if self.rtc is not None:
            self.rtc.reset()
        if self._coalesced is not None:
            self._coalesced.reset()
        else:
            self.serial.reset()
        for serial in self.command_ports:
            serial.reset()
            serial.drop_input()  # an answer to a question of the life before
        if self.on_reset is not None:
            self.on_reset()


def _mmio(platform: Platform) -> MmioHole:
    """Who answers where there is no RAM: devices, on a machine that has such."""
    if not platform.config.has_pci:
        return MmioHole(platform.observer)
    from hvkvm.devices.mmio_bus import MmioBus

    return MmioBus(platform.observer)


def _pci_ports(platform: Platform, reset: Callable[[], None]) -> PciConfigPorts:
    if not platform.config.has_pci:
        return PciConfigPorts(reset)
    from hvkvm.devices.pci.config_ports import Mechanism1

    return Mechanism1(reset)


def _fw_cfg(platform: Platform) -> FwCfg:
    config = platform.config
    if config.firmware is None:
        return FwCfg(config.cpus, config.memory)
    return FirmwareFwCfg(config.cpus, config.memory, platform.memory)
