"""Run real guests on /dev/kvm with Hyper-V enlightenments.

Nothing heavy is imported here: `hvkvm.Machine` and `hvkvm.MachineConfig` are
resolved on first use, so that `import hvkvm` costs no start-up time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.machine.config import MachineConfig as MachineConfig
    from hvkvm.machine.machine import Machine as Machine

__version__ = "0.1.0"
__all__ = ["Machine", "MachineConfig", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Machine":
        from hvkvm.machine.machine import Machine

        return Machine
    if name == "MachineConfig":
        from hvkvm.machine.config import MachineConfig

        return MachineConfig
    raise AttributeError(f"module 'hvkvm' has no attribute {name!r}")
