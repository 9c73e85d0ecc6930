"""The pytest plugin: three tiers of tests, and fixtures for those who test guests on KVM.

A test without a marker runs anywhere. `@pytest.mark.kvm` wants any usable
/dev/kvm, `@pytest.mark.hyperv` one whose kernel has the in-kernel Hyper-V
SynIC; so do fixtures that make guests. Where the tier is out of reach the test is
skipped with what is missing; `HVKVM_REQUIRE=kvm,hyperv` turns that skip into a
failure, and fails a session in which a required tier ran no test at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from hvkvm.testing.ended_tests import (
    pytest_runtest_call,
    pytest_runtest_makereport,
    pytest_runtest_setup,
)
from hvkvm.testing.fixtures import (
    disk,
    hvkvm_cpus,
    hvkvm_guests,
    hvkvm_kernel,
    hvkvm_synic,
    lab,
    linux_guest,
    micro_guest,
    net,
    pytest_addoption,
    pytest_generate_tests,
    synic_of,
    vm_pair,
    vmbus_device,
)
from hvkvm.testing.fixtures import pytest_configure as configure_fixtures
from hvkvm.testing.tiers import TIERS, missing, need, required_tiers

if TYPE_CHECKING:
    from hvkvm.kvm.system import Kvm

__all__ = [
    "TIERS",
    "disk",
    "hvkvm_cpus",
    "hvkvm_guests",
    "hvkvm_kernel",
    "hvkvm_synic",
    "lab",
    "linux_guest",
    "micro_guest",
    "missing",
    "need",
    "net",
    "pytest_addoption",
    "pytest_generate_tests",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
    "required_tiers",
    "vm_pair",
    "vmbus_device",
]


def marked_tier(item: pytest.Item) -> str:
    """The tier that a collected test's markers name: "anywhere", "kvm" or "hyperv"."""
    if item.get_closest_marker("hyperv"):
        return "hyperv"
    return "kvm" if item.get_closest_marker("kvm") else "anywhere"


def counted_tier(item: pytest.Item) -> str:
    """The tier that a collected test is counted in: what its markers name, or its fixtures need.

    A fixture skips the test by itself, and only when it is set up: one of the user's own may have its name.
    """
    names = getattr(item, "fixturenames", ())
    found = {marked_tier(item)}
    if "hvkvm_synic" in names:
        found.add("hyperv" if synic_of(item) == "kernel" else "kvm")
    if "kvm" in names:
        found.add("kvm")
    if "lab" in names:
        found.add("hyperv")
    return max(found, key=("anywhere", *TIERS).index)


def _runs_tests(config: pytest.Config) -> bool:
    """Whether the session runs what it collects, or only shows it."""
    option = config.option
    return not (option.collectonly or option.setuponly or option.setupplan)


class TierReport:
    """Counts what ran in each tier and holds the session to HVKVM_REQUIRE."""

    def __init__(self, required: frozenset[str]) -> None:
        self.required = required
        self.tier: dict[str, str] = {}
        self.ran: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.tier.update((item.nodeid, counted_tier(item)) for item in items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        tier = marked_tier(item)
        if tier != "anywhere":
            need(tier)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        # A session that hands its tests to workers (pytest-xdist) collects none, and sees reports only.
        report.hvkvm_tier = self.tier.get(item.nodeid, "anywhere")  # type: ignore[attr-defined]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tier: str = getattr(report, "hvkvm_tier", "anywhere")
        if report.when == "call" and not report.skipped:
            self.ran[tier] += 1
        elif report.skipped:
            self.skipped[tier] += 1

    def empty_tiers(self) -> list[str]:
        """Required tiers of which no test ran. KVM with Hyper-V is a KVM: what ran there counts for both."""
        ran = {"kvm": self.ran["kvm"] + self.ran["hyperv"], "hyperv": self.ran["hyperv"]}
        return sorted(tier for tier in self.required if not ran[tier])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # its session counts what all its workers ran
        if session.exitstatus == pytest.ExitCode.OK and self.empty_tiers() and _runs_tests(session.config):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.required and not (self.ran["kvm"] or self.ran["hyperv"] or self.skipped["hyperv"]):
            return
        line = ", ".join(
            f"{tier} {self.ran[tier]} ran {self.skipped[tier]} skipped" for tier in ("anywhere", *TIERS)
        )
        terminalreporter.write_line(f"hvkvm tiers: {line}")
        for tier in self.empty_tiers() if _runs_tests(terminalreporter.config) else ():
            terminalreporter.write_line(f"hvkvm tiers: HVKVM_REQUIRE={tier}, but no test of it ran", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Register markers, tiers and what `fixtures` has."""
    configure_fixtures(config)
    config.addinivalue_line("markers", "kvm: needs a usable /dev/kvm")
    config.addinivalue_line("markers", "hyperv: needs a KVM with in-kernel Hyper-V (KVM_CAP_HYPERV_SYNIC2)")
    config.pluginmanager.register(TierReport(required_tiers()), "hvkvm-tiers")


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm; skips where there is none."""
    from hvkvm.kvm.system import Kvm

    need("kvm")
    with Kvm() as handle:
        yield handle
