"""The vCPUs and interrupt chips of a machine, and the image that a reset starts them on.

A `part.Part`: the last to reset, since the registers decide where the guest goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.machine.reset import PowerOnState

if TYPE_CHECKING:
    from hvkvm.machine.build import GuestImage
    from hvkvm.machine.platform import Platform


class Processors:
    """Made when nothing has run yet: what KVM shows then is the power-on state. Raises BootError."""

    name = "vCPUs"

    def __init__(self, platform: Platform, image: GuestImage) -> None:
        self._platform = platform
        self._image = image
        self._power_on = PowerOnState(platform.kvm, platform.vm, platform.vcpus, observer=platform.observer)
        image.load(platform.memory, platform.vcpus[0])

    def start(self) -> None:
        """See `Part.start`: the threads run when `Lifecycle` lets them."""

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`: they are paused already."""
        done()

    def reset(self) -> None:
        """See `Part.reset`: power-on registers, and the image loaded afresh; other RAM stays as it is."""
        self._power_on.restore()
        self._image.load(self._platform.memory, self._platform.vcpus[0])
