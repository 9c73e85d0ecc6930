"""The tiers of tests: what this machine can run, and what HVKVM_REQUIRE insists on."""

from __future__ import annotations

import functools
import os

import pytest

TIERS = ("kvm", "hyperv")


@functools.cache
def missing(tier: str) -> str | None:
    """Say why `tier` ("kvm" or "hyperv") cannot run here, or None when it can."""
    from hvkvm.abi.kvm import KVM_CAP_HYPERV_SYNIC2
    from hvkvm.errors import HvkvmError
    from hvkvm.kvm.system import Kvm

    try:
        with Kvm() as kvm:
            if tier == "hyperv" and not kvm.check_extension(KVM_CAP_HYPERV_SYNIC2):
                return "this kernel's KVM has no in-kernel Hyper-V (KVM_CAP_HYPERV_SYNIC2 is 0)"
    except HvkvmError as error:
        return str(error)
    return None


def required_tiers() -> frozenset[str]:
    """The tiers named in HVKVM_REQUIRE; pytest.UsageError for an unknown name."""
    names = frozenset(filter(None, os.environ.get("HVKVM_REQUIRE", "").replace(" ", "").split(",")))
    unknown = names - set(TIERS)
    if unknown:
        raise pytest.UsageError(
            f"HVKVM_REQUIRE names {', '.join(sorted(unknown))}: only {', '.join(TIERS)} can be required"
        )
    return names


def need(tier: str) -> None:
    """Skip the test that runs where `tier` is out of reach; fail it if HVKVM_REQUIRE names the tier."""
    reason = missing(tier)
    if reason is None:
        return
    if tier in required_tiers():
        pytest.fail(f"HVKVM_REQUIRE={tier}, but {reason}", pytrace=False)
    pytest.skip(f"needs {tier}: {reason}")
