"""A PCI function as a declaration: its header, BARs and capabilities, and the space they make.

Every byte of configuration space has a mask that says which bits a guest may write, so a write is the
same few lines whatever is written where. What a device must hear of (BARs that move, MSI-X switched
on) it is told after the write, on the vCPU's thread that wrote, outside the lock.

Any vCPU's thread reads and writes; `save`, `load` and `reset` need the vCPUs paused.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence

from hvkvm.abi import pci
from hvkvm.tuples import NamedTuple

_COMMAND_WRITABLE = (
    pci.PCI_COMMAND_IO
    | pci.PCI_COMMAND_MEMORY
    | pci.PCI_COMMAND_MASTER
    | pci.PCI_COMMAND_PARITY
    | pci.PCI_COMMAND_SERR
    | pci.PCI_COMMAND_INTX_DISABLE
)
_FULL = (1 << 64) - 1


class Identity(NamedTuple):
    """What a function says that it is. `class_code` has 24 bits, `pin` is 1 to 4 for INTA to INTD, or 0."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    pin: int = 0


class Bar(NamedTuple):
    """A memory BAR: `size` bytes, a power of two of at least 16. With `wide` it takes two registers."""

    register: int
    size: int
    wide: bool = False
    prefetchable: bool = False


class Capability(NamedTuple):
    """`body` follows the two bytes of id and next; `writable` has a mask for each byte of it."""

    id: int
    body: bytes
    writable: bytes = b""


class FunctionState(NamedTuple):
    """The 256 bytes of configuration space."""

    config: bytes


class Function:
    """One function. `extra` are registers beyond the standard header: (offset, power-on bytes, masks).

    Raises ValueError for a declaration that cannot be.
    """

    def __init__(
        self,
        identity: Identity,
        bars: Sequence[Bar] = (),
        capabilities: Sequence[Capability] = (),
        extra: Sequence[tuple[int, bytes, bytes]] = (),
    ) -> None:
        self.identity = identity
        self.bars = tuple(bars)
        self.on_decoding: Callable[[], object] | None = None
        """Called after a write that may have moved, enabled or disabled a BAR."""
        self.on_write: Callable[[int, int], object] | None = None
        """Called after a write beyond the standard header: (offset, size)."""
        self._lock = threading.Lock()
        self._power_on = bytearray(pci.PCI_CFG_SPACE_SIZE)
        self._mask = bytearray(pci.PCI_CFG_SPACE_SIZE)
        self.capability_offsets: dict[int, int] = {}
        """Where the first capability with an id stands."""
        self._declare_header()
        for bar in self.bars:
            self._declare_bar(bar)
        for offset, value, mask in extra:
            self._power_on[offset : offset + len(value)] = value
            self._mask[offset : offset + len(mask)] = mask
        self._declare_capabilities(capabilities)
        if len(self._power_on) != pci.PCI_CFG_SPACE_SIZE or len(self._mask) != pci.PCI_CFG_SPACE_SIZE:
            raise ValueError("a PCI function's registers do not fit its configuration space")
        self.config = bytearray(self._power_on)
        """For the function's owner to read, and to change what a guest cannot write."""

    def _declare_header(self) -> None:
        one = self.identity
        put = struct.pack_into
        put("<HH", self._power_on, pci.PCI_VENDOR_ID, one.vendor, one.device)
        put("<I", self._power_on, pci.PCI_CLASS_REVISION, one.class_code << 8 | one.revision)
        put("<HH", self._power_on, pci.PCI_SUBSYSTEM_VENDOR_ID, one.subsystem_vendor, one.subsystem)
        self._power_on[pci.PCI_INTERRUPT_PIN] = one.pin
        put("<H", self._mask, pci.PCI_COMMAND, _COMMAND_WRITABLE)
        self._mask[pci.PCI_CACHE_LINE_SIZE] = 0xFF
        self._mask[pci.PCI_LATENCY_TIMER] = 0xFF
        self._mask[pci.PCI_INTERRUPT_LINE] = 0xFF

    def _declare_bar(self, bar: Bar) -> None:
        if bar.size < 16 or bar.size & bar.size - 1 or bar.register + bar.wide >= pci.PCI_STD_NUM_BARS:
            raise ValueError(f"{bar}: no BAR can be so")
        at = pci.PCI_BASE_ADDRESS_0 + 4 * bar.register
        flags = (pci.PCI_BASE_ADDRESS_MEM_TYPE_64 if bar.wide else 0) | (
            pci.PCI_BASE_ADDRESS_MEM_PREFETCH if bar.prefetchable else 0
        )
        width, code = (8, "<Q") if bar.wide else (4, "<I")
        mask = -bar.size & (1 << 8 * width) - 1
        struct.pack_into(code, self._power_on, at, flags)
        struct.pack_into(code, self._mask, at, mask)

    def _declare_capabilities(self, capabilities: Sequence[Capability]) -> None:
        link, at = pci.PCI_CAPABILITY_LIST, pci.PCI_STD_HEADER_SIZEOF
        for one in capabilities:
            self._power_on[link] = at
            self._power_on[at] = one.id
            self.capability_offsets.setdefault(one.id, at)
            body = at + 2
            self._power_on[body : body + len(one.body)] = one.body
            self._mask[body : body + len(one.writable)] = one.writable
            link = at + pci.PCI_CAP_LIST_NEXT
            at += -(-(2 + len(one.body)) // 4) * 4
        if capabilities:
            self._power_on[pci.PCI_STATUS] |= pci.PCI_STATUS_CAP_LIST

    def read(self, offset: int, size: int) -> int:
        """`size` bytes (1, 2 or 4) at `offset`, inside the space."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write what may be written of `size` bytes at `offset`."""
        end = offset + size
        with self._lock:
            mask = int.from_bytes(self._mask[offset:end], "little")
            if not mask:
                return
            old = int.from_bytes(self.config[offset:end], "little")
            self.config[offset:end] = (old & ~mask | value & mask).to_bytes(size, "little")
        if offset < pci.PCI_STD_HEADER_SIZEOF:
            if (offset < pci.PCI_STATUS or pci.PCI_BASE_ADDRESS_0 <= offset < 0x28) and self.on_decoding:
                self.on_decoding()
        elif self.on_write:
            self.on_write(offset, size)

    @property
    def command(self) -> int:
        """PCI_COMMAND."""
        return self.config[pci.PCI_COMMAND] | self.config[pci.PCI_COMMAND + 1] << 8

    @property
    def is_master(self) -> bool:
        """Whether the guest lets the function read and write memory, and send MSIs."""
        return bool(self.config[pci.PCI_COMMAND] & pci.PCI_COMMAND_MASTER)

    def where(self, bar: Bar) -> int | None:
        """The gpa at which a BAR is decoded now; None while it is not.

        A BAR at 0 is one that nobody has placed yet; all ones are a guest that asks for its size.
        """
        if not self.config[pci.PCI_COMMAND] & pci.PCI_COMMAND_MEMORY:
            return None
        at = pci.PCI_BASE_ADDRESS_0 + 4 * bar.register
        width = 8 if bar.wide else 4
        base = int.from_bytes(self.config[at : at + width], "little") & -bar.size
        if not base or base == -bar.size & (1 << 8 * width) - 1:
            return None
        return base

    def set_interrupt_status(self, level: bool) -> None:
        """Show in PCI_STATUS whether INTx is asserted. Any thread."""
        with self._lock:
            if level:
                self.config[pci.PCI_STATUS] |= pci.PCI_STATUS_INTERRUPT
            else:
                self.config[pci.PCI_STATUS] &= ~pci.PCI_STATUS_INTERRUPT & 0xFF

    def reset(self) -> None:
        """Power-on contents; no BAR is decoded."""
        self.config[:] = self._power_on

    def save(self) -> FunctionState:
        """All registers."""
        return FunctionState(bytes(self.config))

    def load(self, state: FunctionState) -> None:
        """Take what a guest could have written; the rest stays as declared. ValueError for another size."""
        if len(state.config) != pci.PCI_CFG_SPACE_SIZE:
            raise ValueError("its PCI configuration space has another size")
        for at, (mask, value) in enumerate(zip(self._mask, state.config, strict=True)):
            self.config[at] = self._power_on[at] & ~mask | value & mask
