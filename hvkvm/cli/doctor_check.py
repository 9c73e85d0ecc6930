"""One finding of `hvkvm doctor`, and what several of its reports share."""

from __future__ import annotations

from typing import NamedTuple

from hvkvm.kvm.kind import REMEDY, KvmKind

KERNEL_REMEDY = "a kernel with CONFIG_KVM_HYPERV=y, scripts/lab for a nested one, or hvkvm run --synic user"


class Check(NamedTuple):
    """One line of the report."""

    verdict: str
    name: str
    detail: str
    remedy: str = ""
    status: int = 0


def carrier(kind: KvmKind) -> Check:
    """Whether the CPU runs the guests of this KVM, or software does."""
    if kind.in_software:
        detail = f"guests run in software, and Linux may end in a KVM internal error: {kind}"
        return Check("WARN", "VMX or SVM", detail, REMEDY)
    return Check("PASS", "VMX or SVM", str(kind))
