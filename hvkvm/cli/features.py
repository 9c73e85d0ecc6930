"""`hvkvm features`: the enlightenments by QEMU's names, and which of them this host can back."""

from __future__ import annotations

from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.hyperv.enlightenments import ENLIGHTENMENTS
from hvkvm.hyperv.features import FeatureSet, HostFeatures, parse_features, resolve
from hvkvm.kvm.system import Kvm


def rows(host: HostFeatures) -> list[dict[str, Any]]:
    """One record for each enlightenment: name, what it is, what it requires, why it is missing (or None)."""
    return [
        {
            "name": f"hv-{row.name}",
            "summary": row.summary,
            "requires": [f"hv-{name}" for name in row.requires],
            "missing": host.missing(row),
        }
        for row in ENLIGHTENMENTS
    ]


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    parser = Parser(
        "hvkvm features",
        "List the Hyper-V enlightenments; with LIST, show what --hv LIST gives a guest here.",
    )
    parser.add_argument("list", nargs="?", metavar="LIST", help="as for hvkvm run --hv")
    parser.add_argument("--kvm", default="/dev/kvm", metavar="PATH", help="the KVM device (/dev/kvm)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    request = parse_features(options.list) if options.list is not None else None
    with Kvm(options.kvm) as kvm:
        host = HostFeatures.probe(kvm)
    chosen: FeatureSet | None = resolve(request, host) if request is not None else None
    if options.json:
        import json

        record = {"resolved": str(chosen)} if chosen is not None else {"features": rows(host)}
        print(json.dumps(record, indent=2))
    elif chosen is not None:
        print(chosen)
    else:
        _print_table(rows(host))
    return 0


def _print_table(table: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in table)
    for row in table:
        mark = "yes" if row["missing"] is None else "no "
        requires = f" (requires {', '.join(row['requires'])})" if row["requires"] else ""
        print(f"{mark}  {row['name']:{width}}  {row['summary']}{requires}")
    reasons = dict.fromkeys(
        str(row["missing"]).partition(" needs ")[2] for row in table if row["missing"] is not None
    )
    for reason in reasons:
        print(f"missing: {reason}")
