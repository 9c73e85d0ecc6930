"""KVM's SynIC and the one in user space side by side: timers, and a stock Linux's VMBus, on each.

Called by `scripts/bench`. Nothing to compare with in QEMU: its timers are
KVM's too, and it has neither these devices nor a SynIC of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from steps import bench_timer, bench_vmbus
from steps.bench_table import Row
from steps.bench_vmm import HVKVM, HVKVM_USER
from steps.distribution import StepError

Progress = Callable[[str], None]
Figures = dict[tuple[str, str], tuple[float, str]]
"""(figure, unit) -> (value, which way is better)."""

SYNICS = {HVKVM: "kernel", HVKVM_USER: "user"}
TICKS = 1000


def timer_rows(vmms: tuple[str, ...], runs: int, tell: Progress, *, ticks: int = TICKS) -> list[Row]:
    """A 1 ms periodic timer of `ticks` ticks, as the guest sees it."""

    def once(synic: str) -> Figures:
        found: dict[str, Any] = bench_timer.measure(synic, ticks)
        return {
            ("1 ms timer: tick seen after it was due, median", "us"): (found["median_us"], "less"),
            ("1 ms timer: 99th percentile", "us"): (found["p99_us"], "less"),
            ("1 ms timer: worst", "us"): (found["worst_us"], "less"),
            ("1 ms timer: seen after its message was written", "us"): (found["delivered_to_seen_us"], "less"),
            ("1 ms timer: more than 0.5 ms late", f"/{ticks}"): (found["late"], "less"),
            ("1 ms timer: missed, the next being due", f"/{ticks}"): (found["missed"], "less"),
        }

    return _rows("timer", vmms, runs, tell, once)


def vmbus_rows(vmms: tuple[str, ...], runs: int, tell: Progress, *, suite: str | None = None) -> list[Row]:
    """What `bench_vmbus` measures, one boot a run."""
    return _rows(
        "vmbus", vmms, runs, tell, lambda synic: bench_vmbus.rows(bench_vmbus.measure(synic, suite=suite))
    )


def _rows(
    what: str, vmms: tuple[str, ...], runs: int, tell: Progress, once: Callable[[str], Figures]
) -> list[Row]:
    """`alternate` with `once(synic)`."""
    return alternate(what, vmms, runs, tell, lambda vmm: once(SYNICS[vmm]), HVKVM_USER)


def alternate(
    what: str, vmms: tuple[str, ...], runs: int, tell: Progress, once: Callable[[str], Figures], peer: str
) -> list[Row]:
    """Medians of `runs` of `once(vmm)` for each, alternating; a run that fails is told and left out."""
    from hvkvm.errors import HvkvmError

    found: dict[str, list[Figures]] = {vmm: [] for vmm in vmms}
    for run in range(runs):
        for vmm in vmms:
            try:
                figures = once(vmm)
            except (StepError, HvkvmError) as error:
                tell(f"bench: {what} {run + 1}/{runs} {vmm}: {error}")
                continue
            found[vmm].append(figures)
            (figure, unit), (value, _better) = next(iter(figures.items()))
            tell(f"bench: {what} {run + 1}/{runs} {vmm}: {figure} {value:.1f} {unit}")
    names = dict.fromkeys(
        (name, value[1]) for each in found.values() for f in each for name, value in f.items()
    )
    return [
        Row(
            *name,
            _middle(found.get(HVKVM, []), name),
            _middle(found.get(peer, []), name),
            better,
            peer,
        )
        for name, better in names
    ]


def _middle(runs: list[Figures], name: tuple[str, str]) -> float | None:
    return median(figures[name][0] for figures in runs) if runs else None
