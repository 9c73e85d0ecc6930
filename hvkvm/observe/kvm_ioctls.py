"""What a KVM ioctl of another process says: its argument, read from that process, as named fields.

Called by the tracer between a system call's two stops; any thread, no state.
The memory comes from a process that may be broken or hostile: every decoder
gets bytes of exactly its structure's size or is not called, lists are cut at
`SHOWN` items, and an address that cannot be read is a field that says so.
Values are int, `Hex` (an int that prints in hex), str, or lists and dicts of these.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, c_uint64, sizeof
from typing import Any, TypeVar

from hvkvm.abi import kvm, kvm_requests
from hvkvm.abi import kvm_structs as s
from hvkvm.kvm import exits
from hvkvm.observe.kvm_names import REQUEST_NAMES, cap_name, msr_name
from hvkvm.tuples import NamedTuple

SHOWN = 64  # items of a list that are shown; the rest is a count
READ_LIMIT = 4096  # items of a list that are looked at: KVM takes no longer routing table

Fields = dict[str, Any]
Read = Callable[[int, int], bytes]  # (address, size) -> that many bytes, or fewer where it cannot

_S = TypeVar("_S", bound=Structure)


class Hex(int):
    """A number that people read in hex."""

    def __str__(self) -> str:
        return f"{int(self):#x}"


class Decoder(NamedTuple):
    """`after`: the argument is an answer, to be read when the call has returned."""

    decode: Callable[[int, Read], Fields]
    after: bool = False


class Unreadable(Exception):
    """The tracee's memory is not there; never leaves this module."""


def decode(number: int, arg: int, read: Read) -> Fields:
    """The fields of request `number` with argument `arg`. Never raises for what `read` gives."""
    decoder = DECODERS.get(number)
    if decoder is None:
        return {"arg": Hex(arg)} if arg else {}
    try:
        return decoder.decode(arg, read)
    except Unreadable:
        return {"arg": Hex(arg), "unreadable": 1}


def wants_answer(number: int) -> bool:
    """Whether the argument of `number` is to be decoded after the call."""
    decoder = DECODERS.get(number)
    return decoder is not None and decoder.after


_COUNTS = frozenset({"is_write", "size", "count", "len", "type", "suberror", "vector", "exception", "cpu"})


def decode_run(run: bytes) -> Fields:
    """The exit in the first bytes of a vCPU's shared pages; {} if there are too few."""
    if len(run) < sizeof(s.kvm_run):
        return {}
    exit_ = exits.decode(s.kvm_run.from_buffer_copy(run), memoryview(run))
    fields: Fields = {"exit": exit_.name}
    for cls in reversed(type(exit_).__mro__):
        for name in getattr(cls, "__dataclass_fields__", ()):
            if name != "reason":
                value = getattr(exit_, name)
                fields[name] = int(value) if name in _COUNTS else _plain(value)
    return fields


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return value[:SHOWN].hex()
    if isinstance(value, tuple):
        return [Hex(item) for item in value]
    return Hex(value) if isinstance(value, int) else str(value)


def text(fields: Fields) -> str:
    """Fields as in a C call: `fd=14, gsi=24, flags=RESAMPLE`."""
    return ", ".join(f"{name}={_text(value)}" for name, value in fields.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + text(value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)


# Reading.


def _struct(kind: type[_S], arg: int, read: Read) -> _S:
    data = read(arg, sizeof(kind))
    if len(data) < sizeof(kind):
        raise Unreadable
    return kind.from_buffer_copy(data)


def _items(kind: type[_S], count: int, arg: int, read: Read) -> list[_S]:
    """The array of `kind` at `arg`, cut where memory ends; the kernel checks counts, we only bound them."""
    size = sizeof(kind)
    data = read(arg, min(count, READ_LIMIT) * size)
    return [kind.from_buffer_copy(data, at) for at in range(0, len(data) - size + 1, size)]


def _cut(fields: Fields, name: str, items: list[Any]) -> Fields:
    fields[name] = items[:SHOWN]
    if len(items) > SHOWN:
        fields["more"] = len(items) - SHOWN
    return fields


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _flags(value: int, prefix: str) -> str:
    """Flags by name with `prefix` off, what has no name in hex, "0" for none."""
    names = []
    for name, bit in vars(kvm).items():
        if name.startswith(prefix) and bit and value & bit == bit:
            names.append(name.removeprefix(prefix))
            value &= ~bit
    return "|".join(names + ([f"{value:#x}"] if value else [])) or "0"


def _enum(value: int, prefix: str) -> str:
    for name, number in vars(kvm).items():
        if number == value and name.startswith(prefix):
            return name.removeprefix(prefix)
    return str(value)


# One function for each structure worth more than its numbers.


def _irqfd(arg: int, read: Read) -> Fields:
    irqfd = _struct(s.kvm_irqfd, arg, read)
    fields: Fields = {
        "fd": _signed(irqfd.fd),
        "gsi": irqfd.gsi,
        "flags": _flags(irqfd.flags, "KVM_IRQFD_FLAG_"),
    }
    if irqfd.flags & kvm.KVM_IRQFD_FLAG_RESAMPLE:
        fields["resamplefd"] = _signed(irqfd.resamplefd)
    return fields


def _route(entry: s.kvm_irq_routing_entry) -> Fields:
    fields: Fields = {"gsi": entry.gsi, "type": _enum(entry.type, "KVM_IRQ_ROUTING_")}
    if entry.type == kvm.KVM_IRQ_ROUTING_HV_SINT:
        fields |= {"vcpu": entry.u.hv_sint.vcpu, "sint": entry.u.hv_sint.sint}
    elif entry.type == kvm.KVM_IRQ_ROUTING_MSI:
        msi = entry.u.msi
        fields |= {"address": Hex(msi.address_hi << 32 | msi.address_lo), "data": Hex(msi.data)}
    return fields


def _routing(arg: int, read: Read) -> Fields:
    head = _struct(s.kvm_irq_routing, arg, read)
    entries = _items(s.kvm_irq_routing_entry, head.nr, arg + sizeof(head), read)
    # The pins of the interrupt controllers are the same in every table: a count says enough.
    others = [_route(entry) for entry in entries if entry.type != kvm.KVM_IRQ_ROUTING_IRQCHIP]
    fields: Fields = {"nr": head.nr, "irqchip": len(entries) - len(others)}
    return _cut(fields, "entries", others)


def _hyperv_eventfd(arg: int, read: Read) -> Fields:
    bound = _struct(s.kvm_hyperv_eventfd, arg, read)
    flags = "DEASSIGN" if bound.flags == kvm.KVM_HYPERV_EVENTFD_DEASSIGN else str(Hex(bound.flags))
    return {"conn_id": Hex(bound.conn_id), "fd": bound.fd, "flags": flags if bound.flags else "0"}


def _enable_cap(arg: int, read: Read) -> Fields:
    enabled = _struct(s.kvm_enable_cap, arg, read)
    fields: Fields = {"cap": cap_name(enabled.cap)}
    if enabled.flags:
        fields["flags"] = Hex(enabled.flags)
    args = list(enabled.args)
    while args and not args[-1]:
        args.pop()
    if args:
        fields["args"] = [Hex(value) for value in args]
    return fields


def _memory_region(arg: int, read: Read) -> Fields:
    region = _struct(s.kvm_userspace_memory_region, arg, read)
    return {
        "slot": Hex(region.slot) if region.slot >> 16 else region.slot,
        "flags": _flags(region.flags, "KVM_MEM_"),
        "gpa": Hex(region.guest_phys_addr),
        "size": Hex(region.memory_size),
        "hva": Hex(region.userspace_addr),
    }


def _ioeventfd(arg: int, read: Read) -> Fields:
    bell = _struct(s.kvm_ioeventfd, arg, read)
    fields: Fields = {
        "addr": Hex(bell.addr),
        "len": bell.len,
        "fd": bell.fd,
        "flags": _flags(bell.flags, "KVM_IOEVENTFD_FLAG_"),
    }
    if bell.flags & kvm.KVM_IOEVENTFD_FLAG_DATAMATCH:
        fields["datamatch"] = Hex(bell.datamatch)
    return fields


def _msrs(arg: int, read: Read) -> Fields:
    head = _struct(s.kvm_msrs, arg, read)
    entries = _items(s.kvm_msr_entry, head.nmsrs, arg + sizeof(head), read)
    return _cut(
        {"nmsrs": head.nmsrs}, "msrs", [{msr_name(entry.index): Hex(entry.data)} for entry in entries]
    )


def _cpuid(arg: int, read: Read) -> Fields:
    head = _struct(s.kvm_cpuid2, arg, read)
    leaves = _items(s.kvm_cpuid_entry2, head.nent, arg + sizeof(head), read)
    # Only the hypervisor's leaves: the CPU's own are hundreds of numbers that no one compares by eye.
    shown = [
        {f"{leaf.function:#x}": [Hex(leaf.eax), Hex(leaf.ebx), Hex(leaf.ecx), Hex(leaf.edx)]}
        for leaf in leaves
        if leaf.function >> 16 == kvm.KVM_CPUID_SIGNATURE >> 16
    ]
    return _cut({"nent": head.nent}, "hypervisor", shown)


def _msr_filter(arg: int, read: Read) -> Fields:
    given = _struct(s.kvm_msr_filter, arg, read)
    ranges = [
        {
            "flags": _flags(r.flags, "KVM_MSR_FILTER_"),
            "base": Hex(r.base),
            "nmsrs": r.nmsrs,
        }
        for r in given.ranges
        if r.nmsrs
    ]
    return {"flags": _enum(given.flags, "KVM_MSR_FILTER_DEFAULT_"), "ranges": ranges}


def _msi(arg: int, read: Read) -> Fields:
    msi = _struct(s.kvm_msi, arg, read)
    return {"address": Hex(msi.address_hi << 32 | msi.address_lo), "data": Hex(msi.data)}


def _mp_state(arg: int, read: Read) -> Fields:
    return {"mp_state": _enum(_struct(s.kvm_mp_state, arg, read).mp_state, "KVM_MP_STATE_")}


def _sregs(arg: int, read: Read) -> Fields:
    sregs = _struct(s.kvm_sregs, arg, read)
    names = ("cr0", "cr3", "cr4", "efer", "apic_base")
    return {"cs": Hex(sregs.cs.selector)} | {name: Hex(getattr(sregs, name)) for name in names}


def _identity_map(arg: int, read: Read) -> Fields:
    data = read(arg, sizeof(c_uint64))
    if len(data) < sizeof(c_uint64):
        raise Unreadable
    return {"address": Hex(int.from_bytes(data, "little"))}


def _scalars(kind: type[Structure], *names: str, hexes: bool = False) -> Callable[[int, Read], Fields]:
    """A decoder that shows the fields `names` of `kind` as they are."""
    number = Hex if hexes else int

    def scalars(arg: int, read: Read) -> Fields:
        given = _struct(kind, arg, read)
        return {name: number(getattr(given, name)) for name in names}

    return scalars


def _value(name: str, number: type[int] = int) -> Callable[[int, Read], Fields]:
    """A decoder for an argument that is a number, not an address."""
    return lambda arg, read: {name: number(arg)}


_regs = _scalars(s.kvm_regs, "rip", "rsp", "rflags", "rax", "rbx", "rcx", "rdx", hexes=True)
_level = _scalars(s.kvm_irq_level, "irq", "level")
_zone = _scalars(s.kvm_coalesced_mmio_zone, "addr", "size", "pio", hexes=True)
_clock = _scalars(s.kvm_clock_data, "clock", "flags")

_BY_NAME = {
    "KVM_CHECK_EXTENSION": Decoder(lambda arg, read: {"cap": cap_name(arg)}),
    "KVM_CREATE_VM": Decoder(_value("type")),
    "KVM_CREATE_VCPU": Decoder(_value("id")),
    "KVM_SET_BOOT_CPU_ID": Decoder(_value("id")),
    "KVM_SET_TSS_ADDR": Decoder(_value("address", Hex)),
    "KVM_SET_TSC_KHZ": Decoder(_value("khz")),
    "KVM_SET_IDENTITY_MAP_ADDR": Decoder(_identity_map),
    "KVM_SET_USER_MEMORY_REGION": Decoder(_memory_region),
    "KVM_SET_USER_MEMORY_REGION2": Decoder(_memory_region),  # the same fields come first
    "KVM_IRQ_LINE": Decoder(_level),
    "KVM_IRQ_LINE_STATUS": Decoder(_level),  # `irq` goes in, the status comes out in its place
    "KVM_REGISTER_COALESCED_MMIO": Decoder(_zone),
    "KVM_UNREGISTER_COALESCED_MMIO": Decoder(_zone),
    "KVM_GET_IRQCHIP": Decoder(_scalars(s.kvm_irqchip, "chip_id")),
    "KVM_SET_IRQCHIP": Decoder(_scalars(s.kvm_irqchip, "chip_id")),
    "KVM_CREATE_PIT2": Decoder(_scalars(s.kvm_pit_config, "flags", hexes=True)),
    "KVM_SET_GSI_ROUTING": Decoder(_routing),
    "KVM_IRQFD": Decoder(_irqfd),
    "KVM_IOEVENTFD": Decoder(_ioeventfd),
    "KVM_HYPERV_EVENTFD": Decoder(_hyperv_eventfd),
    "KVM_ENABLE_CAP": Decoder(_enable_cap),
    "KVM_X86_SET_MSR_FILTER": Decoder(_msr_filter),
    "KVM_SIGNAL_MSI": Decoder(_msi),
    "KVM_SET_CLOCK": Decoder(_clock),
    "KVM_GET_CLOCK": Decoder(_clock, after=True),
    "KVM_GET_DIRTY_LOG": Decoder(_scalars(s.kvm_dirty_log, "slot")),
    "KVM_SET_MSRS": Decoder(_msrs),
    "KVM_GET_MSRS": Decoder(_msrs, after=True),
    "KVM_SET_CPUID2": Decoder(_cpuid),
    "KVM_GET_CPUID2": Decoder(_cpuid, after=True),
    "KVM_GET_SUPPORTED_CPUID": Decoder(_cpuid, after=True),
    "KVM_GET_SUPPORTED_HV_CPUID": Decoder(_cpuid, after=True),
    "KVM_SET_REGS": Decoder(_regs),
    "KVM_GET_REGS": Decoder(_regs, after=True),
    "KVM_SET_SREGS": Decoder(_sregs),
    "KVM_GET_SREGS": Decoder(_sregs, after=True),
    "KVM_SET_MP_STATE": Decoder(_mp_state),
    "KVM_GET_MP_STATE": Decoder(_mp_state, after=True),
    "KVM_INTERRUPT": Decoder(_scalars(s.kvm_interrupt, "irq")),
    "KVM_TRANSLATE": Decoder(
        _scalars(s.kvm_translation, "linear_address", "physical_address", "valid", hexes=True), after=True
    ),
}
DECODERS: dict[int, Decoder] = {
    number: _BY_NAME[name] for number, name in REQUEST_NAMES.items() if name in _BY_NAME
}

KVM_RUN = kvm_requests.KVM_RUN.number
CREATES = {  # requests that return a new fd: what it is
    kvm_requests.KVM_CREATE_VM.number: "vm",
    kvm_requests.KVM_CREATE_VCPU.number: "vcpu",
}
