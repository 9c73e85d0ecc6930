"""Every struct, request and constant of hvkvm.abi.kvm* against the golden table the C compiler made."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest

from hvkvm.abi import kvm, kvm_cpu_structs, kvm_requests, kvm_run_struct, kvm_structs

TABLE = json.loads((Path(__file__).parents[2] / "kvm_headers" / "layout.json").read_text())
ABSENT = set(TABLE["absent"])

# Enumerated here once more, not through the probe: a mistake there must not hide one here.
STRUCTS = {
    name: value
    for module in (kvm_cpu_structs, kvm_run_struct, kvm_structs)
    for name, value in vars(module).items()
    if isinstance(value, type)
    and issubclass(value, ctypes.Structure | ctypes.Union)
    and name.startswith("kvm")
}
CONSTANTS = {n: v for n, v in vars(kvm).items() if n.startswith("KVM_")}


def members(outer: type, kind: type) -> dict[str, list[int]]:
    """Field -> [offset in `outer`, size], anonymous members flattened as C sees them."""
    found = {}
    for name, field_type, *_ in kind._fields_:
        if name in getattr(kind, "_anonymous_", ()):
            found |= members(outer, field_type)
        elif not name.startswith("_"):
            found[name] = [getattr(outer, name).offset, ctypes.sizeof(field_type)]
    return found


def disagreements(name: str, kind: type, table: dict) -> list[str]:
    path = name.replace("__", ".")
    if path in table["absent"]:
        return []
    row = table["structs"].get(path)
    if row is None:
        return [f"{path} is not in kvm_headers/layout.json: run kvm_headers/probe.py --write"]
    wrong = []
    if ctypes.sizeof(kind) != row["size"]:
        wrong.append(f"sizeof {path} is {ctypes.sizeof(kind)}, C says {row['size']}")
    for field, place in members(kind, kind).items():
        if f"{path}.{field}" not in table["absent"] and row["fields"].get(field) != place:
            wrong.append(f"{path}.{field} is at {place}, C says {row['fields'].get(field)}")
    return wrong


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_matches_the_compiler(name):
    assert disagreements(name, STRUCTS[name], TABLE) == []


@pytest.mark.parametrize("name", kvm_requests.REQUESTS)
def test_request_number_matches_the_compiler(name):
    request = kvm_requests.REQUESTS[name]
    assert getattr(kvm_requests, name) is request
    assert hex(request.number) == TABLE["requests"][name]


def test_every_request_is_in_the_dict():
    named = {n for n, v in vars(kvm_requests).items() if isinstance(v, kvm_requests.Request)}
    assert named == set(kvm_requests.REQUESTS)


@pytest.mark.parametrize("name", sorted(CONSTANTS.keys() - ABSENT))
def test_constant_matches_the_compiler(name):
    assert CONSTANTS[name] == TABLE["constants"].get(name)


def test_absent_names_are_few_and_known():
    # Each of these goes unchecked until headers that have it make the table.
    assert {"KVM_CAP_MEMORY_FAULT_INFO", "KVM_EXIT_MEMORY_FAULT", "kvm_run.memory_fault"} >= ABSENT


def test_the_enumeration_sees_everything():
    assert len(STRUCTS) > 60
    assert {"kvm_run", "kvm_run__io", "kvm_hyperv_exit__u__hcall", "kvm_hyperv_eventfd"} <= STRUCTS.keys()
    assert len(CONSTANTS) > 150


def test_a_struct_absent_from_the_table_is_reported():
    class kvm_invented(ctypes.Structure):
        _fields_ = [("a", ctypes.c_uint32)]

    assert "not in kvm_headers/layout.json" in disagreements("kvm_invented", kvm_invented, TABLE)[0]


def test_a_wrong_field_is_reported():
    class kvm_regs(ctypes.Structure):
        _fields_ = [("rbx", ctypes.c_uint64), ("rax", ctypes.c_uint32)]

    assert len(disagreements("kvm_regs", kvm_regs, TABLE)) == 3


@pytest.mark.parametrize(
    ("factory", "base", "array", "each"),
    [
        (kvm_structs.kvm_msrs_of, kvm_structs.kvm_msrs, "entries", 16),
        (kvm_structs.kvm_msr_list_of, kvm_structs.kvm_msr_list, "indices", 4),
        (kvm_structs.kvm_cpuid2_of, kvm_structs.kvm_cpuid2, "entries", 40),
        (kvm_structs.kvm_irq_routing_of, kvm_structs.kvm_irq_routing, "entries", 48),
        (kvm_structs.kvm_coalesced_mmio_ring_of, kvm_structs.kvm_coalesced_mmio_ring, "coalesced_mmio", 24),
    ],
)
def test_sized_structs_keep_the_header_and_are_built_once(factory, base, array, each):
    sized = factory(3)
    assert factory(3) is sized
    assert ctypes.sizeof(sized) == ctypes.sizeof(base) + 3 * each
    assert getattr(sized, array).offset == getattr(base, array).offset
    assert ctypes.sizeof(factory(0)) == ctypes.sizeof(base)
