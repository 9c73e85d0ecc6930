"""CPU features that depend on others, over all rows of the table; and what `--cpu` hides."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi.cpu_features import BITS, CpuidBit
from hvkvm.abi.cpu_needs import LEAF_NEEDS, NEEDS
from hvkvm.abi.kvm_structs import kvm_cpuid_entry2
from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.machine.cpu import entry, guest_cpuid, vcpu_cpuid
from hvkvm.machine.cpu_features import parse_cpu, shown, without

REGISTERS = ("eax", "ebx", "ecx", "edx")
PLACES = sorted({(bit.function, bit.subleaf) for bits in BITS.values() for bit in bits})
LEAVES = sorted({function for function, _ in PLACES} | {function for function, _ in LEAF_NEEDS})


def everything() -> dict[tuple[int, int], kvm_cpuid_entry2]:
    """A CPU that shows every feature there is a name for, with a sub-leaf for each state component."""
    table = {(function, 0): entry(function, 0) for function in LEAVES}
    table |= {place: entry(*place, indexed=True) for place in PLACES}
    for bits in BITS.values():
        for bit in bits:
            one = table[bit.function, bit.subleaf]
            setattr(one, bit.register, getattr(one, bit.register) | 1 << bit.number)
    for component in range(2, 20):
        table[0xD, component] = entry(0xD, component, eax=64, ebx=576 + 64 * component, indexed=True)
    table[0xD, 0].ebx = table[0xD, 0].ecx = 576 + 64 * 20
    return table


def closed(*hidden: str) -> set[str]:
    return shown(without(list(everything().values()), hidden))


def values(entries: list[kvm_cpuid_entry2]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(one.function, one.index): tuple(getattr(one, name) for name in REGISTERS) for one in entries}


def test_a_cpu_that_has_everything_keeps_everything() -> None:
    full = list(everything().values())
    assert shown(full) == set(BITS)
    assert shown(without(full)) == set(BITS)


@pytest.mark.parametrize(("feature", "needs"), NEEDS)
def test_a_feature_goes_with_what_it_needs(feature: str, needs: str) -> None:
    assert feature not in closed(*needs.split("|"))


@pytest.mark.parametrize(("function", "needs"), LEAF_NEEDS)
def test_a_leaf_goes_with_the_feature_it_belongs_to(function: int, needs: str) -> None:
    left = without(list(everything().values()), needs.split("|"))
    assert function not in {one.function for one in left}


def test_what_a_feature_needs_is_named_and_no_feature_needs_itself() -> None:
    needed = {name for _, needs in (*NEEDS, *LEAF_NEEDS) for name in needs.split("|")}
    assert needed | {feature for feature, _ in NEEDS} <= set(BITS)
    assert all(feature not in needs.split("|") for feature, needs in NEEDS)
    assert len(set(NEEDS)) == len(NEEDS)


def test_without_xsave_nothing_is_left_that_its_state_is_for() -> None:
    left = closed("xsave")
    gone = "avx avx2 fma f16c vaes vpclmulqdq avx512f avx512_fp16 amx_tile amx_int8 xsaves xfd shstk pku apx"
    assert left.isdisjoint(gone.split())
    assert not {name for name in left if name.startswith("xstate_")}
    assert {"sse4_2", "aes", "pclmulqdq", "bmi2", "ibt", "cx16"} <= left


def test_amx_goes_with_its_leaves_its_state_and_its_part_of_the_areas_size() -> None:
    left = {(one.function, one.index): one for one in without(list(everything().values()), ["xfd"])}
    assert not {0x1D, 0x1E} & {function for function, _ in left}
    assert left[0xD, 0].eax >> 17 & 3 == 0
    assert (0xD, 17) not in left
    assert (0xD, 18) not in left
    assert (left[0xD, 0].ecx, left[0xD, 0].ebx) == (576 + 64 * 20, 576 + 64 * 20)  # APX lies behind it
    smaller = {(one.function, one.index): one for one in without(list(left.values()), ["apx"])}
    assert (0xD, 19) not in smaller
    assert smaller[0xD, 0].ecx == 576 + 64 * 10  # PKRU is the last one then


def test_control_flow_state_stays_for_either_of_its_users() -> None:
    assert "xstate_cet_s" in closed("shstk")
    assert "xstate_cet_s" in closed("ibt")
    assert "xstate_cet_s" not in closed("ibt", "shstk")


def test_what_an_emulated_host_without_xsave_reports() -> None:
    """QEMU's EPYC-Rome under software emulation with XSAVE hidden: AVX, FMA and F16C stay, on what state?"""
    host = [
        entry(0, eax=0xD),
        entry(1, eax=0x830F10, ebx=0x800, ecx=0x72F81203, edx=0x78BFBFD),
        entry(7, 0, ebx=0x19801AB, ecx=4, edx=0x20000000, indexed=True),
        entry(0xD, 0, ebx=0x240, ecx=0x240, indexed=True),
        entry(0x80000001, ecx=0x75, edx=0x2DD3FBFD),
    ]
    before, after = shown(host), shown(guest_cpuid(host, tsc_deadline=True))
    assert {"avx", "avx2", "fma", "f16c"} <= before
    assert before - after == {"avx", "avx2", "fma", "f16c", "svm"}
    assert after - before == {"hypervisor", "tsc_deadline", "tsc_deadline_timer"}


@st.composite
def tables(draw: st.DrawFn) -> list[kvm_cpuid_entry2]:
    """Nearly everything, or hardly anything, with some of the leaves missing."""
    full = everything()
    rich = draw(st.booleans())
    names = draw(st.sets(st.sampled_from(sorted(BITS)), max_size=40))
    missing = draw(st.sets(st.sampled_from(sorted(full)), max_size=3))
    chosen = {bit for name in names for bit in BITS[name]}
    for bit in {bit for bits in BITS.values() for bit in bits}:
        if (bit in chosen) == rich:
            one = full[bit.function, bit.subleaf]
            setattr(one, bit.register, getattr(one, bit.register) & ~(1 << bit.number))
    return [one for place, one in full.items() if place not in missing]


@given(tables(), st.sets(st.sampled_from(sorted(BITS)), max_size=4))
def test_closing_only_removes_and_is_done_in_one_go(table: list[kvm_cpuid_entry2], hidden: set[str]) -> None:
    before, copy = values(table), [bytes(one) for one in table]
    left = without(table, hidden)
    after = values(left)
    assert [bytes(one) for one in table] == copy, "the caller's entries were changed"
    assert set(after) <= set(before)
    for place, registers in after.items():
        for name, old, new in zip(REGISTERS, before[place], registers, strict=True):
            size = place == (0xD, 0) and name in ("ebx", "ecx")
            assert new <= old if size else new & ~old == 0
    features = shown(left)
    assert features.isdisjoint(hidden)
    for feature, needs in NEEDS:
        assert feature not in features or not features.isdisjoint(needs.split("|")), (feature, needs)
    functions = {function for function, _ in after}
    for function, needs in LEAF_NEEDS:
        assert function not in functions or not features.isdisjoint(needs.split("|")), (function, needs)
    assert values(without(left, hidden)) == after


@pytest.mark.parametrize("cpus", [1, 2, 254])
def test_vcpus_differ_in_their_ids_only(cpus: int) -> None:
    guest = guest_cpuid([*everything().values(), entry(0xB)], parse_cpu("host,-topoext"), tsc_deadline=True)
    tables = [values(vcpu_cpuid(guest, index, cpus, None)) for index in (0, cpus - 1)]
    assert tables[0].keys() == tables[1].keys()
    differing = {place[0] for place in tables[0] if tables[0][place] != tables[1][place]}
    assert differing == (set() if cpus == 1 else {1, 0xB})
    assert tables[0][0xB, 1][1] == cpus


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("host", ""),
        ("host,-cx16", "cx16"),
        ("host, -CX16 ,aes=off", "cx16 aes"),
        ("host,-sse4.1,-sse4-2,-avx512vnni,-invtsc", "sse4_1 sse4_2 avx512vnni invtsc"),
        ("host,-vmx,-svm,-monitor", "vmx svm monitor"),
    ],
)
def test_names_to_hide(text: str, hidden: str) -> None:
    assert parse_cpu(text).hide == set(hidden.split())
    assert parse_cpu(text).show == ()


def test_names_to_ask_for() -> None:
    assert parse_cpu("host,+aes,avx2,sse4.2=on") == (frozenset(), ("aes", "avx2", "sse4_2"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("begins with nothing", "write host")),
        ("qemu64,-cx16", ("qemu64", "one CPU model", "host,-cx16")),
        ("-cx16", ("begins with -cx16", "host,-cx16")),
        ("host,-cx61", ("cx61", "did you mean cx16")),
        ("host,-avx512", ("avx512", "did you mean avx512")),
        ("host,-qqqqqqqq", ("qqqqqqqq", "/proc/cpuinfo")),
        ("host,-xstate_ymm", ("xstate_ymm", "no CPU feature")),
        ("host,,-cx16", ("empty name",)),
        ("host,-", ("empty name",)),
        ("host,-cx16=off", ("-cx16=off", "write one")),
        ("host,cx16=maybe", ("cx16=maybe", "write one")),
        ("host,-cx16,+cx16", ("cx16", "choose one")),
        ("host,-apic", ("apic cannot be hidden", "KVM's")),
        ("host,ht=off", ("ht cannot be hidden", "--cpus")),
        ("host,-hypervisor", ("hypervisor cannot be hidden",)),
        ("host,-rep_good", ("rep_good", "no CPUID bit")),
        ("host,+vmx", ("vmx cannot be had", "nest")),
    ],
)
def test_bad_requests_name_flag_reason_and_remedy(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^--cpu ") as caught:
        parse_cpu(text)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40), st.lists(st.sampled_from([*sorted(BITS), "x", "+", "-", "=", "=off"])))
def test_any_request_is_read_or_refused(text: str, parts: list[str]) -> None:
    for request in (text, f"host,{text}", f"host,{','.join(parts)}", "host,-" + "".join(parts)):
        try:
            hide, show = parse_cpu(request)
        except ConfigError:
            continue
        assert hide | set(show) <= set(BITS)


@pytest.mark.parametrize(
    ("text", "lacking", "words"),
    [
        ("host,+avx2", "avx2", ("+avx2", "does not offer")),
        ("host,+avx2", "xsave", ("+avx2", "it needs avx,")),
        ("host,+avx512_bf16,-avx512vl", "", ("+avx512_bf16", "it needs avx512vl")),
        ("host,+ibpb,+ibrs,-spec_ctrl,-amd_ibrs", "", ("+ibrs", "shares its CPUID bit")),
    ],
)
def test_what_cannot_be_had_is_named(text: str, lacking: str, words: tuple[str, ...]) -> None:
    table = everything()
    for bit in BITS.get(lacking, ()):
        one = table[bit.function, bit.subleaf]
        setattr(one, bit.register, getattr(one, bit.register) & ~(1 << bit.number))
    with pytest.raises(CapabilityMissing, match=r"^--cpu ") as caught:
        guest_cpuid(list(table.values()), parse_cpu(text), tsc_deadline=True)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_is_asked_for_and_there_changes_nothing() -> None:
    host = list(everything().values())
    asked = guest_cpuid(host, parse_cpu("host,+avx2,amx_tile=on"), tsc_deadline=True)
    assert values(asked) == values(guest_cpuid(host, tsc_deadline=True))


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        # Each register's last name, by the manuals' numbers: a slip in a row would move it.
        ("pbe", (0x1, 0, "edx", 31)),
        ("hypervisor", (0x1, 0, "ecx", 31)),
        ("avx512vl", (0x7, 0, "ebx", 31)),
        ("pks", (0x7, 0, "ecx", 31)),
        ("spec_ctrl_ssbd", (0x7, 0, "edx", 31)),
        ("movrs", (0x7, 1, "eax", 31)),
        ("lam", (0x7, 1, "eax", 26)),
        ("apx", (0x7, 1, "edx", 21)),
        ("mcdt_no", (0x7, 2, "edx", 5)),
        ("hfi", (0x6, 0, "eax", 19)),
        ("epb", (0x6, 0, "ecx", 3)),
        ("xfd", (0xD, 1, "eax", 4)),
        ("xstate_pkru", (0xD, 0, "eax", 9)),
        ("xstate_apx", (0xD, 0, "eax", 19)),
        ("xstate_hwp", (0xD, 1, "ecx", 16)),
        ("cqm_mbm_local", (0xF, 1, "edx", 2)),
        ("sgx_edeccssa", (0x12, 0, "eax", 11)),
        ("avx10_512", (0x24, 0, "ebx", 18)),
        ("3dnow", (0x80000001, 0, "edx", 31)),
        ("mwaitx", (0x80000001, 0, "ecx", 29)),
        ("rapl", (0x80000007, 0, "edx", 14)),
        ("brs", (0x80000008, 0, "ebx", 31)),
        ("vnmi", (0x8000000A, 0, "edx", 25)),
        ("debug_swap", (0x8000001F, 0, "eax", 14)),
        ("sdciae", (0x80000020, 0, "ebx", 6)),
        ("srso_bp_spec_reduce", (0x80000021, 0, "eax", 31)),
    ],
)
def test_the_rows_count_right(name: str, bit: tuple[int, int, str, int]) -> None:
    assert BITS[name] == (CpuidBit(*bit),)


_TRUE_TO_CPUID = (
    "fpu vme de pse tsc msr pae mce cx8 sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall"
    " nx mmxext fxsr_opt pdpe1gb rdtscp lm pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes"
    " xsave avx f16c rdrand hypervisor lahf_lm abm sse4a misalignsse 3dnowprefetch xop fma4 tbm topoext"
    " fsgsbase bmi1 avx2 smep bmi2 erms invpcid avx512f avx512dq rdseed adx smap avx512ifma clflushopt"
    " clwb avx512cd sha_ni avx512bw avx512vl xsaveopt xsavec xgetbv1 xsaves clzero xsaveerptr avx512vbmi"
    " umip pku waitpkg avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg avx512_vpopcntdq rdpid"
    " fsrm serialize amx_bf16 amx_tile amx_int8 avx512_fp16 avx_vnni avx512_bf16 cldemote movdiri"
    " movdir64b wbnoinvd"
)
TRUE_TO_CPUID = _TRUE_TO_CPUID.split()
"""Flags of /proc/cpuinfo that Linux takes from CPUID and never sets for reasons of its own."""


def cpuid(function: int, index: int) -> tuple[int, int, int, int]:
    """What this machine's CPU itself answers."""
    # mov eax,edi; mov ecx,esi; mov r8,rdx; push rbx; cpuid; store the four at r8; pop rbx; ret
    code = bytes.fromhex("89f8 89f1 4989d0 53 0fa2 418900 41895804 41894808 4189500c 5b c3")
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        held = ctypes.c_char.from_buffer(page)
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
        call = prototype(ctypes.addressof(held))
        out = (ctypes.c_uint32 * 4)()
        call(function, index, ctypes.addressof(out))
        del call, held
    return out[0], out[1], out[2], out[3]


def test_the_names_are_those_of_this_machines_cpuinfo() -> None:
    """An independent check of the table: Linux's names against this CPU's own CPUID."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(set(line.partition(":")[2].split()) for line in lines if line.startswith("flags"))
    highest = {0: cpuid(0, 0)[0], 0x80000000: cpuid(0x80000000, 0)[0]}
    native = []
    for function, index in PLACES:
        if function <= highest[function & 0x80000000]:
            native.append(entry(function, index, **dict(zip(REGISTERS, cpuid(function, index), strict=True))))
    assert {name for name in TRUE_TO_CPUID if name in flags} <= shown(native)
