"""The VM's interrupt routing table: which GSI means which pin, MSI or Hyper-V SINT.

KVM replaces the table as a whole, so one object must own all of it: `GsiTable`
is the only caller of KVM_SET_GSI_ROUTING (S15). Any thread; a lock makes each
change one step, and a commit that KVM refuses leaves table and kernel as they were.

Two facts to know. KVM records which GSI hears the end of a SINT's message (EOM)
while it takes the table, and only for vCPUs whose SynIC is active by then: call
`recommit` after enabling one. And an eventfd tied to a GSI without a route
is accepted by KVM and does nothing: add the route first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi.hv_synic import HV_SYNIC_SINT_COUNT
from hvkvm.abi.kvm import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
)
from hvkvm.abi.kvm_structs import kvm_irq_routing_entry
from hvkvm.errors import RouteError

if TYPE_CHECKING:
    from collections.abc import Sequence

GSI_LIMIT = 4096  # KVM_MAX_IRQ_ROUTES, which KVM_CAP_IRQ_ROUTING reports and the UAPI does not define


class RoutingSink(Protocol):
    """What a `GsiTable` needs of its VM: `Vm`, or a recorder in a test."""

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None: ...


class GsiTable:
    """The table. Starts with KVM's own default for the full irqchip (GSI 0-23), which KVM already holds.

    `full_irqchip=False` (split irqchip) starts empty; dynamic GSIs begin at 24 either way (S16).
    """

    def __init__(self, vm: RoutingSink, *, full_irqchip: bool = True) -> None:
        self._vm = vm
        self._lock = RLock()
        self._batches = 0
        self._dirty = False
        self._routes: dict[int, tuple[kvm_irq_routing_entry, ...]] = {}
        if full_irqchip:
            self._routes = {gsi: _default_routes(gsi) for gsi in range(KVM_IOAPIC_NUM_PINS)}

    def add_msi(self, address: int, data: int) -> int:
        """Route a new GSI to an MSI and commit; returns the GSI. Raises KvmIoctlError, RouteError (full)."""
        entry = kvm_irq_routing_entry(type=KVM_IRQ_ROUTING_MSI)
        entry.u.msi.address_lo = address & 0xFFFFFFFF
        entry.u.msi.address_hi = address >> 32
        entry.u.msi.data = data
        return self._add(entry)

    def add_hv_sint(self, vp_index: int, sint: int) -> int:
        """Route a new GSI to SINT `sint` of VP `vp_index` and commit; returns the GSI.

        KVM takes any numbers here (S11), so a SINT outside 0..15 or a negative
        VP raises RouteError; whether the VP exists is the caller's to know.
        KvmIoctlError (EINVAL) without CONFIG_KVM_HYPERV.
        """
        if not 0 <= sint < HV_SYNIC_SINT_COUNT:
            raise RouteError(f"SINT {sint} of VP {vp_index}: a VP has SINTs 0 to {HV_SYNIC_SINT_COUNT - 1}")
        if not 0 <= vp_index <= 0xFFFFFFFF:
            raise RouteError(f"SINT {sint} of VP {vp_index}: no such VP")
        entry = kvm_irq_routing_entry(type=KVM_IRQ_ROUTING_HV_SINT)
        entry.u.hv_sint.vcpu = vp_index
        entry.u.hv_sint.sint = sint
        return self._add(entry)

    def update_msi(self, gsi: int, address: int, data: int) -> None:
        """Point a GSI from `add_msi` elsewhere and commit. Raises RouteError for a GSI that is none."""
        with self.batch():
            old = self._routes.get(gsi, ())
            if gsi < KVM_IOAPIC_NUM_PINS or not old or old[0].type != KVM_IRQ_ROUTING_MSI:
                raise RouteError(f"GSI {gsi} carries no MSI route")
            entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI)
            entry.u.msi.address_lo = address & 0xFFFFFFFF
            entry.u.msi.address_hi = address >> 32
            entry.u.msi.data = data
            self._routes[gsi] = (entry,)
            self._dirty = True

    def release(self, gsi: int) -> None:
        """Take a GSI's route away and commit, so that no stale one is left in KVM (S15).

        Deassign the irqfd first. Raises RouteError for a GSI that was never
        given out (or was already released): releasing another's is the bug that hides longest.
        """
        with self.batch():
            if gsi < KVM_IOAPIC_NUM_PINS or gsi not in self._routes:
                raise RouteError(f"GSI {gsi} was not given out by this table")
            del self._routes[gsi]
            self._dirty = True

    def recommit(self) -> None:
        """Hand KVM the same table again, for the SINT acknowledgements it records only then."""
        with self.batch():
            self._dirty = True

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Join several changes into one commit, made when the outermost batch ends; other threads wait.

        If the body raises, or KVM refuses the commit, the table is back to what
        it was before the outermost batch, and the error goes on.
        """
        with self._lock:
            before = self._routes.copy() if self._batches == 0 else None
            self._batches += 1
            try:
                yield
                if self._batches == 1 and self._dirty:
                    self._vm.set_gsi_routing(
                        [entry for gsi in sorted(self._routes) for entry in self._routes[gsi]]
                    )
            except BaseException:
                if before is not None:
                    self._routes = before
                raise
            finally:
                self._batches -= 1
                if self._batches == 0:
                    self._dirty = False

    def gsis(self) -> list[int]:
        """The GSIs given out and not released, in order."""
        with self._lock:
            return sorted(gsi for gsi in self._routes if gsi >= KVM_IOAPIC_NUM_PINS)

    def _add(self, entry: kvm_irq_routing_entry) -> int:
        with self.batch():
            gsi = next((n for n in range(KVM_IOAPIC_NUM_PINS, GSI_LIMIT) if n not in self._routes), 0)
            if not gsi:
                raise RouteError(f"all GSIs below {GSI_LIMIT} are taken")
            entry.gsi = gsi
            self._routes[gsi] = (entry,)
            self._dirty = True
        return gsi


def _default_routes(gsi: int) -> tuple[kvm_irq_routing_entry, ...]:
    """KVM's own default: PIC and IOAPIC share GSI 0-15, the IOAPIC alone has 16-23."""
    routes = []
    if gsi < 8:
        routes.append(_pin_route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi))
    elif gsi < 16:
        routes.append(_pin_route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8))
    routes.append(_pin_route(gsi, KVM_IRQCHIP_IOAPIC, gsi))
    return tuple(routes)


def _pin_route(gsi: int, chip: int, pin: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = chip
    entry.u.irqchip.pin = pin
    return entry
