"""The common configuration of a virtio device: what a driver negotiates, and where it puts its queues.

Only fields and what may be written to them; what a write sets going is `transport`'s. A field is written as a
whole, 64-bit addresses by halves too. Under the transport's lock.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvkvm.abi import virtio
from hvkvm.devices.pci.virtio.ring import Place
from hvkvm.tuples import NamedTuple

SIZE = virtio.virtio_pci_common_cfg.size
_LOW = 0xFFFFFFFF
_ADDRESSES = {
    virtio.VIRTIO_PCI_COMMON_Q_DESCLO: "descriptors",
    virtio.VIRTIO_PCI_COMMON_Q_AVAILLO: "driver",
    virtio.VIRTIO_PCI_COMMON_Q_USEDLO: "device",
}


class QueueState(NamedTuple):
    """One queue as the driver has set it up, and how far both sides are."""

    size: int
    vector: int
    enabled: bool
    descriptors: int
    driver: int
    device: int
    taken: int = 0
    used: int = 0


class Queue:
    """The registers of one queue."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.reset()

    def reset(self) -> None:
        """As before any driver."""
        self.size = self.most
        self.vector = virtio.VIRTIO_MSI_NO_VECTOR
        self.enabled = False
        self.descriptors = self.driver = self.device = 0

    @property
    def place(self) -> Place:
        """Where the driver has put it."""
        return Place(self.size, self.descriptors, self.driver, self.device)

    def load(self, state: QueueState, vector: int) -> None:
        """Take a saved one, with a `vector` that there is. ValueError for a size that cannot be."""
        if not 0 < state.size <= self.most or state.size & state.size - 1:
            raise ValueError(f"its virtqueue has {state.size} entries")
        self.size, self.enabled = state.size, state.enabled
        self.vector = vector
        mask = (1 << 64) - 1
        self.descriptors, self.driver = state.descriptors & mask, state.driver & mask
        self.device = state.device & mask


class Registers:
    """`features` are offered; `sizes` has the most entries of each queue."""

    def __init__(self, features: int, sizes: Sequence[int], vectors: int) -> None:
        self.features = features
        self.queues = [Queue(size) for size in sizes]
        self._vectors = vectors
        self.reset()

    def reset(self) -> None:
        """As before any driver."""
        self.feature_select = self.driver_select = self.queue_select = 0
        self.driver_features = 0
        self.config_vector = virtio.VIRTIO_MSI_NO_VECTOR
        self.status = 0
        for queue in self.queues:
            queue.reset()

    @property
    def chosen(self) -> Queue | None:
        """The queue that queue_select names, if there is one."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def has(self, feature: int) -> bool:
        """Whether a feature, by its bit, was agreed on."""
        return bool(self.driver_features >> feature & 1)

    @property
    def agreed(self) -> bool:
        """Whether the driver asks for nothing that is not offered, and speaks virtio 1."""
        return self.has(virtio.VIRTIO_F_VERSION_1) and not self.driver_features & ~self.features

    def read(self, offset: int, size: int) -> int:
        """Any bytes of it; zeros behind."""
        queue = self.chosen
        raw = virtio.virtio_pci_common_cfg.pack(
            self.feature_select,
            self.features >> 32 * self.feature_select & _LOW if self.feature_select < 2 else 0,
            self.driver_select,
            self.driver_features >> 32 * self.driver_select & _LOW if self.driver_select < 2 else 0,
            self.config_vector,
            len(self.queues),
            self.status,
            0,  # config_generation: nothing of the configuration changes while a driver is there
            self.queue_select,
            queue.size if queue else 0,
            queue.vector if queue else virtio.VIRTIO_MSI_NO_VECTOR,
            queue.enabled if queue else 0,
            self.queue_select if queue else 0,
            queue.descriptors if queue else 0,
            queue.driver if queue else 0,
            queue.device if queue else 0,
        )
        return int.from_bytes(raw[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """All fields but device_status and queue_enable."""
        if (offset, size) == (virtio.VIRTIO_PCI_COMMON_DFSELECT, 4):
            self.feature_select = value
        elif (offset, size) == (virtio.VIRTIO_PCI_COMMON_GFSELECT, 4):
            self.driver_select = value
        elif (offset, size) == (virtio.VIRTIO_PCI_COMMON_GF, 4):
            # What was agreed on stays: rings are laid out by it.
            if self.driver_select < 2 and not self.status & virtio.VIRTIO_CONFIG_S_FEATURES_OK:
                shift = 32 * self.driver_select
                self.driver_features = self.driver_features & ~(_LOW << shift) | value << shift
        elif (offset, size) == (virtio.VIRTIO_PCI_COMMON_MSIX, 2):
            self.config_vector = self.vector(value)
        elif (offset, size) == (virtio.VIRTIO_PCI_COMMON_Q_SELECT, 2):
            self.queue_select = value
        elif self.chosen is not None:
            self._write_queue(self.chosen, offset, size, value)

    def _write_queue(self, queue: Queue, offset: int, size: int, value: int) -> None:
        if (offset, size) == (virtio.VIRTIO_PCI_COMMON_Q_MSIX, 2):
            queue.vector = self.vector(value)
        elif queue.enabled:
            return  # it lies where it lies
        elif (offset, size) == (virtio.VIRTIO_PCI_COMMON_Q_SIZE, 2):
            if 0 < value <= queue.most and not value & value - 1:
                queue.size = value
        elif size == 8 and offset in _ADDRESSES:
            setattr(queue, _ADDRESSES[offset], value)
        elif size == 4 and offset & -8 in _ADDRESSES:
            name, shift = _ADDRESSES[offset & -8], 8 * (offset & 4)
            setattr(queue, name, getattr(queue, name) & ~(_LOW << shift) | value << shift)

    def vector(self, value: int) -> int:
        """The vector, or none for one that there is not: the driver reads it back, and sees that."""
        return value if value < self._vectors else virtio.VIRTIO_MSI_NO_VECTOR
