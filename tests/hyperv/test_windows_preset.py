"""`--hv windows`: what a guest is shown, held against docs/windows.md; and what it insists on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvkvm.abi import tlfs
from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.hyperv.cpuid import hyperv_leaves
from hvkvm.hyperv.enlightenments import BY_NAME, ENLIGHTENMENTS, WINDOWS, WINDOWS_NEEDS
from hvkvm.hyperv.features import HostFeatures, parse_features, resolve

PAGE = Path(__file__).parents[2] / "docs/windows.md"
NEVER = 0xFFFFFFFF
CAPS = {cap: 1 for row in ENLIGHTENMENTS for cap in row.kvm_caps}
EVERYTHING = HostFeatures(
    CAPS, {0x40000003: (NEVER,) * 4, 0x40000004: (NEVER, 0xFFF, 0, 0), 0x4000000A: (NEVER,) * 4}
)
WITHOUT_SYNIC = HostFeatures({**CAPS, "KVM_CAP_HYPERV_SYNIC2": 0}, EVERYTHING.leaves)
NOTHING = HostFeatures(dict.fromkeys(CAPS, 0), None)


def promised() -> dict[tuple[int, str], set[int]]:
    """The bits that the page's last column has, by leaf and register."""
    found: dict[tuple[int, str], set[int]] = {}
    where = (0, "")
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 6 or cells[0] == "CPUID":
            continue
        if named := re.fullmatch(r"0x(\w+) (EAX|EDX)", cells[0]):
            where = int(named[1], 16), named[2].lower()
        elif cells[0]:
            where = (0, "")
        if where[0] and cells[5] == "yes":
            found.setdefault(where, set()).add(int(cells[1].split()[0]))
    return found


def test_the_page_says_what_a_guest_is_shown() -> None:
    """Bits that go with one of these by TLFS, and the one that comes with any Hyper-V, stand aside."""
    leaves = {
        leaf.function: leaf for leaf in hyperv_leaves(resolve(parse_features("windows"), EVERYTHING), 4)
    }
    with_others = {
        (0x40000003, "edx"): tlfs.HV_X64_CPU_DYNAMIC_PARTITIONING_AVAILABLE,
        (0x40000004, "eax"): tlfs.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED,
    }
    table = promised()
    assert set(table) == {(0x40000003, "eax"), (0x40000003, "edx"), (0x40000004, "eax")}
    for (leaf, register), bits in table.items():
        shown = getattr(leaves[leaf], register) & ~with_others.get((leaf, register), 0)
        assert shown == sum(1 << bit for bit in bits), (hex(leaf), register)
    assert leaves[0x40000004].ebx == NEVER
    assert leaves[0x40000001].eax == tlfs.HV_CPUID_SIGNATURE_EAX


def test_every_name_is_one() -> None:
    assert set(WINDOWS) <= set(BY_NAME)
    assert set(WINDOWS_NEEDS) <= set(WINDOWS)
    for name in WINDOWS:
        assert set(BY_NAME[name].requires) <= set(WINDOWS), name


def test_what_this_host_lacks_is_left_out_with_what_needs_it() -> None:
    assert set(resolve(parse_features("windows"), EVERYTHING).names) == set(WINDOWS)
    less = set(resolve(parse_features("windows"), WITHOUT_SYNIC).names)
    assert less == set(WINDOWS) - {"synic", "stimer"}


def test_features_can_be_added_and_taken_away() -> None:
    names = resolve(parse_features("windows,-crash,xmm-input"), EVERYTHING).names
    assert "crash" not in names
    assert "xmm-input" in names


@pytest.mark.parametrize(("text", "host"), [("windows", NOTHING), ("windows,-vpindex,-synic", EVERYTHING)])
def test_what_windows_cannot_start_without_is_insisted_on(text: str, host: HostFeatures) -> None:
    with pytest.raises(CapabilityMissing, match="hv-vpindex"):
        resolve(parse_features(text), host)


def test_it_is_a_choice_of_its_own() -> None:
    with pytest.raises(ConfigError, match="contradicts host-model"):
        parse_features("host-model,windows")
