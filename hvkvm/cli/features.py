"""`hvkvm features`: the enlightenments by QEMU's names, and who can back them here: KVM, or user space."""

from __future__ import annotations

from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.cli.output import show
from hvkvm.hyperv.enlightenments import ENLIGHTENMENTS
from hvkvm.hyperv.features import FeatureSet, HostFeatures, parse_features, resolve
from hvkvm.hyperv.usermode.features import Choice, choose, for_user_synic, lacks_for_user, user_host
from hvkvm.kvm.system import Kvm
from hvkvm.machine.config import WHO
from hvkvm.machine.vcpus import guest_features


def rows(kernel: HostFeatures, user: HostFeatures, lacking: str) -> list[dict[str, Any]]:
    """One record for each enlightenment: its name, what it is, what it requires, and who misses it, why.

    "missing" is about KVM, "user_missing" about the SynIC in user space, for
    which this KVM is `lacking` a capability or "". None is for: can be had.
    """
    absent = f"needs {lacking}, which this kernel's KVM lacks; use Linux 5.10 or newer" if lacking else None
    return [
        {
            "name": f"hv-{row.name}",
            "summary": row.summary,
            "requires": [f"hv-{name}" for name in row.requires],
            "missing": kernel.missing(row),
            "user_missing": f"hv-{row.name} {absent}" if absent else user.missing(row),
            "on_demand": row.name in kernel.on_demand,
            "user_on_demand": row.name in user.on_demand,
        }
        for row in ENLIGHTENMENTS
    ]


def parser() -> Parser:
    """The options."""
    p = Parser(
        "hvkvm features",
        "List the Hyper-V enlightenments, and whether KVM and the SynIC in user space can back them;"
        " with LIST, show what --hv LIST gives a guest here.",
    )
    p.add_argument("list", nargs="?", metavar="LIST", help="as for hvkvm run --hv")
    p.add_argument("--synic", choices=WHO, default="auto", help="as for hvkvm run, with LIST (auto)")
    p.add_argument("--kvm", default="/dev/kvm", metavar="PATH", help="the KVM device (/dev/kvm)")
    p.add_argument("--json", action="store_true", help="print JSON")
    return p


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parser().parse_args(arguments)
    request = parse_features(options.list) if options.list is not None else None
    with Kvm(options.kvm) as kvm:
        cpu = guest_features(kvm)
        choice = choose(kvm, options.synic if request is not None else "auto").for_cpu(cpu)
        lacking = lacks_for_user(kvm)
        kernel, user = (host._replace(cpu=cpu) for host in (HostFeatures.probe(kvm), user_host(kvm)))
        table = rows(kernel, user, lacking)
    chosen: FeatureSet | None = None
    if request is not None:
        chosen = resolve(request, choice.host)
        if choice.synic == "user":
            chosen = for_user_synic(chosen)
    if options.json:
        import json

        synic = {"synic": choice.synic, "why": choice.why}
        record = {"resolved": str(chosen)} if chosen is not None else {"features": table}
        show(json.dumps(record | synic, indent=2))
    elif chosen is not None:
        show(str(chosen))
    else:
        show(_table(table, choice, lacking))
    return 0


def _table(table: list[dict[str, Any]], choice: Choice, lacking: str) -> str:
    width = max(len(row["name"]) for row in table)
    lines = ["kvm  user"]
    for row in table:
        kernel, user = ("yes" if row[key] is None else "no" for key in ("missing", "user_missing"))
        notes = [f"requires {', '.join(row['requires'])}"] if row["requires"] else []
        for who, on_demand, missing in (
            ("kvm", "on_demand", "missing"),
            ("user", "user_on_demand", "user_missing"),
        ):
            if row[on_demand] and row[missing] is None:
                notes.append(f"{who}: not in host-model, name it")
        suffix = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{kernel:3}  {user:4}  {row['name']:{width}}  {row['summary']}{suffix}")
    reasons = (str(row["missing"]).partition(" needs ")[2] for row in table if row["missing"] is not None)
    lines += [f"missing, kvm: {reason}" for reason in dict.fromkeys(reasons)]
    if lacking:
        lines.append(f"missing, user: {lacking}, which this kernel's KVM lacks; use Linux 5.10 or newer")
    elif any(row["user_missing"] for row in table):
        lines.append("missing, user: not emulated; use --synic kernel on a KVM that has it, or leave it out")
    lines.append(f"--synic auto: {choice.synic}, because {choice.why}")
    return "\n".join(lines)
