"""The platform of a machine, built in the order KVM demands.

VM, interrupt chips, memory, every vCPU in vp_index order with its CPUID; the
SynIC and the devices come on top. Called by `assembly` on the thread that makes the
machine; each step pushes its undoing on the stack.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from hvkvm.abi import board
from hvkvm.abi.kvm import (
    KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_IRQFD_RESAMPLE,
    KVM_CAP_MAX_VCPUS,
    KVM_PIT_SPEAKER_DUMMY,
)
from hvkvm.errors import BootError, CapabilityMissing, ConfigError
from hvkvm.kvm.gsi import GsiTable
from hvkvm.kvm.system import Kvm
from hvkvm.kvm.vm import Vm
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.hyperv import Hyperv
from hvkvm.machine.outcome import is_mistake
from hvkvm.machine.platform import Platform
from hvkvm.machine.vcpus import create_vcpus
from hvkvm.memory.guest import GuestMemory, RamSource
from hvkvm.runtime.guard import fault_text
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.vcpu_thread import VcpuThread
from hvkvm.runtime.vcpus import VcpuGroup
from hvkvm.state.file import RAM_OFFSET, Saved

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus
    from hvkvm.events import Observer
    from hvkvm.hyperv.features import FeatureSet
    from hvkvm.machine.board import Board
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.control_door import ControlDoor
    from hvkvm.machine.disk_shelf import DiskShelf
    from hvkvm.machine.exits import Handlers
    from hvkvm.machine.firmware import Firmware
    from hvkvm.machine.guest_image import GuestImage
    from hvkvm.machine.hyperv import Enlightenments
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.nics import Nics
    from hvkvm.machine.orders import Orders
    from hvkvm.machine.parts import Parts
    from hvkvm.machine.pci import Pci

OnFault = Callable[[BaseException, str], None]
KVM_CAP_X86_APIC_BUS_CYCLES_NS = 237  # newer than the headers that the ABI table was taken from
_NEEDED = (
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "Linux 4.13"),
    (KVM_CAP_IRQFD_RESAMPLE, "KVM_CAP_IRQFD_RESAMPLE", "Linux 3.9 with an in-kernel irqchip"),
)


def create_vm(kvm: Kvm, config: MachineConfig, stack: ExitStack) -> Vm:
    """A VM with the in-kernel irqchip and PIT. CapabilityMissing, ConfigError for too many vCPUs."""
    for capability, name, since in _NEEDED:
        if not kvm.check_extension(capability):
            raise CapabilityMissing(f"this kernel's KVM lacks {name}; use {since} or newer")
    limit = kvm.check_extension(KVM_CAP_MAX_VCPUS)
    if limit and config.cpus > limit:
        raise ConfigError(f"--cpus {config.cpus}: this kernel's KVM takes at most {limit}; choose fewer")
    vm = stack.enter_context(kvm.create_vm())
    vm.set_identity_map_addr(board.IDENTITY_MAP_ADDRESS)
    vm.set_tss_addr(board.TSS_ADDRESS)
    vm.create_irqchip()
    vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
    if config.apic_bus_ns:
        if not vm.check_extension(KVM_CAP_X86_APIC_BUS_CYCLES_NS):
            raise CapabilityMissing(
                "config key apic_bus_ns: this kernel's KVM cannot slow APIC timers; use Linux 6.11 or newer"
            )
        vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, config.apic_bus_ns)
    return vm


def create_memory(vm: Vm, config: MachineConfig, saved: Saved | None, stack: ExitStack) -> GuestMemory:
    """Guest RAM, zero or as it was saved. ConfigError when the host has no room for it."""
    source = None if saved is None else RamSource(saved.fd, RAM_OFFSET)
    try:
        return stack.enter_context(GuestMemory(vm, config.memory, source))
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ConfigError(
                f"--memory {config.memory >> 20}M: the limit on the size of files (ulimit -f) is less, and"
                " guest RAM is a file in memory; raise it, or ask for less"
            ) from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise ConfigError(
            f"--memory {config.memory >> 20}M: the host refuses it ({error.strerror}); ask for less"
        ) from error


def create_platform(
    kvm: Kvm,
    config: MachineConfig,
    saved: Saved | None,
    features: FeatureSet,
    handlers: Handlers,
    on_fault: OnFault,
    observer: Observer,
    stack: ExitStack,
) -> Platform:
    """What the parts stand on; `handlers` may be filled later, before a vCPU runs. ConfigError, OSError.

    `on_fault(error, detail)` hears on its thread of an error that ends a vCPU's or the I/O loop's.
    """
    vm = create_vm(kvm, config, stack)
    memory = create_memory(vm, config, saved, stack)
    vcpus = create_vcpus(kvm, vm, config, features)

    def vcpu_failed(thread: VcpuThread, error: BaseException) -> None:
        # A mistake in a handler, a test's perhaps, is found by its kind and place.
        on_fault(error, f"{thread.name}: {fault_text(error) if is_mistake(error) else error}")

    io = IoLoop(on_fault=lambda error: on_fault(error, f"I/O loop: {fault_text(error)}"))
    stack.callback(io.stop)
    threads = [VcpuThread(vcpu, handlers, on_fault=vcpu_failed, name=f"vcpu{vcpu.index}") for vcpu in vcpus]
    return Platform(config, kvm, vm, memory, vcpus, threads, VcpuGroup(threads), GsiTable(vm), io, observer)


def create_hyperv(
    platform: Platform,
    offered: Enlightenments,
    lifecycle: Lifecycle,
    ports: PortBus,
    stack: ExitStack,
) -> Hyperv:
    """The interface of a machine, switched on. Before a vCPU runs. CapabilityMissing, OSError."""
    if not offered.features:
        return Hyperv(platform, offered)
    if offered.choice.synic == "user":
        from hvkvm.machine.hyperv_user import UserModeHyperv

        return UserModeHyperv(platform, offered, lifecycle, ports, stack)
    from hvkvm.machine.hyperv_kernel import KernelHyperv

    made = KernelHyperv(platform, offered, stack)
    if made.partition is None:
        made.reset()  # an active partition has written them
    return made


def create_bus(platform: Platform, hyperv: Hyperv, stack: ExitStack) -> Bus | None:
    """The VMBus host and its devices, where the configuration asks for them. ConfigError without SynIC."""
    if platform.config.vmbus == "off":
        return None
    from hvkvm.machine.bus import Bus

    return Bus(platform, hyperv, stack)


def create_nics(
    platform: Platform, bus: Bus | None, vm_name: str, stack: ExitStack, saved: Saved | None
) -> Nics | None:
    """The NICs on the bus; None for a machine without a bus. ConfigError for wires that cannot be had."""
    if bus is None:
        return None
    from hvkvm.machine.nics import Nics

    return Nics(platform, bus, vm_name, stack, saved)


def create_pci(platform: Platform, board: Board, stack: ExitStack) -> Pci | None:
    """The PCI bus and what sits on it, where the configuration has any."""
    if not platform.config.has_pci:
        return None
    from hvkvm.boot.image import is_firmware
    from hvkvm.machine.pci import Pci

    kernel, found = platform.config.kernel, False
    if kernel is not None and platform.config.firmware is None:
        with suppress(BootError):  # loading it says so; a restored machine can do without it
            found = is_firmware(kernel)
    return Pci(platform, board, stack, cloud_firmware=found)


def create_firmware(
    platform: Platform,
    board: Board,
    pci: Pci | None,
    shelf: DiskShelf | None,
    image: GuestImage,
    name: str,
    stack: ExitStack,
) -> Firmware | None:
    """The ROM and what it is told, where the machine starts in one. ConfigError, CapabilityMissing."""
    if platform.config.firmware is None or pci is None:
        return None
    from hvkvm.machine.firmware import Firmware

    return Firmware(platform, board, pci, shelf, image, name, stack)


def create_disks(
    platform: Platform, bus: Bus | None, pci: Pci | None, stack: ExitStack, saved: Saved | None
) -> DiskShelf | None:
    """The disks and DVD drives; None for a machine with neither VMBus nor PCI. ConfigError."""
    if bus is None and pci is None:
        return None
    from hvkvm.machine.disk_shelf import DiskShelf

    return DiskShelf(platform, bus, pci, stack, saved)


def create_control(parts: Parts, stack: ExitStack, last: ExitStack) -> ControlDoor | None:
    """The control socket, where the configuration asks for one. ConfigError. See `open_door`."""
    if parts.platform.config.control == "off":
        return None
    from hvkvm.machine.control_door import open_door

    return open_door(parts, stack, last)


def create_orders(platform: Platform, board: Board, stack: ExitStack) -> Orders | None:
    """What a warm guest is handed, where this machine is one or is made one. ConfigError, BootError."""
    config = platform.config
    if not config.awaits or config.restore is not None:
        return None
    from hvkvm.machine.orders import Orders

    return Orders(platform, board, stack)
