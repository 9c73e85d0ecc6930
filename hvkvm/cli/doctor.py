"""`hvkvm doctor`: everything hvkvm stands on, PASS, WARN or FAIL, each with its remedy.

FAIL means that no guest can run, WARN that something named will be missing.
The exit status is 0, or that of the first FAIL.
"""

from __future__ import annotations

import ctypes.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hvkvm.abi import kvm as abi
from hvkvm.cli.arguments import Parser
from hvkvm.cli.doctor_check import KERNEL_REMEDY, Check, carrier
from hvkvm.cli.output import show
from hvkvm.errors import CapabilityMissing, ConfigError, HvkvmError, KvmUnavailable
from hvkvm.kvm.kind import probe
from hvkvm.kvm.system import Kvm

EPILOG = """exit status:
  0 nothing fails; 2 usage; 69 KVM unavailable; 77 capability missing, or with --ci a tier of
  HVKVM_REQUIRE; 74 the report, or with --ci a file of the job's, could not be written
"""

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
NEEDED = (
    ("KVM_CAP_IRQCHIP", "the in-kernel interrupt controllers"),
    ("KVM_CAP_IRQ_ROUTING", "GSI routes"),
    ("KVM_CAP_IRQFD", "interrupts by eventfd"),
    ("KVM_CAP_IRQFD_RESAMPLE", "the guest's end of message, by eventfd"),
    ("KVM_CAP_IOEVENTFD", "doorbells without an exit"),
    ("KVM_CAP_IMMEDIATE_EXIT", "kicks that are not lost"),
    ("KVM_CAP_MP_STATE", "reset of application processors"),
)
USEFUL = (
    ("KVM_CAP_COALESCED_PIO", "cheap console output", "use Linux 4.20 or newer"),
    ("KVM_CAP_TSC_DEADLINE_TIMER", "the guest's cheapest timer", "use a CPU or an outer VM that has it"),
)
HYPERV = (
    ("KVM_CAP_HYPERV", "Hyper-V enlightenments"),
    ("KVM_CAP_HYPERV_SYNIC2", "the in-kernel SynIC"),
    ("KVM_CAP_HYPERV_EVENTFD", "HvSignalEvent without an exit"),
    ("KVM_CAP_HYPERV_VP_INDEX", "VP index"),
    ("KVM_CAP_HYPERV_TLBFLUSH", "remote TLB flush"),
    ("KVM_CAP_HYPERV_SEND_IPI", "IPIs by hypercall"),
    ("KVM_CAP_HYPERV_CPUID", "what KVM can offer, as CPUID"),
    ("KVM_CAP_HYPERV_ENFORCE_CPUID", "hv-enforce-cpuid"),
)
TOOLS = (
    ("busybox", "hvkvm run -- COMMAND", "install busybox-static, or give --busybox"),
    ("zstd", "starting zstd kernels without the guest's own decompression", "install zstd"),
)


def checks(path: str) -> Iterator[Check]:
    """Every check, in the order in which one stands on the other."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("PASS", "Python", version)
    atomic = ctypes.util.find_library("atomic")
    if atomic:
        yield Check("PASS", "libatomic", atomic)
    else:
        yield Check("WARN", "libatomic", "not found: our own machine code stands in", "install libatomic1")
    for tool, purpose, remedy in TOOLS:
        found = shutil.which(tool)
        if found:
            yield Check("PASS", tool, found)
        else:
            yield Check("WARN", tool, f"not found; needed for {purpose}", remedy)
    yield huge_pages()
    try:
        kvm = Kvm(path)
    except KvmUnavailable as error:
        reason, _, remedy = str(error).rpartition("; ")
        yield Check("FAIL", path, reason, remedy, KvmUnavailable.exit_status)
        return
    with kvm:
        yield Check("PASS", path, f"KVM API {abi.KVM_API_VERSION}")
        yield carrier(probe())
        yield from _capabilities(kvm)
        yield _cpuid(kvm)


def huge_pages(setting: Path = SHMEM_ENABLED) -> Check:
    """Whether guests' memory, which is shared, may lie in pages of 2 MiB."""
    name = "huge pages"
    try:
        chosen = setting.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return Check("WARN", name, "this kernel has none for shared memory", "CONFIG_TRANSPARENT_HUGEPAGE=y")
    if chosen in ("never", "deny"):
        detail = (
            f"shmem_enabled is {chosen}: guests' memory is in pages of 4 KiB, so they fault and walk more"
        )
        return Check("WARN", name, detail, f"echo advise >{setting}")
    return Check("PASS", name, f"shmem_enabled is {chosen}")


def _capabilities(kvm: Kvm) -> Iterator[Check]:
    def answer(name: str) -> int:
        return kvm.check_extension(getattr(abi, name))

    for name, purpose in NEEDED:
        if answer(name):
            yield Check("PASS", name, purpose)
        else:
            status = CapabilityMissing.exit_status
            yield Check("FAIL", name, f"missing: {purpose}", "use a newer kernel's KVM", status)
    for name, purpose, remedy in USEFUL:
        if answer(name):
            yield Check("PASS", name, purpose)
        else:
            yield Check("WARN", name, f"missing: {purpose}", remedy)
    for name, purpose in HYPERV:
        if answer(name):
            yield Check("PASS", name, purpose)
        else:
            yield Check("WARN", name, f"missing: {purpose}", KERNEL_REMEDY)
    yield _synic(kvm)
    yield Check("PASS", "KVM_CAP_MAX_VCPUS", f"{answer('KVM_CAP_MAX_VCPUS')} vCPUs")


def _synic(kvm: Kvm) -> Check:
    """Which SynIC `--synic auto` takes here, and why."""
    from hvkvm.hyperv.usermode.features import choose, lacks_for_user

    choice = choose(kvm, "auto")
    if choice.synic == "user":
        return Check("PASS", "--synic auto", f"the SynIC in user space: {choice.why}")
    if choice.host.caps.get("KVM_CAP_HYPERV_SYNIC2"):
        lacking = lacks_for_user(kvm)
        other = f"--synic user lacks {lacking}" if lacking else "--synic user would work too"
        return Check("PASS", "--synic auto", f"KVM's own SynIC: {choice.why}; {other}")
    return Check("WARN", "--synic auto", f"no SynIC at all: {choice.why}", KERNEL_REMEDY)


def _cpuid(kvm: Kvm) -> Check:
    """Whether guests see the CPU that hvkvm makes for them, or one of KVM's own making."""
    from hvkvm.machine.cpu import guest_cpuid, vcpu_cpuid
    from hvkvm.machine.cpu_features import shown

    name = "guest CPUID"
    try:
        wanted = vcpu_cpuid(guest_cpuid(kvm.supported_cpuid(), tsc_deadline=False), 0, 1, None)
        with kvm.create_vm() as vm:
            vcpu = vm.create_vcpu(0)
            vcpu.set_cpuid2(wanted)
            # OSXSAVE and OSPKE follow the guest's CR4.
            own = sorted(shown(vcpu.cpuid2()) - shown(wanted) - {"osxsave", "ospke"})
    except HvkvmError as error:
        return Check("WARN", name, f"cannot be tried: {error}", "see the lines above")
    if not own:
        return Check("PASS", name, "what hvkvm sets is what guests see")
    few = ", ".join(own[:4]) + (f" and {len(own) - 4} more" if len(own) > 4 else "")
    detail = f"this KVM shows guests features of its own, which --cpu cannot hide: {few}"
    return Check(
        "WARN", name, detail, "use a host with VMX or SVM, or scripts/lab, where a guest must not see them"
    )


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm doctor", "Check what hvkvm needs of this machine.", EPILOG)
    p.add_argument("--kvm", default="/dev/kvm", metavar="PATH", help="the KVM device (/dev/kvm)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--windows", action="store_true", help="what a Windows guest would need of this machine")
    p.add_argument(
        "--ci",
        action="store_true",
        help="also say which tiers of tests run here, to GitHub too; fail for one in HVKVM_REQUIRE",
    )
    return p


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.ci and options.json:
        raise ConfigError("--json: --ci says all in words, to people and to GitHub; leave one of the two out")
    if options.ci and options.windows:
        raise ConfigError("--windows: --ci says which tests run here, not Windows; leave one of the two out")
    if options.windows:
        from hvkvm.cli.doctor_windows import checks as windows_checks

        report = list(windows_checks(options.kvm))
    else:
        report = list(checks(options.kvm))
    if options.ci:
        from hvkvm.cli import doctor_ci

        return doctor_ci.main(report, text(report))
    if options.json:
        import json

        show(json.dumps([check._asdict() for check in report], indent=2))
    else:
        show(text(report))
    return next((check.status for check in report if check.verdict == "FAIL"), 0)


def text(report: list[Check]) -> str:
    """The report for people: a line a check, and each remedy once."""
    width = max(len(check.name) for check in report)
    lines = [f"{check.verdict}  {check.name:{width}}  {check.detail}" for check in report]
    remedies: dict[str, list[str]] = {}
    for check in report:
        if check.remedy:
            remedies.setdefault(check.remedy, []).append(check.name)
    lines += [f"remedy for {', '.join(names)}: {remedy}" for remedy, names in remedies.items()]
    return "\n".join(lines)
