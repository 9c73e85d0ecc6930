"""What a saved virtio device is, and its registers and queues put back with nothing of the file believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hvkvm.abi import virtio
from hvkvm.devices.pci import msix
from hvkvm.devices.pci.virtio.registers import QueueState, Registers
from hvkvm.devices.pci.virtio.ring import Place, Positions, Ring
from hvkvm.errors import GuestMemoryError
from hvkvm.tuples import NamedTuple


class VirtioState(NamedTuple):
    """Registers and queues. Nothing is in flight."""

    status: int
    driver_features: int
    selects: tuple[int, int, int]
    """device_feature_select, driver_feature_select, queue_select."""
    config_vector: int
    isr: int
    queues: tuple[QueueState, ...]
    msix: msix.MsixState


def saved(registers: Registers, rings: Mapping[int, Ring], isr: int, vectors: msix.MsixState) -> VirtioState:
    """All that the guest could tell apart."""
    queues = []
    for index, queue in enumerate(registers.queues):
        ring = rings.get(index)
        positions = Positions(0, 0) if ring is None else ring.positions
        queues.append(QueueState(queue.size, queue.vector, queue.enabled, *queue.place[1:], *positions))
    selects = registers.feature_select, registers.driver_select, registers.queue_select
    return VirtioState(
        registers.status,
        registers.driver_features,
        selects,
        registers.config_vector,
        isr,
        tuple(queues),
        vectors,
    )


def load(state: VirtioState, registers: Registers, make: Callable[[Place], Ring]) -> dict[int, Ring]:
    """Put the registers back; the rings of enabled queues, by `make`. ValueError for what cannot be."""
    if len(state.queues) != len(registers.queues):
        raise ValueError("its virtio device has another number of queues")
    registers.status = state.status & 0xFF
    registers.driver_features = state.driver_features & (1 << 64) - 1
    if registers.status & virtio.VIRTIO_CONFIG_S_FEATURES_OK:  # before, a driver may have asked for any
        registers.driver_features &= registers.features
    feature_select, driver_select, queue_select = state.selects
    registers.feature_select = feature_select & 0xFFFFFFFF
    registers.driver_select = driver_select & 0xFFFFFFFF
    registers.queue_select = queue_select & 0xFFFF
    registers.config_vector = registers.vector(state.config_vector & 0xFFFF)
    rings = {}
    for index, (queue, one) in enumerate(zip(registers.queues, state.queues, strict=True)):
        queue.load(one, registers.vector(one.vector & 0xFFFF))
        if queue.enabled:
            try:
                ring = make(queue.place)
            except GuestMemoryError as error:
                raise ValueError(f"its virtqueue {index} is nowhere: {error}") from None
            ring.go_on(Positions(one.taken, one.used))
            rings[index] = ring
    return rings
