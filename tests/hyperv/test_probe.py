"""What a KVM is found to have for Hyper-V's features.

Apart from `test_features.py`, which imports hypothesis: that takes seconds in the lab, where these run.
"""

from __future__ import annotations

import pytest

from hvkvm.hyperv.features import HostFeatures, parse_features, resolve


@pytest.mark.kvm
def test_probe_reads_this_host(kvm: object) -> None:
    host = HostFeatures.probe(kvm)  # type: ignore[arg-type]
    features = resolve(parse_features("host-model"), host)
    assert bool(features) == bool(host.caps["KVM_CAP_HYPERV"])


@pytest.mark.hyperv
def test_probe_finds_a_synic_where_kvm_has_one(kvm: object) -> None:
    host = HostFeatures.probe(kvm)  # type: ignore[arg-type]
    for text in ("host-model", "passthrough"):
        features = resolve(parse_features(text), host)
        assert {"relaxed", "vpindex", "synic", "stimer", "time"} <= set(features.names)
