"""`--cpu host,-NAME`: what a user hides from the guest, and the closure that hides what depends on it.

hvkvm never shows a guest a CPU feature without what that needs (`abi.cpu_needs`):
no real CPU is like that, and Linux uses one instruction set after a look at another. KVM
itself reports such a CPU where its host has lost a feature, as an emulated host without
XSAVE does that keeps AVX.

Pure: CPUID entries in, new entries out. Any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hvkvm.abi.cpu_features import BITS, MADE_BY_LINUX, CpuidBit
from hvkvm.abi.cpu_needs import LEAF_NEEDS, NEEDS
from hvkvm.abi.kvm_structs import kvm_cpuid_entry2
from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.tuples import NamedTuple

_NOT_OURS = {
    "apic": "the machine's interrupt controllers are KVM's",
    "cmp_legacy": "the topology follows from --cpus",
    "ht": "the topology follows from --cpus",
    "hypervisor": "a guest finds its hypervisor by it",
    "lm": "guests are started in long mode",
    "osxsave": "it follows from the guest's CR4",
    "ospke": "it follows from the guest's CR4",
}
"""Names that cannot be hidden, and why."""
_NEVER_SHOWN = {
    "vmx": "no guest of hvkvm can nest",
    "svm": "no guest of hvkvm can nest",
    "monitor": "a guest that waits by MWAIT would keep its core",
}
_XSAVE_LEAF = 0xD
_XSAVE_LEGACY_SIZE = 576
"""Bytes of an XSAVE area with x87 and SSE state only (SDM volume 1, 13.4)."""


class CpuRequest(NamedTuple):
    """What `--cpu` asks for: names as /proc/cpuinfo has them."""

    hide: frozenset[str] = frozenset()
    show: tuple[str, ...] = ()
    """Must be there."""


HOST = CpuRequest()
"""`--cpu host`: nothing hidden, nothing asked for."""


def parse_cpu(text: str) -> CpuRequest:
    """Read the value of `--cpu`: `host`, then `-name` or `name=off`, `+name`, `name` or `name=on`.

    Raises ConfigError: the flag, the reason, the remedy.
    """
    model, *items = (item.strip() for item in text.split(","))
    if text.isdecimal():
        raise ConfigError(f"--cpu {text}: a CPU model, not a number of vCPUs; write --cpus {text}")
    if model != "host":
        raise ConfigError(
            f"--cpu {text}: begins with {model or 'nothing'}, and there is one CPU model, host;"
            " write host, and behind it what to hide, such as host,-cx16"
        )
    hide: set[str] = set()
    show: dict[str, None] = {}
    for item in items:
        name, wanted = _item(text, item)
        if wanted:
            show[name] = None
        else:
            hide.add(name)
    if both := sorted(hide & set(show)):
        raise ConfigError(f"--cpu {text}: {both[0]} is both hidden and asked for; choose one")
    return CpuRequest(frozenset(hide), tuple(show))


def _item(text: str, item: str) -> tuple[str, bool]:
    """(name, whether it shall be shown) of one item."""
    sign = item[:1] if item[:1] in "+-" else ""
    name, equals, value = item[len(sign) :].partition("=")
    name = name.strip().lower().replace("-", "_").replace(".", "_")
    if not name:
        raise ConfigError(f"--cpu {text}: an empty name; remove the stray comma or sign")
    if equals and (sign or value not in ("on", "off")):
        raise ConfigError(f"--cpu {text}: {item} is not -{name}, +{name}, {name}=on or {name}=off; write one")
    wanted = not (sign == "-" or value == "off")
    if name in MADE_BY_LINUX:
        raise ConfigError(
            f"--cpu {text}: {name} is no CPUID bit but what Linux concludes from others; leave it out"
        )
    if name not in BITS or name.startswith("xstate_"):
        raise ConfigError(f"--cpu {text}: no CPU feature is called {name}; {_nearest(name)}")
    if name in _NOT_OURS and not wanted:
        raise ConfigError(f"--cpu {text}: {name} cannot be hidden: {_NOT_OURS[name]}; leave it out")
    if name in _NEVER_SHOWN and wanted:
        raise ConfigError(f"--cpu {text}: {name} cannot be had: {_NEVER_SHOWN[name]}; leave it out")
    return name, wanted


def _nearest(name: str) -> str:
    from difflib import get_close_matches  # only on this way out

    known = [one for one in BITS if not one.startswith("xstate_")]
    if near := get_close_matches(name, known, 3, 0.6):
        return f"did you mean {' or '.join(near)}?"
    return "use a name from the flags line of /proc/cpuinfo"


class _Table:
    """CPUID entries by leaf and sub-leaf, copied."""

    def __init__(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        self.entries = {(one.function, one.index): kvm_cpuid_entry2.from_buffer_copy(one) for one in entries}

    def has(self, bit: CpuidBit) -> bool:
        entry = self.entries.get((bit.function, bit.subleaf))
        return entry is not None and bool(getattr(entry, bit.register) >> bit.number & 1)

    def shows(self, names: str) -> bool:
        """Whether any of `a|b` is shown."""
        return any(self.has(bit) for name in names.split("|") for bit in BITS[name])

    def hide(self, name: str) -> None:
        for bit in BITS[name]:
            if self.has(bit):
                entry = self.entries[bit.function, bit.subleaf]
                setattr(entry, bit.register, getattr(entry, bit.register) & ~(1 << bit.number))

    def drop_leaf(self, function: int) -> bool:
        """Take the leaf out; whether there was one."""
        gone = [key for key in self.entries if key[0] == function]
        for key in gone:
            del self.entries[key]
        return bool(gone)


def shown(entries: Iterable[kvm_cpuid_entry2]) -> set[str]:
    """The names of all features in `entries`."""
    table = _Table(entries)
    return {name for name in BITS if table.shows(name)}


def without(entries: Sequence[kvm_cpuid_entry2], hidden: Iterable[str] = ()) -> list[kvm_cpuid_entry2]:
    """New entries without the features in `hidden`, and without all that then lacks what it needs.

    Leaves that belong to a feature go with it, as do XSAVE's components and their part of the
    area's size. Nothing is added, and doing it again changes nothing.
    """
    table = _Table(entries)
    for name in hidden:
        table.hide(name)
    changed = True
    while changed:
        changed = False
        for name, needs in NEEDS:
            if table.shows(name) and not table.shows(needs):
                table.hide(name)
                changed = True
        for function, needs in LEAF_NEEDS:
            if not table.shows(needs) and table.drop_leaf(function):
                changed = True
    _fit_xsave(table)
    return list(table.entries.values())


def _fit_xsave(table: _Table) -> None:
    """Drop the sub-leaves of components that are not shown, and their part of the area's size."""
    user, supervisor = table.entries.get((_XSAVE_LEAF, 0)), table.entries.get((_XSAVE_LEAF, 1))
    if user is None:
        return
    in_xcr0 = user.eax | user.edx << 32
    components = in_xcr0 | (supervisor.ecx | supervisor.edx << 32 if supervisor is not None else 0)
    size = _XSAVE_LEGACY_SIZE
    for function, index in list(table.entries):
        if function != _XSAVE_LEAF or index < 2:
            continue
        if not components >> index & 1:
            del table.entries[function, index]
        elif in_xcr0 >> index & 1:
            part = table.entries[function, index]
            size = max(size, part.eax + part.ebx)
    # EBX is the size for what XCR0 enables at the moment: KVM keeps it.
    user.ebx, user.ecx = min(user.ebx, size), min(user.ecx, size)


def must_show(
    request: CpuRequest, host: Iterable[kvm_cpuid_entry2], guest: Sequence[kvm_cpuid_entry2]
) -> None:
    """Check that `guest` shows what was asked for. Raises CapabilityMissing with the name and the reason."""
    if not request.show:
        return
    at_host, here = shown(host), shown(guest)
    for name in request.show:
        if name in here:
            continue
        lacking = [needs for one, needs in NEEDS if one == name and here.isdisjoint(needs.split("|"))]
        if name not in at_host:
            reason = "this kernel's KVM does not offer it to guests"
        elif lacking:
            reason = f"it needs {' and '.join(lacking)}, which this guest is not shown"
        else:
            reason = "it shares its CPUID bit with a hidden one"
        raise CapabilityMissing(f"--cpu +{name}: cannot be had: {reason}; leave it out, or use another host")


def must_hide(request: CpuRequest, set_: Iterable[kvm_cpuid_entry2]) -> None:
    """Check what KVM made of the CPUID it was given. Raises CapabilityMissing for what it shows anyway."""
    left = sorted(request.hide & shown(set_))
    if left:
        raise CapabilityMissing(
            f"--cpu host,-{',-'.join(left)}: this kernel's KVM shows guests {', '.join(left)} all the same;"
            " leave that out, or use another host or scripts/lab"
        )
