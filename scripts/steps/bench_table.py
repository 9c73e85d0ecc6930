"""The benchmark's outcome as rows: an aligned table for people, JSON for programs.

Called by `scripts/bench`. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from steps.bench_measure import Boot, Trips


class Row(NamedTuple):
    """One figure of two VMMs; `better` says which way is good: "less", "more" or "" for mere facts."""

    figure: str
    unit: str
    hvkvm: float | None
    peer: float | None
    better: str = "less"
    peer_name: str = "qemu"

    @property
    def ratio(self) -> float | None:
        """hvkvm over peer."""
        if self.hvkvm is None or not self.peer:
            return None
        return self.hvkvm / self.peer


def _middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def boot_rows(found: dict[str, list[Boot]], own: str) -> list[Row]:
    """Time and memory rows, hvkvm against each other machine."""
    rows: list[Row] = []
    measures: tuple[tuple[str, str, Callable[[Boot], float]], ...] = (
        ("process start to first init line", "ms", lambda boot: boot.seconds * 1000),
        ("guest's own uptime then", "ms", lambda boot: boot.uptime * 1000),
        ("memory beyond guest RAM, resident", "MiB", lambda boot: boot.memory.rss / 1024),
        ("memory beyond guest RAM, private", "MiB", lambda boot: boot.memory.private / 1024),
        ("guest RAM touched", "MiB", lambda boot: boot.memory.ram / 1024),
    )
    for figure, unit, pick in measures:
        mine = _middle([pick(boot) for boot in found[own]])
        better = "" if figure.startswith("guest") else "less"
        for name, boots in found.items():
            if name != own:
                rows.append(Row(figure, unit, mine, _middle([pick(boot) for boot in boots]), better, name))
    return rows


def trip_rows(operation: str, found: dict[str, list[Trips]], own: str, peer: str) -> list[Row]:
    """Rows of a round trip, or of port exits; one of the two may be missing."""

    def row(figure: str, unit: str, values: dict[str, float | None], better: str = "less") -> Row:
        return Row(figure, unit, values.get(own), values.get(peer), better, peer)

    def each(name: str) -> dict[str, float | None]:
        return {vmm: _middle([getattr(trips, name) for trips in runs]) for vmm, runs in found.items()}

    times = each("nanoseconds")
    rows = []
    if operation == "port":
        rates = {vmm: 1e9 / time if time else None for vmm, time in times.items()}
        rows.append(row("port exits a second", "1/s", rates, "more"))
    else:
        rows.append(row(f"{operation} round trip, median", "us", {k: _us(v) for k, v in times.items()}))
        best = {k: _us(v) for k, v in each("best").items()}
        rows.append(row(f"{operation} round trip, best batch", "us", best))
        if any(each("refused").values()):
            rows.append(row(f"{operation} refused before accepted", "/op", each("refused"), ""))
    rows.append(row(f"{operation}: exits from the guest (KVM's count)", "/op", each("kvm_exits"), ""))
    rows.append(row(f"{operation}: exits to the VMM", "/op", each("vmm_exits"), ""))
    return rows


def _us(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1000


def table(rows: list[Row]) -> str:
    """figure | hvkvm | the other | its name | ratio, aligned."""
    cells = [("figure", "hvkvm", "other", "", "hvkvm/other", "")]
    for row in rows:
        verdict = ""
        if row.better and row.ratio is not None:
            good = row.ratio <= 1 if row.better == "less" else row.ratio >= 1
            verdict = "better" if good else "worse"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append(
            (f"{row.figure} [{row.unit}]", _text(row.hvkvm), _text(row.peer), row.peer_name, ratio, verdict)
        )
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines = []
    for number, line in enumerate(cells):
        first, *rest = line
        parts = [first.ljust(widths[0])]
        for column, cell in enumerate(rest, 1):
            parts.append(cell.ljust(widths[column]) if column in (3, 5) else cell.rjust(widths[column]))
        lines.append("  ".join(parts).rstrip())
        if number == 0:
            lines.append("-" * len(lines[0]))
    return "\n".join(lines)


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def json_rows(rows: list[Row]) -> list[dict[str, object]]:
    """The rows for --json."""
    return [dict(row._asdict(), ratio=row.ratio) for row in rows]
