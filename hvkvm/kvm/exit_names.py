"""The C names of exit reasons, for who only counts them: what decodes an exit costs more to import. Pure."""

from __future__ import annotations

from hvkvm.abi import kvm

_SUBTYPES = frozenset(
    {
        "KVM_EXIT_IO_IN",
        "KVM_EXIT_IO_OUT",
        "KVM_EXIT_HYPERV_SYNIC",
        "KVM_EXIT_HYPERV_HCALL",
        "KVM_EXIT_HYPERV_SYNDBG",
    }
)
_NAMES = {v: k for k, v in vars(kvm).items() if k.startswith("KVM_EXIT_") and k not in _SUBTYPES}


def exit_name(reason: int) -> str:
    """The C name of an exit reason, or `KVM_EXIT_<number>` for one this build does not know."""
    return _NAMES.get(reason) or f"KVM_EXIT_{reason}"
