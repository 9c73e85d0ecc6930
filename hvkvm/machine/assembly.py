"""Puts the parts of a machine together, each behind what it stands on.

KVM and what it gives first, then the devices from the board to the firmware, then
the vCPUs with what they boot, or the states of a saved machine. Called by `Machine`
on the thread that makes it; each step pushes its undoing on the stack, so that what
was made last goes first.
"""

from __future__ import annotations

from contextlib import ExitStack

from hvkvm.events import Observer
from hvkvm.kvm.system import Kvm
from hvkvm.machine import build, exits, hyperv, saving
from hvkvm.machine.board import Board
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.guest_image import GuestImage
from hvkvm.machine.lifecycle import Lifecycle
from hvkvm.machine.part import Part
from hvkvm.machine.parts import Parts
from hvkvm.machine.processors import Processors
from hvkvm.state.file import Saved


def assemble(
    config: MachineConfig, name: str, saved: Saved | None, observer: Observer, stack: ExitStack
) -> Parts:
    """The machine that `config` describes, at rest: as at power-on, or as it was `saved`.

    Raises HvkvmError's kinds, and OSError for what the host refuses.
    """
    image = GuestImage(config, name, None if saved is None else saved.manifest.config.boot)
    kvm = stack.enter_context(Kvm(config.kvm_path))
    offered = hyperv.choose(kvm, config)
    handlers: exits.Handlers = {}

    def failed(error: BaseException, detail: str) -> None:
        lifecycle.failed(error, detail)

    platform = build.create_platform(kvm, config, saved, offered.features, handlers, failed, observer, stack)
    lifecycle = Lifecycle(platform, reboot=config.reboot, why_no_reset=image.why_not_again)
    stack.callback(lifecycle.close)
    board = Board(platform, lifecycle, stack)
    interface = build.create_hyperv(platform, offered, lifecycle, board.ports, stack)
    handlers |= exits.handlers(board, lifecycle, platform.memory, config.append) | interface.handlers()
    board.add_optional_devices(config.devices, interface)
    bus = build.create_bus(platform, interface, stack)
    nics = build.create_nics(platform, bus, name, stack, saved)
    pci = build.create_pci(platform, board, stack)
    shelf = build.create_disks(platform, bus, pci, stack, saved)
    firmware = build.create_firmware(platform, board, pci, shelf, image, name, stack)
    for ends in (firmware, shelf):
        if ends is not None:
            lifecycle.at_end(ends.end)
    records = None
    if config.record or config.timeline is not None:
        from hvkvm.machine.recording import watch

        records = watch(platform, interface, board, bus, shelf, nics, stack)
    processors = Processors(platform, image)
    optional = (nics, bus, firmware, pci)
    order: list[Part] = [board, *(part for part in optional if part is not None), interface, processors]
    lifecycle.govern(order, board)
    if saved is None:
        processors.boot()
    else:
        saving.load(saved, order, shelf)
    board.renew_generation(tell=saved is not None)
    orders = build.create_orders(platform, board, stack)

    def waits() -> bool:
        return orders is not None and orders.awaited

    saver = saving.Saver(name, platform, lifecycle, interface, order, shelf, waits=waits, recipe=image.recipe)
    stack.callback(saver.close)
    return Parts(
        name, platform, lifecycle, interface, board, bus, nics, shelf, saver, pci, firmware, orders, records
    )
