"""What carries this machine's KVM: the CPU's VMX or SVM, or software.

Facts only, from /proc/cpuinfo and /sys/module: which flags the CPU has, which of KVM's
vendor modules are there. KVM needs one, and kvm_intel and kvm_amd are the ones that use VMX
and SVM; others (kvm_pvm) run guests without, and emulate what the CPU cannot run for them.
Any thread.
"""

from __future__ import annotations

from pathlib import Path

from hvkvm.tuples import NamedTuple

HARDWARE_MODULES = {"kvm_intel": "vmx", "kvm_amd": "svm"}
REMEDY = (
    "boot Linux where KVM has VMX or SVM, or in the lab (scripts/lab -- COMMAND);"
    " where one instruction is the cause, hide its CPU feature (--cpu host,-NAME)"
)


class KvmKind(NamedTuple):
    """What was seen. None for flags: /proc/cpuinfo could not be read."""

    modules: tuple[str, ...]
    """KVM's vendor modules, loaded or linked in, by name."""
    flags: frozenset[str] | None
    """Of vmx, svm and hypervisor, those the CPU has."""

    @property
    def in_software(self) -> bool:
        """Guests run without VMX and SVM. False where that cannot be told."""
        if self.flags is None:
            return bool(self.modules) and not any(name in HARDWARE_MODULES for name in self.modules)
        if not self.flags & {"vmx", "svm"}:
            # One that is linked in is listed on every CPU, so its name alone says nothing.
            return True
        return bool(self.modules) and not any(
            HARDWARE_MODULES.get(name) in self.flags for name in self.modules
        )

    @property
    def forgets_triple_faults(self) -> bool:
        """A vCPU is back at INIT behind a triple fault, since SVM leaves nothing of it (svm.c)."""
        return not self.in_software and "svm" in (self.flags or ())

    def __str__(self) -> str:
        """The facts, in a line."""
        modules = f"modules {', '.join(self.modules)}" if self.modules else "no vendor module listed"
        if self.flags is None:
            return f"{modules}; /proc/cpuinfo cannot be read"
        found = sorted(self.flags & {"vmx", "svm"})
        virtual = "a virtual CPU" if "hypervisor" in self.flags else "a CPU"
        return f"{modules}; {virtual} {'with ' + found[0] if found else 'without vmx and svm'}"


def probe(modules: Path = Path("/sys/module"), cpuinfo: Path = Path("/proc/cpuinfo")) -> KvmKind:
    """Look. What cannot be read is left out."""
    try:
        names = tuple(sorted(path.name for path in modules.iterdir() if path.name.startswith("kvm_")))
    except OSError:
        names = ()
    flags: frozenset[str] | None = None
    try:
        with cpuinfo.open(errors="replace") as lines:
            line = next((line for line in lines if line.startswith("flags")), None)
    except OSError:
        line = None
    if line is not None:
        flags = frozenset(line.partition(":")[2].split()) & {"vmx", "svm", "hypervisor"}
    return KvmKind(names, flags)


_APIC_PARAMETERS = ("kvm_intel/parameters/enable_apicv", "kvm_amd/parameters/avic")


def hardware_apic(modules: Path = Path("/sys/module")) -> bool:
    """Whether KVM gives guests the hardware's own APIC; True where it does not say."""
    said = []
    for name in _APIC_PARAMETERS:
        try:
            said.append((modules / name).read_text().strip())
        except OSError:
            continue
    return not said or any(word not in ("N", "0") for word in said)


def why_emulation_failed(kind: KvmKind) -> str:
    """What to add to a KVM internal error of emulation; empty where VMX or SVM carries the guest."""
    if not kind.in_software:
        return ""
    return f"; this KVM runs guests in software ({kind}) and cannot emulate that instruction: {REMEDY}"
