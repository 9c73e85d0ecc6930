"""From features to CPUID leaves, vCPU capabilities and reset MSRs."""

from __future__ import annotations

import pytest

from hvkvm.abi import tlfs
from hvkvm.abi.kvm import KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_ENLIGHTENED_VMCS, KVM_CAP_HYPERV_SYNIC2
from hvkvm.hyperv.cpuid import hyperv_leaves, prepare_vcpu, reset_msrs, restore_order, vcpu_caps
from hvkvm.hyperv.enlightenments import ENLIGHTENMENTS, Version
from hvkvm.hyperv.features import FeatureSet

Leaf = tuple[int, int, int, int]


def leaves(*names: str, cpus: int = 4, **more: object) -> dict[int, Leaf]:
    features = FeatureSet(names, **more)  # type: ignore[arg-type]
    return {e.function: (e.eax, e.ebx, e.ecx, e.edx) for e in hyperv_leaves(features, cpus)}


def test_an_empty_set_shows_nothing() -> None:
    assert hyperv_leaves(FeatureSet(), 4) == []


def test_the_frame_of_every_set() -> None:
    shown = leaves("relaxed", cpus=3)
    assert sorted(shown) == [0x40000000 + n for n in range(6)]
    assert shown[0x40000000] == (0x40000005, 0x7263694D, 0x666F736F, 0x76482074)
    assert shown[0x40000001] == (0x31237648, 0, 0, 0)
    assert shown[0x40000002] == (0x3839, 0x000A0000, 0, 0)
    assert shown[0x40000003] == (1 << 5, 0, 0, 1 << 3), "hypercall MSRs and CPU hot-add come with anything"
    assert shown[0x40000004] == (1 << 5, 0xFFFFFFFF, 0, 0)
    assert shown[0x40000005] == (3, 64, 0, 0)


# Leaf: register[bit] of each flag, as QEMU documents them.
BITS = [
    ("relaxed", {(4, 0): 1 << 5}),
    ("vapic", {(3, 0): 1 << 4, (4, 0): 1 << 3}),
    ("vpindex", {(3, 0): 1 << 6}),
    ("runtime", {(3, 0): 1 << 0}),
    ("reset", {(3, 0): 1 << 7}),
    ("crash", {(3, 3): 1 << 10}),
    ("time", {(3, 0): 1 << 1 | 1 << 9}),
    ("synic", {(3, 0): 1 << 2, (3, 1): 1 << 4 | 1 << 5}),
    ("stimer", {(3, 0): 1 << 3}),
    ("stimer-direct", {(3, 3): 1 << 19}),
    ("tlbflush", {(4, 0): 1 << 2 | 1 << 11}),
    ("tlbflush-ext", {(3, 3): 1 << 14}),
    ("tlbflush-direct", {(0xA, 0): 1 << 17}),
    ("ipi", {(4, 0): 1 << 10 | 1 << 11}),
    ("frequencies", {(3, 0): 1 << 11, (3, 3): 1 << 8}),
    ("reenlightenment", {(3, 0): 1 << 13}),
    ("tsc-invariant", {(3, 0): 1 << 15}),
    ("evmcs", {(4, 0): 1 << 14, (0xA, 0): 0x0101}),
    ("emsr-bitmap", {(0xA, 0): 1 << 19}),
    ("xmm-input", {(3, 3): 1 << 4}),
    ("avic", {(4, 0): 1 << 9}),
    ("lazy-eoi", {}),
    ("syndbg", {(3, 3): 1 << 11, (0x82, 0): 1 << 1}),
    ("no-nonarch-coresharing", {(4, 0): 1 << 18}),
    ("enforce-cpuid", {}),
]


@pytest.mark.parametrize(("name", "bits"), BITS, ids=[name for name, _ in BITS])
def test_each_flag_sets_its_bits_and_no_others(name: str, bits: dict[tuple[int, int], int]) -> None:
    shown = leaves(name)
    bare = {3: (1 << 5, 0, 0, 1 << 3), 4: (0, 0xFFFFFFFF, 0, 0), 0xA: (0, 0, 0, 0), 0x82: (0, 0, 0, 0)}
    for leaf, values in bare.items():
        got = shown.get(0x40000000 + leaf, (0, 0, 0, 0))
        for register in range(4):
            assert got[register] == values[register] | bits.get((leaf, register), 0), (leaf, register)


def test_every_flag_has_its_bits_tested() -> None:
    assert {name for name, _ in BITS} | {"spinlocks"} == {row.name for row in ENLIGHTENMENTS}


def test_avic_takes_back_the_advice_to_use_apic_msrs() -> None:
    shown = leaves("vapic", "avic")
    assert shown[0x40000003][0] & 1 << 4
    assert shown[0x40000004][0] == 1 << 9


def test_lazy_eoi_gives_it_again() -> None:
    shown = leaves("vapic", "avic", "lazy-eoi")
    assert shown[0x40000003][0] & 1 << 4
    assert shown[0x40000004][0] == 1 << 9 | 1 << 3


def test_spinlocks_is_a_number() -> None:
    assert leaves("spinlocks", spinlocks=0x1FFF)[0x40000004][1] == 0x1FFF


def test_nested_features_bring_the_leaves_in_between() -> None:
    shown = leaves("emsr-bitmap")
    assert shown[0x40000000][0] == 0x4000000A
    assert [shown[0x40000000 + n] for n in (6, 7, 8, 9)] == [(0, 0, 0, 0)] * 4


def test_syndbg_brings_its_leaves() -> None:
    shown = leaves("syndbg")
    assert shown[0x40000000][0] == 0x40000082
    words = shown[0x40000080]
    assert words[0] == 0x40000082
    assert b"".join(word.to_bytes(4, "little") for word in words[1:]) == b"Microsoft VS"
    assert shown[0x40000081][0] == int.from_bytes(b"VS#1", "little")


def test_vendor_version_and_limits_are_shown_as_set() -> None:
    shown = leaves(
        "relaxed",
        vendor_id=b"Acme".ljust(12, b"\0"),
        version=Version(1, 2, 3, 4, 5, 6),
        max_vps=1024,
        max_lps=32,
    )
    assert shown[0x40000000][1:] == (int.from_bytes(b"Acme", "little"), 0, 0)
    assert shown[0x40000002] == (1, 2 << 16 | 3, 4, 5 << 24 | 6)
    assert shown[0x40000005][:2] == (1024, 32)


def test_vcpu_caps_name_what_to_enable_and_leave_synic2_to_the_synic() -> None:
    enabled: list[tuple[int, ...]] = []

    class Vcpu:
        def enable_cap(self, cap: int, *args: int) -> None:
            enabled.append((cap, *args))

    features = FeatureSet(("vapic", "vpindex", "synic", "evmcs", "enforce-cpuid"))
    prepare_vcpu(Vcpu(), features)
    assert [cap for cap, *_ in enabled] == [KVM_CAP_HYPERV_ENLIGHTENED_VMCS, KVM_CAP_HYPERV_ENFORCE_CPUID]
    assert enabled[0][1] != 0, "KVM writes the version there"
    assert enabled[1][1:] == (1,)
    assert KVM_CAP_HYPERV_SYNIC2 not in [cap.cap for cap in vcpu_caps(features)]
    assert vcpu_caps(FeatureSet(("relaxed",))) == []


ALL = FeatureSet(tuple(row.name for row in ENLIGHTENMENTS))


def test_reset_msrs_come_in_kvms_order_and_vm_wide_ones_once() -> None:
    first, second = reset_msrs(ALL, 0), reset_msrs(ALL, 1)
    indices = [index for index, _ in first]
    assert indices[:9] == [
        0x40000000,
        0x40000001,  # taken only while there is a guest OS id
        0x40000000,
        0x40000021,
        0x40000106,
        0x40000107,
        0x40000108,
        0x40000118,
        0x400000FF,
    ]
    assert [index for index, _ in second] == indices[9:]
    assert indices[9:] == [
        0x40000073,
        *range(0x40000100, 0x40000106),
        0x40000002,
        0x40000081,
        0x40000080,
        0x40000082,
        0x40000083,
        *range(0x40000090, 0x400000A0),
        0x400000B0,
        0x400000B2,
        0x400000B4,
        0x400000B6,
        0x400000B1,
        0x400000B3,
        0x400000B5,
        0x400000B7,
    ]


def test_reset_values_are_zero_but_for_four() -> None:
    values = dict(reset_msrs(ALL, 7))
    assert values.pop(0x40000002) == 7
    assert values.pop(0x40000081) == 1
    assert values.pop(0x40000105) == 1 << 63 | 1 << 62, "crash: what the guest may use"
    for sint in range(16):
        assert values.pop(0x40000090 + sint) == 0x10000, "masked"
    assert set(values.values()) == {0}


def test_reset_touches_only_msrs_of_features_that_are_on() -> None:
    assert reset_msrs(FeatureSet(("relaxed",)), 0) == [(0x40000000, 1), (0x40000001, 0), (0x40000000, 0)]
    assert reset_msrs(FeatureSet(("relaxed",)), 1) == []
    assert reset_msrs(FeatureSet(), 0) == []
    synic = [index for index, _ in reset_msrs(FeatureSet(("vpindex", "synic")), 1)]
    assert 0x40000083 in synic
    assert 0x400000B0 not in synic
    assert {index >> 4 for index, _ in reset_msrs(None, 0)} == {0x4000008, 0x4000009, 0x400000B}


@pytest.mark.parametrize("old_kvm", [True, False])
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (0x2_0008, 123),  # auto-enabled, and expired since
        (0x2_0009, 123),
        (0x2_0009, 0),  # enabled, and waits for a count
        (0x2_0003, 1000),
        (0, 0),
    ],
)
def test_a_timer_is_restored_as_it_was_on_any_kvm(config: int, count: int, old_kvm: bool) -> None:
    """KVM before 6.7 (and stable kernels of that time) lets the host's count enable and disable a timer."""
    timer = tlfs.HV_X64_MSR_STIMER0_CONFIG + 2
    kept = {timer: 0, timer + 1: 0}
    order = restore_order({timer: config, timer + 1: count, tlfs.HV_X64_MSR_SINT0 + 2: 0x30})
    assert order[0] == (tlfs.HV_X64_MSR_SINT0 + 2, 0x30)
    for index, value in order[1:]:
        kept[index] = value
        if old_kvm and index == timer + 1:
            if not value:
                kept[timer] &= ~tlfs.HV_STIMER_ENABLE
            elif kept[timer] & tlfs.HV_STIMER_AUTOENABLE:
                kept[timer] |= tlfs.HV_STIMER_ENABLE
    assert kept == {timer: config, timer + 1: count}
