"""Run real guests on /dev/kvm with Hyper-V enlightenments.

Nothing heavy is imported here: `hvkvm.Machine`, `hvkvm.MachineConfig` and `hvkvm.warm`
are resolved on first use, so that `import hvkvm` costs no start-up time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.machine.config import MachineConfig as MachineConfig
    from hvkvm.machine.machine import Machine as Machine
    from hvkvm.machine.warm import warm as warm

__version__ = "0.1.0"
__all__ = ["Machine", "MachineConfig", "__version__", "warm"]


def __getattr__(name: str) -> object:
    if name == "Machine":
        from hvkvm.machine.machine import Machine

        return Machine
    if name == "MachineConfig":
        from hvkvm.machine.config import MachineConfig

        return MachineConfig
    if name == "warm":
        from hvkvm.machine.warm import warm

        return warm
    raise AttributeError(f"module 'hvkvm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """For who looks what there is, such as a shell that completes names."""
    return sorted({*globals(), *__all__})
