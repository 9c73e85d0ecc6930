r"""\_SB.PCI0, the root of a machine that has PCI: which addresses its devices may have, where INTx goes.

Pure; for `boot.acpi.build`. Interrupts need no link devices: every slot's four pins go straight to
four pins of the IOAPIC, level-triggered and active low, as `abi.pci.gsi_of` says.
"""

from __future__ import annotations

from hvkvm.abi import board, pci
from hvkvm.abi.hpet import HPET_SIZE
from hvkvm.boot import aml
from hvkvm.errors import ConfigError

_ANY_FUNCTION = 0xFFFF


def mem32_window(memory_size: int) -> tuple[int, int]:
    """Base and size of the window for 32-bit BARs, on a machine with `memory_size` bytes of RAM.

    Firmware places BARs from the end of RAM upwards, though not below 2 GiB.
    """
    low_end = min(memory_size, board.RAM_LOW_LIMIT)
    base = max(low_end, pci.MEM32_LEAST)
    if base >= pci.MEM32_LIMIT:
        raise ConfigError("no room is left for PCI below 4 GiB")
    return base, pci.MEM32_LIMIT - base


def devices(memory_size: int, *, hpet: bool) -> list[bytes]:
    r"""For \_SB of a machine with PCI, and with `hpet` an HPET. ConfigError."""
    found = [host_bridge(memory_size), real_time_clock()]
    return [*found, event_timer()] if hpet else found


def host_bridge(memory_size: int) -> bytes:
    """The Device term."""
    config_ports = (pci.PCI_CONFIG_ADDRESS, 8)
    resources = aml.resource_template(
        aml.word_bus_numbers(0, 1),
        aml.io_ports(*config_ports),
        aml.word_io(0, pci.PCI_CONFIG_ADDRESS),
        aml.word_io(sum(config_ports), 0x10000 - sum(config_ports)),
        aml.dword_memory(*mem32_window(memory_size)),
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        aml.name("_CRS", resources),
        aml.name("_PRT", _routing()),
    )


def real_time_clock() -> bytes:
    r"""\_SB.RTC, an MC146818's ports and interrupt. Windows wants it in the tables; Linux has a /dev/rtc0."""
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.io_ports(board.CMOS_PORT, board.CMOS_SIZE), aml.irq_no_flags(board.RTC_IRQ)
            ),
        ),
    )


def event_timer() -> bytes:
    r"""\_SB.HPET. Its interrupts are no resources of it: a timer says which pins it may have."""
    resources = aml.resource_template(aml.fixed_memory(board.HPET_ADDRESS, HPET_SIZE))
    return aml.device(
        "HPET",
        aml.name("_HID", aml.eisa_id("PNP0103")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", resources),
    )


def _routing() -> bytes:
    """_PRT: of every slot and pin (0 is INTA), the GSI."""
    return aml.package(
        *(
            aml.package(
                aml.integer(slot << 16 | _ANY_FUNCTION),
                aml.integer(pin),
                aml.ZERO,
                aml.integer(pci.gsi_of(slot, pin + 1)),
            )
            for slot in range(1, pci.DEVICES)
            for pin in range(4)
        )
    )
