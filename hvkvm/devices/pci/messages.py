"""MSI-X and plain MSI of one function, of which a guest uses one, or neither. Any thread, as each of them."""

from __future__ import annotations

from hvkvm.devices.pci.msi import Msi
from hvkvm.devices.pci.msix import Msix


class Messages:
    """Has vectors sent the way that the guest has switched on. MSI-X where it has both, which it must not."""

    def __init__(self, msix: Msix, msi: Msi) -> None:
        self.msix = msix
        self.msi = msi
        msi.overruled = lambda: msix.enabled

    @property
    def enabled(self) -> bool:
        """Whether the guest uses messages and not INTx."""
        return self.msix.enabled or self.msi.enabled

    @property
    def plain(self) -> bool:
        """Whether it uses plain MSI, for which devices have masks of their own."""
        return self.msi.enabled and not self.msix.enabled

    def raise_vector(self, vector: int) -> None:
        """Send a vector's message. Nothing where neither is on."""
        if self.msix.enabled:
            self.msix.raise_vector(vector)
        elif self.msi.enabled:
            self.msi.raise_vector(vector)

    def control_written(self) -> None:
        """A capability was written. Who gives routes back does so first, so no guest holds those of both."""
        if self.msix.enabled:
            self.msi.control_written()
            self.msix.control_written()
        else:
            self.msix.control_written()
            self.msi.control_written()

    def reset(self) -> None:
        """Give every route back."""
        self.msix.reset()
        self.msi.reset()

    def close(self) -> None:
        """Give every route back, and ask for none any more."""
        self.msix.close()
        self.msi.close()
