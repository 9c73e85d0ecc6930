"""MMIO dispatch: the handler of KVM_EXIT_MMIO for a machine whose devices have memory of their own.

Ranges come and go while the guest runs, as it places BARs, and a guest may lay them over each other:
then the one that was added first answers, and the other has what is left. Where KVM has RAM there is
no exit, so no device can hide RAM. An unclaimed read gives all ones; a guest tells by that that
nothing is there.

`handle_mmio` runs on every vCPU's own thread at once; `add` and `remove` on any.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

from hvkvm.devices.port.bus import MmioHole
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu


class MmioDevice(Protocol):
    """A range's owner. Called on vCPU threads, several at once: keep your own lock.

    `offset` counts bytes from the range's start; `size` is 1 to 8 and never reaches past its end.
    Neither method may raise, whatever the guest does.
    """

    def read(self, offset: int, size: int) -> int:
        """The value read; bits above `size` bytes are dropped."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write; `value` has at most `size` bytes."""
        ...


class MmioRange(NamedTuple):
    """`size` bytes of guest physical addresses from `gpa`, and who answers there."""

    gpa: int
    size: int
    device: MmioDevice


class _Segment(NamedTuple):
    """What is left of a range once those before it have theirs: no two segments overlap."""

    start: int
    end: int
    base: int
    device: MmioDevice


class MmioBus(MmioHole):
    """The ranges, and who answers each."""

    def __init__(self, observer: Observer = NULL_OBSERVER) -> None:
        super().__init__(observer)
        self._lock = threading.Lock()
        self._ranges: list[MmioRange] = []
        # Replaced as a whole, so that a vCPU thread that looks up takes no lock.
        self._map: tuple[list[int], list[_Segment]] = ([], [])

    def add(self, gpa: int, size: int, device: MmioDevice) -> MmioRange:
        """Have `device` answer from `gpa` on, where nobody does yet; the key for `remove`."""
        added = MmioRange(gpa, size, device)
        with self._lock:
            self._ranges.append(added)
            self._rebuild()
        return added

    def remove(self, given: MmioRange) -> None:
        """Take a range away; ValueError if it is not there."""
        with self._lock:
            self._ranges.remove(given)
            self._rebuild()

    def ranges(self) -> list[MmioRange]:
        """All of them, in the order in which they were added."""
        with self._lock:
            return list(self._ranges)

    def _rebuild(self) -> None:
        segments: list[_Segment] = []
        for gpa, size, device in self._ranges:
            pieces = [(gpa, gpa + size)]
            for taken in segments:
                pieces = [part for piece in pieces for part in _without(piece, taken.start, taken.end)]
            segments += [_Segment(start, end, gpa, device) for start, end in pieces]
        segments.sort(key=lambda one: one.start)
        self._map = [one.start for one in segments], segments

    def handle_mmio(self, vcpu: Vcpu) -> None:
        """Answer the KVM_EXIT_MMIO that `vcpu` just made. Its own thread."""
        mmio = vcpu.run.mmio
        gpa, length = mmio.phys_addr, min(mmio.len, 8)
        segment = self._find(gpa, length)
        if segment is None:
            self._across(vcpu, gpa, length)
        elif mmio.is_write:
            value = int.from_bytes(bytes(mmio.data[:length]), "little")
            segment.device.write(gpa - segment.base, length, value)
        else:
            mask = (1 << 8 * length) - 1
            value = segment.device.read(gpa - segment.base, length) & mask
            mmio.data[:length] = value.to_bytes(length, "little")

    def read(self, gpa: int, size: int) -> int:
        """What a guest reads there: all ones where nobody answers. Any thread."""
        segment = self._find(gpa, size)
        if segment is None:
            return (1 << 8 * size) - 1
        return segment.device.read(gpa - segment.base, size) & ((1 << 8 * size) - 1)

    def write(self, gpa: int, size: int, value: int) -> None:
        """A guest's write, which vanishes where nobody answers. Any thread."""
        segment = self._find(gpa, size)
        if segment is not None:
            segment.device.write(gpa - segment.base, size, value & ((1 << 8 * size) - 1))

    def _find(self, gpa: int, size: int) -> _Segment | None:
        """The segment that has all of an access."""
        starts, segments = self._map
        at = bisect_right(starts, gpa) - 1
        if at >= 0 and size > 0:
            found = segments[at]
            if gpa + size <= found.end:
                return found
        return None

    def _across(self, vcpu: Vcpu, gpa: int, length: int) -> None:
        """An access that no segment has whole: byte by byte if any has some of it."""
        if length < 2 or all(self._find(gpa + byte, 1) is None for byte in range(length)):
            super().handle_mmio(vcpu)
            return
        mmio = vcpu.run.mmio
        for byte in range(length):
            if mmio.is_write:
                self.write(gpa + byte, 1, mmio.data[byte])
            else:
                mmio.data[byte] = self.read(gpa + byte, 1)


def _without(piece: tuple[int, int], start: int, end: int) -> list[tuple[int, int]]:
    """What of a piece lies outside [start, end)."""
    parts = ((piece[0], min(piece[1], start)), (max(piece[0], end), piece[1]))
    return [part for part in parts if part[0] < part[1]]
