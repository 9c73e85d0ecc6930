"""Which enlightenments a guest gets: the user's request, the host's abilities, the resolved set.

`parse_features(text)` checks what needs no host; `HostFeatures.probe(kvm)` reads
the host; `resolve(request, host)` joins both. All on the main thread, before
there is a vCPU. Errors are one line: the flag, the reason, the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hvkvm.abi import kvm as abi_kvm
from hvkvm.abi import tlfs
from hvkvm.errors import CapabilityMissing
from hvkvm.hyperv.enlightenments import (
    BY_NAME,
    ENLIGHTENMENTS,
    REGISTERS,
    VERSION_FIELDS,
    WINDOWS,
    WINDOWS_NEEDS,
    Bits,
    Enlightenment,
    Version,
)
from hvkvm.hyperv.feature_text import FeatureRequest as FeatureRequest
from hvkvm.hyperv.feature_text import parse_features as parse_features
from hvkvm.kvm import kind
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.kvm.system import Kvm
    from hvkvm.kvm.vcpu import Vcpu

Leaf = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

MICROSOFT = tlfs.HV_CPUID_VENDOR
DEFAULT_VERSION = Version()
DEFAULT_MAX_LPS = 64


class FeatureSet(NamedTuple):
    """What the guest is shown. Empty means: no Hyper-V leaf at all."""

    names: tuple[str, ...] = ()
    """In the order of the table, without "hv-"."""
    spinlocks: int = tlfs.HV_SPINLOCK_RETRY_NEVER
    vendor_id: bytes = MICROSOFT
    version: Version = DEFAULT_VERSION
    max_vps: int | None = None
    """Leaf 0x40000005 EAX; None: the machine's vCPUs."""
    max_lps: int = DEFAULT_MAX_LPS

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        """In QEMU's flag form, to be given to `--hv` again; "none" when empty."""
        if not self.names:
            return "none"
        flags = [f"hv-{n}={self.spinlocks:#x}" if n == "spinlocks" else f"hv-{n}" for n in self.names]
        if self.vendor_id != MICROSOFT:
            flags.append(f"hv-vendor-id={self.vendor_id.rstrip(bytes(1)).decode('ascii', 'replace')}")
        for setting, (field, _limit) in VERSION_FIELDS.items():
            value = getattr(self.version, field)
            if value != getattr(DEFAULT_VERSION, field):
                flags.append(f"hv-{setting}={value:#x}")
        return ",".join(flags)


class HostFeatures(NamedTuple):
    """What can be backed here: KVM's capabilities by C name, and the Hyper-V leaves it reports.

    `leaves` None means that this KVM cannot report them (before 5.11, without a
    vCPU): then capabilities alone decide. `source` says who backs them, `remedy`
    what to do about what it lacks. `on_demand` names what can be backed but costs
    more than it gives, so that host-model leaves it out. `cpu` names the CPU features
    that guests are shown; None means that it is not known, and then any are taken to be.
    """

    caps: Mapping[str, int]
    leaves: Mapping[int, Leaf] | None
    source: str = "this kernel's KVM"
    remedy: str = "use a newer kernel"
    on_demand: frozenset[str] = frozenset()
    cpu: frozenset[str] | None = None

    @classmethod
    def probe(cls, kvm: Kvm, vcpu: Vcpu | None = None) -> HostFeatures:
        """Ask KVM; through `vcpu` where the system fd cannot tell (before 5.11). Raises KvmIoctlError."""
        names = {name for row in ENLIGHTENMENTS for name in row.kvm_caps}
        caps = {name: kvm.check_extension(getattr(abi_kvm, name)) for name in sorted(names)}
        entries = None
        if kvm.check_extension(abi_kvm.KVM_CAP_SYS_HYPERV_CPUID):
            entries = kvm.supported_hv_cpuid()
        elif vcpu is not None and kvm.check_extension(abi_kvm.KVM_CAP_HYPERV_CPUID):
            entries = vcpu.supported_hv_cpuid()
        leaves = None
        if entries is not None:
            leaves = {e.function: (e.eax, e.ebx, e.ecx, e.edx) for e in entries}
        # An APIC of the hardware takes a guest's EOI without an exit, but not if it comes by Hyper-V's MSR.
        return cls(caps, leaves, on_demand=frozenset({"lazy-eoi"} if kind.hardware_apic() else ()))

    def missing(self, row: Enlightenment) -> str | None:
        """Why `row` cannot be had here, with the remedy; None when it can."""
        for cap in row.kvm_caps:
            if not self.caps.get(cap):
                if cap == "KVM_CAP_HYPERV":
                    remedy = "use a kernel with CONFIG_KVM_HYPERV=y, or --hv none"
                else:
                    remedy = f"{self.remedy}, or leave hv-{row.name} out"
                return f"hv-{row.name} needs {cap}, which {self.source} lacks; {remedy}"
        for bits in row.bits if row.needs_host else ():
            if not self.reports(bits):
                return (
                    f"hv-{row.name} needs CPUID {bits.leaf:#x}.{bits.register.upper()} {bits.mask:#x}, which"
                    f" {self.source} does not report; {self.remedy}, or leave hv-{row.name} out"
                )
        if row.needs_cpu and self.cpu is not None and row.needs_cpu.isdisjoint(self.cpu):
            names = " or ".join(sorted(row.needs_cpu))
            lacks = f"hv-{row.name} needs {names} in the guest's CPU, which has none here"
            return f"{lacks}; leave hv-{row.name} out"
        return None

    def reports(self, bits: Bits) -> bool:
        """Whether KVM reports all of `bits`; True where it reports nothing at all."""
        if self.leaves is None:
            return True
        leaf = self.leaves.get(bits.leaf, (0, 0, 0, 0))
        return leaf[REGISTERS.index(bits.register)] & bits.mask == bits.mask

    def leaf(self, function: int) -> Leaf | None:
        """One reported leaf."""
        return None if self.leaves is None else self.leaves.get(function)


def resolve(request: FeatureRequest, host: HostFeatures) -> FeatureSet:
    """The features of `request` on `host`.

    host-model is everything the host can do at a fair price, closed under
    dependencies, and on a host that can do nothing it is empty; windows is the part of it that
    Windows makes use of, and insists on what Windows cannot do without; passthrough asks
    no price, and takes over KVM's vendor, version and limits. Raises
    CapabilityMissing naming the feature, what the kernel lacks and the remedy;
    ConfigError when a named feature's requirement was taken away.
    """
    if request.base == "none":
        return FeatureSet()
    chosen = set(request.on)
    for name in request.on:
        _must_have(BY_NAME[name], host)
    if request.base == "passthrough" and not host.caps.get("KVM_CAP_HYPERV"):
        raise CapabilityMissing(
            f"passthrough needs KVM_CAP_HYPERV, which {host.source} lacks;"
            " use a kernel with CONFIG_KVM_HYPERV=y, or --hv none"
        )
    if request.base != "list":
        off = request.off if request.base == "passthrough" else request.off | host.on_demand
        chosen |= _host_model(host, off, WINDOWS if request.base == "windows" else tuple(BY_NAME))
    if request.base == "windows":
        for name in WINDOWS_NEEDS:
            if name not in chosen:
                why = host.missing(BY_NAME[name]) or "it was taken away"
                raise CapabilityMissing(
                    f"--hv windows: Windows starts on no Hyper-V without hv-{name}: {why}"
                )
    chosen |= {n for n in request.auto if host.leaves is not None and all(map(host.reports, BY_NAME[n].bits))}
    for name in sorted(chosen):
        for needed in BY_NAME[name].requires:
            if needed not in chosen:
                # Only with host-model or passthrough: lists were checked when they were read.
                reason = host.missing(BY_NAME[needed]) or f"hv-{needed} is not part of {request.base}"
                raise CapabilityMissing(f"hv-{name} requires hv-{needed}: {reason}")
    return _feature_set(request, host, chosen)


def _must_have(row: Enlightenment, host: HostFeatures) -> None:
    reason = host.missing(row)
    if reason is not None:
        raise CapabilityMissing(reason)


def _host_model(host: HostFeatures, off: Iterable[str], of: Iterable[str]) -> set[str]:
    """What is possible `of` these but `off`, without what depends on something that is not there."""
    rows = [BY_NAME[name] for name in of]
    chosen = {row.name for row in rows if row.in_host_model and host.missing(row) is None}
    chosen = {
        n
        for n in chosen
        if BY_NAME[n].needs_host or (host.leaves and all(map(host.reports, BY_NAME[n].bits)))
    }
    chosen -= set(off)
    while stranded := {name for name in chosen if not chosen.issuperset(BY_NAME[name].requires)}:
        chosen -= stranded
    return chosen


def _feature_set(request: FeatureRequest, host: HostFeatures, chosen: set[str]) -> FeatureSet:
    spinlocks = request.spinlocks
    info = host.leaf(tlfs.HYPERV_CPUID_ENLIGHTMENT_INFO)
    if spinlocks is None and "spinlocks" in chosen:
        spinlocks = info[1] if info is not None else None
    if spinlocks is None or spinlocks == tlfs.HV_SPINLOCK_RETRY_NEVER:
        chosen.discard("spinlocks")
        spinlocks = tlfs.HV_SPINLOCK_RETRY_NEVER
    names = tuple(row.name for row in ENLIGHTENMENTS if row.name in chosen)
    vendor, version, max_vps, max_lps = MICROSOFT, DEFAULT_VERSION, None, DEFAULT_MAX_LPS
    if request.base == "passthrough":
        vendor, version, max_vps, max_lps = _of_host(host)
    if request.vendor_id is not None:
        vendor = request.vendor_id.encode("ascii").ljust(12, b"\0")
    version = version._replace(**request.version)
    return FeatureSet(names, spinlocks, vendor, version, max_vps, max_lps)


def _of_host(host: HostFeatures) -> tuple[bytes, Version, int | None, int]:
    vendor, version, max_vps, max_lps = MICROSOFT, DEFAULT_VERSION, None, DEFAULT_MAX_LPS
    if leaf := host.leaf(tlfs.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS):
        vendor = b"".join(word.to_bytes(4, "little") for word in leaf[1:])
    if leaf := host.leaf(tlfs.HYPERV_CPUID_VERSION):
        eax, ebx, ecx, edx = leaf
        version = Version(eax, ebx >> 16, ebx & 0xFFFF, ecx, edx >> 24, edx & 0xFFFFFF)
    if leaf := host.leaf(tlfs.HYPERV_CPUID_IMPLEMENT_LIMITS):
        max_vps, max_lps = leaf[0], leaf[1]
    return vendor, version, max_vps, max_lps
