"""`--hv`: what is asked for, what the host has, what comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import kvm as abi_kvm
from hvkvm.abi import tlfs
from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.hyperv.enlightenments import ALIASES, ENLIGHTENMENTS, REGISTERS, Version
from hvkvm.hyperv.features import FeatureSet, HostFeatures, parse_features, resolve

NEVER = 0xFFFFFFFF
CAPS = {cap: 1 for row in ENLIGHTENMENTS for cap in row.kvm_caps}

# What KVM 6.1 on AMD was seen to report.
SEEN_6_1 = {
    0x40000000: (0x40000082, 0x756E694C, 0x564B2078, 0x7648204D),
    0x40000001: (0x31237648, 0, 0, 0),
    0x40000002: (0x3839, 0xA0000, 0, 0),
    0x40000003: (0x00002AFF, 0x00000830, 0, 0x00080D12),
    0x40000004: (0x00040E2C, 0xFFF, 0, 0),
    0x40000005: (1024, 64, 0, 0),
    0x4000000A: (0x80000, 1, 0, 0),
}
HOST_6_1 = HostFeatures({**CAPS, "KVM_CAP_HYPERV_ENLIGHTENED_VMCS": 0}, SEEN_6_1)
NO_HYPERV = HostFeatures(dict.fromkeys(CAPS, 0), None)
EVERYTHING = HostFeatures(
    CAPS, {0x40000003: (NEVER,) * 4, 0x40000004: (NEVER, 0xFFF, 0, 0), 0x4000000A: (NEVER,) * 4}
)


def names(text: str, host: HostFeatures = EVERYTHING) -> set[str]:
    return set(resolve(parse_features(text), host).names)


@pytest.mark.parametrize(
    "text", ["relaxed", "hv-relaxed", "hv_relaxed", "+relaxed", "relaxed=on", " HV-Relaxed "]
)
def test_a_flag_may_be_written_as_qemu_does_or_shorter(text: str) -> None:
    assert names(text) == {"relaxed"}


def test_off_takes_nothing_from_a_list_that_has_it_not() -> None:
    assert names("relaxed,vapic=off,-ipi") == {"relaxed"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("nothing named", "host-model")),
        ("relaxed,vapic,-vapic", ("hv-vapic is both on and off", "choose one")),
        ("-vapic,relaxed,vapic=on", ("hv-vapic is both off and on", "choose one")),
        ("relaxed,,vapic", ("empty name", "comma")),
        ("-", ("empty name",)),
        ("stimmer", ("stimmer", "no such", "did you mean hv-stimer?")),
        ("hostmodel", ("did you mean host-model?",)),
        ("qwertyuiop", ("no such", "relaxed, vapic")),
        ("synic", ("hv-synic requires hv-vpindex", "add hv-vpindex")),
        ("vpindex,synic,stimer", ("hv-stimer requires hv-time", "add hv-time")),
        ("stimer", ("hv-synic and hv-time",)),
        ("tlbflush-direct", ("hv-tlbflush-direct requires hv-vapic",)),
        ("host-model,stimer,-synic", ("hv-stimer requires hv-synic", "keep hv-synic")),
        ("none,relaxed", ("none", "contradicts")),
        ("host-model,passthrough", ("contradicts host-model", "choose one")),
        ("-host-model", ("cannot be taken away",)),
        ("-relaxed=on", ("contradict",)),
        ("relaxed=maybe", ("on or off",)),
        ("no-nonarch-coresharing=maybe", ("on, off or auto",)),
        ("spinlocks", ("wants a number", "spinlocks=0x1fff")),
        ("spinlocks=many", ("not a number",)),
        ("spinlocks=1", ("from 0xfff to 0xffffffff",)),
        ("spinlocks=0x100000000", ("from 0xfff to 0xffffffff",)),
        ("spinlocks=0x1fff,spinlocks=0x2fff", ("both 0x1fff and 0x2fff",)),
        ("spinlocks=0x1fff,-spinlocks", ("both 0x1fff and off",)),
        ("vendor-id=", ("wants a value",)),
        ("vendor-id=ThirteenChars", ("1 to 12 ASCII characters",)),
        ("vendor-id=a,vendor-id=b", ("contradicts vendor-id=a",)),
        ("version-id-major=0x10000", ("from 0x0 to 0xffff",)),
        ("version-id-sbranch=256", ("from 0x0 to 0xff",)),
    ],
)
def test_what_cannot_be_is_one_line_with_flag_reason_and_remedy(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_features(text)
    message = str(caught.value)
    assert message.startswith("--hv")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_naming_a_flag_twice_alike_is_no_contradiction() -> None:
    assert names("relaxed,hv-relaxed=on,apicv,avic") == {"relaxed", "avic"}


def test_avic_and_vapic_go_together_as_in_qemu() -> None:
    assert names("vapic,avic") == {"vapic", "avic"}


def test_none_is_empty_on_every_host() -> None:
    for host in (EVERYTHING, NO_HYPERV):
        features = resolve(parse_features("none"), host)
        assert not features
        assert str(features) == "none"


def test_host_model_is_what_kvm_6_1_has() -> None:
    assert names("host-model", HOST_6_1) == {
        "relaxed",
        "vapic",
        "spinlocks",
        "vpindex",
        "runtime",
        "reset",
        "crash",
        "time",
        "synic",
        "stimer",
        "stimer-direct",
        "tlbflush",
        "ipi",
        "frequencies",
        "reenlightenment",
        "emsr-bitmap",
        "xmm-input",
        "avic",
        "lazy-eoi",
        "no-nonarch-coresharing",
    }


def test_lazy_eoi_is_left_to_who_names_it_where_the_hardware_has_an_apic() -> None:
    host = EVERYTHING._replace(on_demand=frozenset({"lazy-eoi"}))
    assert "lazy-eoi" in names("host-model") - names("host-model", host)
    assert "lazy-eoi" in names("host-model,lazy-eoi", host)
    assert "lazy-eoi" not in names("host-model,-lazy-eoi")


NESTED = {"evmcs", "emsr-bitmap", "tlbflush-direct"}


@pytest.mark.parametrize("base", ["host-model", "passthrough"])
def test_what_the_guests_cpu_has_no_use_for_is_left_out(base: str) -> None:
    """No guest of hvkvm has VMX or SVM; and there is nothing to trust in a TSC that CPUID calls variant."""
    plain = EVERYTHING._replace(cpu=frozenset({"lm"}))
    assert names(base, EVERYTHING) - names(base, plain) == NESTED | {"tsc-invariant"}
    assert (
        names(base, EVERYTHING._replace(cpu=frozenset({"nonstop_tsc"}))) == names(base, EVERYTHING) - NESTED
    )
    assert names(base, EVERYTHING._replace(cpu=frozenset({"nonstop_tsc", "svm"}))) == names(
        base, EVERYTHING
    ) - {"evmcs"}


@pytest.mark.parametrize("name", sorted(NESTED))
def test_a_nested_feature_by_name_is_refused_where_nothing_nests(name: str) -> None:
    with pytest.raises(
        CapabilityMissing, match=f"hv-{name} needs .*vmx.* in the guest's CPU.*leave hv-{name} out"
    ):
        names(f"vapic,{name}", EVERYTHING._replace(cpu=frozenset()))


def test_every_feature_in_the_nested_leaf_needs_a_cpu_that_nests() -> None:
    """Of what leaf 0x4000000A and the recommendations say, all about nesting; a new row may not forget it."""
    for row in ENLIGHTENMENTS:
        nested = any(
            bits.leaf == tlfs.HYPERV_CPUID_NESTED_FEATURES
            or (
                bits.leaf == tlfs.HYPERV_CPUID_ENLIGHTMENT_INFO
                and bits.mask & tlfs.HV_X64_ENLIGHTENED_VMCS_RECOMMENDED
            )
            for bits in row.bits
        )
        assert nested == bool(row.needs_cpu & {"vmx", "svm"}), row.name


def test_host_model_on_a_host_without_hyperv_is_empty() -> None:
    assert not resolve(parse_features("host-model"), NO_HYPERV)


def test_host_model_drops_what_depends_on_what_is_taken_away() -> None:
    everything, rest = names("host-model"), names("host-model,-vpindex")
    assert everything - rest == {
        "vpindex",
        "synic",
        "stimer",
        "stimer-direct",
        "tlbflush",
        "tlbflush-ext",
        "ipi",
    }


def test_host_model_leaves_out_what_is_policy_and_it_can_be_added() -> None:
    assert not names("host-model") & {"syndbg", "enforce-cpuid"}
    assert names("host-model,enforce-cpuid") - names("host-model") == {"enforce-cpuid"}


def test_passthrough_takes_over_kvms_vendor_version_and_limits() -> None:
    features = resolve(parse_features("passthrough"), HOST_6_1)
    assert features.vendor_id == b"Linux KVM Hv"
    assert (features.version, features.max_vps, features.max_lps) == (Version(), 1024, 64)
    assert features.spinlocks == 0xFFF
    assert "syndbg" not in features
    named = resolve(parse_features("passthrough,vendor-id=Microsoft Hv"), HOST_6_1)
    assert named.vendor_id == b"Microsoft Hv"


def test_missing_kernel_support_names_feature_capability_and_remedy() -> None:
    for text in ("passthrough", "relaxed"):
        with pytest.raises(
            CapabilityMissing, match=r"KVM_CAP_HYPERV, which.*lacks; use a kernel with CONFIG"
        ):
            resolve(parse_features(text), NO_HYPERV)
    host = HostFeatures({**CAPS, "KVM_CAP_HYPERV_SEND_IPI": 0}, EVERYTHING.leaves)
    with pytest.raises(CapabilityMissing, match=r"hv-ipi needs KVM_CAP_HYPERV_SEND_IPI.*leave hv-ipi out"):
        resolve(parse_features("vpindex,ipi"), host)
    with pytest.raises(CapabilityMissing, match=r"hv-tlbflush-ext needs CPUID 0x40000003\.EDX 0x4000"):
        resolve(parse_features("vpindex,tlbflush,tlbflush-ext"), HOST_6_1)


def test_missing_requirement_of_a_named_feature_is_told_on_host_model() -> None:
    host = HostFeatures({**CAPS, "KVM_CAP_HYPERV_TIME": 0}, EVERYTHING.leaves)
    assert "stimer" not in names("host-model", host)
    with pytest.raises(CapabilityMissing, match=r"hv-stimer requires hv-time.*KVM_CAP_HYPERV_TIME"):
        names("host-model,stimer", host)


def test_without_reported_leaves_capabilities_decide() -> None:
    old = HostFeatures({**CAPS, "KVM_CAP_HYPERV_TLBFLUSH": 0}, None)
    assert {"synic", "stimer", "time"} <= names("host-model", old)
    assert not names("host-model", old) & {"tlbflush", "no-nonarch-coresharing", "spinlocks"}


@pytest.mark.parametrize("reported", [True, False])
def test_no_nonarch_coresharing_auto_is_as_the_host_says(reported: bool) -> None:
    leaves = {0x40000004: (1 << 18 if reported else 0, 0, 0, 0)}
    host = HostFeatures(CAPS, leaves)
    assert names("no-nonarch-coresharing=auto", host) == ({"no-nonarch-coresharing"} if reported else set())
    assert names("no-nonarch-coresharing", host) == {"no-nonarch-coresharing"}


def test_the_set_prints_as_qemus_flags() -> None:
    text = "vpindex,time,synic,stimer,spinlocks=8191,vendor-id=Acme,version-id-build=1"
    features = resolve(parse_features(text), EVERYTHING)
    assert str(features) == (
        "hv-spinlocks=0x1fff,hv-vpindex,hv-time,hv-synic,hv-stimer,hv-vendor-id=Acme,hv-version-id-build=0x1"
    )


@pytest.mark.parametrize("text", ["spinlocks=never", "-relaxed", "spinlocks=off", "spinlocks=0xffffffff"])
def test_a_list_that_switches_nothing_on_shows_no_hyperv(text: str) -> None:
    assert resolve(parse_features(text), EVERYTHING) == FeatureSet()


FLAG = st.sampled_from([row.name for row in ENLIGHTENMENTS if not row.value] + list(ALIASES))
ITEM = st.builds(lambda sign, name: sign + name, st.sampled_from(["", "-", "hv-", "+"]), FLAG)
BASE = st.sampled_from([[], ["host-model"], ["passthrough"]])


@st.composite
def hosts(draw: st.DrawFn) -> HostFeatures:
    caps = {cap: draw(st.integers(0, 1)) for cap in CAPS}
    word = st.integers(0xFFF, NEVER)  # EBX of leaf 4, the number of tries, is never less on KVM
    leaves = {leaf: draw(st.tuples(*[word] * 4)) for leaf in EVERYTHING.leaves or ()}
    return HostFeatures(caps, draw(st.sampled_from([leaves, EVERYTHING.leaves, None])))


@given(base=BASE, items=st.lists(ITEM, max_size=6), host=hosts())
def test_every_resolved_set_is_closed_and_backed(
    base: list[str], items: list[str], host: HostFeatures
) -> None:
    """Whatever is asked of whatever host: an error, or a set that is closed, backed and prints to itself."""
    text = ",".join(base + items) or "none"
    try:
        features = resolve(parse_features(text), host)
    except (ConfigError, CapabilityMissing) as error:
        assert "\n" not in str(error)
        return
    rows = {row.name: row for row in ENLIGHTENMENTS}
    for name in features.names:
        assert all(needed in features for needed in rows[name].requires)
        assert host.missing(rows[name]) is None
    for item in items:
        name = item.lstrip("+-").removeprefix("hv-")
        assert (ALIASES.get(name, name) in features) == (not item.startswith("-"))
    if not base or base == ["host-model"]:
        assert resolve(parse_features(str(features)), host) == features


def test_every_row_is_sound() -> None:
    seen = set()
    for row in ENLIGHTENMENTS:
        assert row.summary
        assert set(row.requires) <= seen, "a row comes after what it requires"
        seen.add(row.name)
        for cap in row.kvm_caps:
            assert isinstance(getattr(abi_kvm, cap), int)
        for bits in row.bits:
            assert bits.register in REGISTERS
            assert 0 < bits.mask < 1 << 32
    assert len(seen) == len(ENLIGHTENMENTS)
