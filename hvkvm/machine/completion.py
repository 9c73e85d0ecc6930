"""What a configuration leaves open and the machine's disks decide: its firmware and its root.

Owner: whoever makes the machine. May block: images are opened for reading. Only what is needed is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.machine.config import MachineConfig


class Completed(NamedTuple):
    """`config` with nothing left open, and what was found out, for its user; mostly nothing."""

    config: MachineConfig
    boot_note: str
    root_note: str


def completed(config: MachineConfig) -> Completed:
    """Find what `config` does not name. ConfigError, BootError, CapabilityMissing."""
    boot_note = root_note = ""
    if config.cloud_init is not None:
        from hvkvm.machine.cloud_init import with_seed

        config = with_seed(config)
    if config.kernel is None and config.starts_firmware:
        from hvkvm.machine.boot_choice import choose

        config, boot_note = choose(config)
    if config.disks:
        from hvkvm.machine.root import find_root

        config, root_note = find_root(config)
    return Completed(config, boot_note, root_note)
