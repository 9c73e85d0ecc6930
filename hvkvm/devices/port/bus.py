"""Port I/O dispatch: the handler of KVM_EXIT_IO, and what answers where no device is.

`PortBus.handle_io` is the hottest Python of the VMM, so a plain access costs
one table lookup. The first 8 bytes of `kvm_run.io` (direction, size, port,
count) are read as one u64, and that number is the table's key: direction,
size, port and "count is 1" are matched at once. Measured natively on 3.11 a
dispatch costs 0.2 us this way and 0.3 us by ctypes fields, beside 12 us for
the exit itself.

KVM hands REP OUTS over one element an exit; only REP INS comes in batches
(measured on 6.18: up to 1024 elements). Devices with much output need the
kernel's help (see `serial_coalesced`), not a block write here.

The machine adds devices before the vCPUs run; `handle_io` then runs on every
vCPU's own thread, at the same time for several of them. Ports that a guest may move
(`devices.pci.power`) are added and removed meanwhile, by the thread of the vCPU that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from hvkvm.devices.port.complaints import Complaints
from hvkvm.errors import ConfigError
from hvkvm.events import NULL_OBSERVER, Observer

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu

PORT_COUNT = 0x10000

_PIO_PAGE = 4096  # the data page: KVM never hands over more bytes in one exit
_IO_WORD = 4  # kvm_run's union starts at byte 32: index in u64 words
_DATA_OFFSET_WORD = 5
_ALL_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}


class PortDevice(Protocol):
    """A device on the port bus. Called on vCPU threads, several at once: keep your own lock.

    `offset` counts bytes from the device's first port, `size` is 1, 2 or 4 and
    never reaches past the device's last port. Neither method may raise,
    whatever the guest does.
    """

    def read(self, offset: int, size: int) -> int:
        """The value for an IN; bits above `size` bytes are dropped."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Take an OUT; `value` has at most `size` bytes."""
        ...


_Write = tuple[Callable[[int, int, int], None], int, int, int]
_Read = tuple[Callable[[int, int], int], int, int, int]
_Window = tuple["memoryview[int]", "memoryview[int]"]


def io_word(direction: int, size: int, port: int, count: int = 1) -> int:
    """The first 8 bytes of kvm_run.io as the u64 that keys the dispatch tables."""
    return direction | size << 8 | port << 16 | count << 32


class PortBus:
    """The 64 Ki ports and who answers each. Unclaimed reads give all ones, writes vanish."""

    def __init__(self, observer: Observer = NULL_OBSERVER) -> None:
        self._writes: dict[int, _Write] = {}
        self._reads: dict[int, _Read] = {}
        self._claims: dict[int, tuple[PortDevice | None, str]] = {}  # by port: the device, its range as text
        self._exits: dict[int, Callable[[Vcpu], None]] = {}
        self._quiet: set[int] = set()
        self._windows: dict[Vcpu, _Window] = {}
        self.unclaimed = Complaints(observer, "port-unclaimed")

    def add(self, port: int, length: int, device: PortDevice, *, width: int = 4) -> None:
        """Claim `length` ports from `port` for `device`. ConfigError when any is taken or out of range.

        `width` is the widest access in bytes the device takes whole: wider ones
        arrive as single bytes on consecutive ports, as on an ISA bus. So does an
        access that reaches past the device.
        """
        if not (port >= 0 and length > 0 and port + length <= PORT_COUNT):
            raise ConfigError(f"ports {port:#x}+{length:#x}: outside the {PORT_COUNT:#x} ports there are")
        name = f"{type(device).__name__} at {port:#x}+{length:#x}"
        self._check_free(port, length, name)
        for offset in range(length):
            self._claims[port + offset] = (device, name)
            for size, mask in _ALL_ONES.items():
                if size <= width and offset + size <= length:
                    word = io_word(KVM_EXIT_IO_OUT, size, port + offset)
                    self._writes[word] = (device.write, offset, size, mask)
                    word = io_word(KVM_EXIT_IO_IN, size, port + offset)
                    self._reads[word] = (device.read, offset, size, mask)

    def add_exit(self, port: int, size: int, handler: Callable[[Vcpu], None]) -> None:
        """Call `handler(vcpu)` at an OUT of `size` bytes to `port`, on that vCPU's thread, for what needs it.

        Nothing else is there: other accesses to these ports find no device. ConfigError as `add`.
        """
        name = f"{getattr(handler, '__qualname__', handler)} at {port:#x}+{size:#x}"
        self._check_free(port, size, name)
        for taken in range(port, port + size):
            self._claims[taken] = (None, name)
        self._exits[io_word(KVM_EXIT_IO_OUT, size, port)] = handler
        self.expect(range(port, port + size))

    def _check_free(self, port: int, length: int, name: str) -> None:
        for taken in range(port, port + length):
            if taken in self._claims:
                raise ConfigError(
                    f"{name}: port {taken:#x} belongs to {self._claims[taken][1]}; move one of them"
                )

    def remove(self, port: int, length: int) -> None:
        """Give up `length` ports from `port`, which one `add` claimed. While vCPUs run, too."""
        for offset in range(length):
            for size in _ALL_ONES:
                self._writes.pop(io_word(KVM_EXIT_IO_OUT, size, port + offset), None)
                self._reads.pop(io_word(KVM_EXIT_IO_IN, size, port + offset), None)
            self._claims.pop(port + offset, None)

    def is_free(self, port: int, length: int) -> bool:
        """Whether nobody has any of these ports, and they all exist."""
        return port + length <= PORT_COUNT and not any(
            at in self._claims for at in range(port, port + length)
        )

    def expect(self, ports: Iterable[int]) -> None:
        """Name ports that guests are known to try: unclaimed accesses there go without a warning."""
        self._quiet.update(ports)

    def handle_io(self, vcpu: Vcpu) -> None:
        """Answer the KVM_EXIT_IO that `vcpu` just made. Its own thread."""
        try:
            words, data = self._windows[vcpu]
        except KeyError:
            words, data = self._open_window(vcpu)
        word = words[_IO_WORD]
        write = self._writes.get(word)
        if write is not None:
            take, offset, size, mask = write
            take(offset, size, data[0] & mask)
            return
        read = self._reads.get(word)
        if read is not None:
            give, offset, size, mask = read
            data[0] = give(offset, size) & mask  # KVM copies only `size` bytes of it
            return
        handler = self._exits.get(word)
        if handler is not None:
            handler(vcpu)
            return
        self._handle_rare(word, data)

    def _open_window(self, vcpu: Vcpu) -> _Window:
        """View `vcpu`'s kvm_run as words, once. Its data page keeps its place for the vCPU's whole life."""
        header = vcpu.data[:64].cast("Q")
        start = header[_DATA_OFFSET_WORD]
        window = header, vcpu.data[start : start + _PIO_PAGE].cast("I")
        self._windows[vcpu] = window
        return window

    def forget(self, vcpu: Vcpu) -> None:
        """Drop the views of `vcpu`'s kvm_run, so that it can be unmapped. After its thread has ended."""
        self._windows.pop(vcpu, None)

    # --- everything but a single access to a single device --------------------------------------

    def _handle_rare(self, word: int, data: memoryview[int]) -> None:
        direction, size, port, count = word & 0xFF, word >> 8 & 0xFF, word >> 16 & 0xFFFF, word >> 32
        if size not in _ALL_ONES:
            self.unclaimed.add(f"port {port:#x}: an access of {size} bytes was ignored")
            return
        raw = data.cast("B")
        for start in range(0, min(count * size, _PIO_PAGE), size):
            if direction == KVM_EXIT_IO_OUT:
                self.write(port, size, int.from_bytes(raw[start : start + size], "little"))
            else:
                raw[start : start + size] = self.read(port, size).to_bytes(size, "little")

    def read(self, port: int, size: int) -> int:
        """The value of one IN of `size` bytes (1, 2 or 4) at `port`. Any thread."""
        found = self._reads.get(io_word(KVM_EXIT_IO_IN, size, port))
        if found is not None:
            give, offset, size, mask = found
            return give(offset, size) & mask
        if size > 1 and self._claimed(port, size):
            return sum(self.read(port + byte & 0xFFFF, 1) << 8 * byte for byte in range(size))
        if port not in self._quiet:
            self.unclaimed.add(f"port {port:#x}: a {size}-byte read found no device")
        return _ALL_ONES[size]

    def write(self, port: int, size: int, value: int) -> None:
        """Do one OUT of `size` bytes (1, 2 or 4) at `port`. Any thread."""
        found = self._writes.get(io_word(KVM_EXIT_IO_OUT, size, port))
        if found is not None:
            take, offset, size, mask = found
            take(offset, size, value & mask)
        elif size > 1 and self._claimed(port, size):
            for byte in range(size):
                self.write(port + byte & 0xFFFF, 1, value >> 8 * byte & 0xFF)
        elif port not in self._quiet:
            self.unclaimed.add(f"port {port:#x}: a {size}-byte write of {value:#x} found no device")

    def _claimed(self, port: int, size: int) -> bool:
        return any(port + byte & 0xFFFF in self._claims for byte in range(size))


class MmioHole:
    """The KVM_EXIT_MMIO handler where no device is: reads give all ones, writes vanish."""

    def __init__(self, observer: Observer = NULL_OBSERVER) -> None:
        self.unclaimed = Complaints(observer, "mmio-unclaimed")

    def handle_mmio(self, vcpu: Vcpu) -> None:
        """Answer the KVM_EXIT_MMIO that `vcpu` just made. Its own thread."""
        mmio = vcpu.run.mmio
        gpa, length = mmio.phys_addr, min(mmio.len, 8)
        if mmio.is_write:
            self.unclaimed.add(f"gpa {gpa:#x}: a {length}-byte write found neither RAM nor a device")
        else:
            mmio.data[:] = [0xFF] * 8
            self.unclaimed.add(f"gpa {gpa:#x}: a {length}-byte read found neither RAM nor a device")
