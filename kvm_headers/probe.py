#!/usr/bin/env python3
"""Ask the C compiler what <linux/kvm.h> says, and hold hvkvm's declarations against it.

The names come from `hvkvm.abi` (every struct with its fields, every ioctl
request, every constant); the values never do: a generated C program prints
them. `layout.json` keeps the answer as the golden table that the tier-1 tests
compare with where no compiler or header is at hand.

    probe.py            print what these headers say, as JSON
    probe.py --check    compare with layout.json; exit 1 and name each difference
    probe.py --write    rewrite layout.json

Headers differ in age. A name they lack is listed, and is no failure: the table
keeps what other headers said, or lists the name under "absent" until newer
headers are met. CC chooses the compiler, CFLAGS may point it at other headers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE / "layout.json"
HEADERS = ("stddef.h", "stdio.h", "linux/kvm.h", "linux/kvm_para.h", "linux/version.h")

Layout = dict[str, Any]
Item = tuple[str, ...]  # ("size", path) | ("field", path, name) | ("request"|"constant", name)


def declared() -> tuple[dict[str, dict[str, bool]], list[str], list[str]]:
    """What hvkvm declares: structs (C path -> field -> is it a flexible array), requests, constants."""
    sys.path.insert(0, str(HERE.parent))
    from hvkvm.abi import kvm, kvm_cpu_structs, kvm_requests, kvm_run_struct, kvm_structs

    structs: dict[str, dict[str, bool]] = {}
    for module in (kvm_cpu_structs, kvm_run_struct, kvm_structs):
        for name, kind in vars(module).items():
            if name.startswith("kvm_") and isinstance(kind, type):
                structs[name.replace("__", ".")] = dict(fields_of(kind))
    constants = [name for name, value in vars(kvm).items() if name.isupper() and isinstance(value, int)]
    return structs, list(kvm_requests.REQUESTS), constants


def fields_of(kind: Any) -> list[tuple[str, bool]]:
    """Field names of a ctypes struct or union, those of anonymous members included."""
    found = []
    for name, field_type, *_ in kind._fields_:
        if name in getattr(kind, "_anonymous_", ()):
            found += fields_of(field_type)
        elif not name.startswith("_"):  # a leading underscore: no name in C
            found.append((name, issubclass(field_type, ctypes.Array) and field_type._length_ == 0))
    return found


def program(items: dict[Item, str]) -> tuple[str, dict[int, Item]]:
    """The C program, one item a line, and which line holds which item."""
    lines = [f"#include <{header}>" for header in HEADERS]
    lines.append('#define SAY(value) printf("%llu\\n", (unsigned long long)(value))')
    lines.append("int main(void) {")
    where = {}
    for item, expression in items.items():
        lines.append(f"SAY({expression});")
        where[len(lines)] = item
    lines.append("return 0; }")
    return "\n".join(lines) + "\n", where


def ask(items: dict[Item, str]) -> dict[Item, int]:
    """Compile and run, leaving out the lines the compiler rejects. Raises SystemExit if it rejects others."""
    compiler = [os.environ.get("CC", "cc"), *shlex.split(os.environ.get("CFLAGS", ""))]
    items = dict(items)
    with tempfile.TemporaryDirectory() as scratch:
        source, binary = Path(scratch, "probe.c"), Path(scratch, "probe")
        while True:
            text, where = program(items)
            source.write_text(text)
            done = subprocess.run(
                [*compiler, "-w", "-o", str(binary), str(source)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                break
            rejected = {int(n) for n in re.findall(r"probe\.c:(\d+):\d+: error", done.stderr)} & where.keys()
            if not rejected:
                raise SystemExit(f"probe: the compiler failed on more than a missing name:\n{done.stderr}")
            for line in rejected:
                del items[where[line]]
        out = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    return dict(zip(items, map(int, out.split()), strict=True))


def path_expressions(path: str) -> tuple[str, str]:
    """For `kvm_run.io`: the object `((struct kvm_run *)0)->io`, and how offsetof starts inside kvm_run."""
    top, _, rest = path.partition(".")
    whole = f"(*(struct {top} *)0)"
    return (f"{whole}.{rest}", rest + ".") if rest else (whole, "")


def probe() -> Layout:
    """What these headers say about everything hvkvm declares; names they lack are under "absent"."""
    structs, requests, constants = declared()
    items: dict[Item, str] = {("size", "version"): "LINUX_VERSION_CODE"}
    for path, fields in structs.items():
        whole, inner = path_expressions(path)
        top = path.partition(".")[0]
        base = f"offsetof(struct {top}, {inner[:-1]})" if inner else "0"
        items["size", path] = f"sizeof({whole})"
        for name, flexible in fields.items():
            items["offset", path, name] = f"offsetof(struct {top}, {inner}{name}) - {base}"
            if not flexible:
                items["width", path, name] = f"sizeof({whole}.{name})"
    items |= {("request", name): name for name in requests}
    items |= {("constant", name): name for name in constants}
    answer = ask(items)

    version = answer["size", "version"]
    layout: Layout = {
        "headers": f"{version >> 16}.{version >> 8 & 255}.{version & 255}",
        "structs": {},
        "requests": {n: f"{answer['request', n]:#x}" for n in requests if ("request", n) in answer},
        "constants": {n: answer["constant", n] for n in constants if ("constant", n) in answer},
        "absent": [n for n in requests if ("request", n) not in answer]
        + [n for n in constants if ("constant", n) not in answer],
    }
    for path, fields in structs.items():
        if ("size", path) not in answer:
            layout["absent"].append(path)
            continue
        rows = {}
        for name in fields:
            if ("offset", path, name) in answer:
                rows[name] = [answer["offset", path, name], answer.get(("width", path, name), 0)]
            else:
                layout["absent"].append(f"{path}.{name}")
        layout["structs"][path] = {"size": answer["size", path], "fields": rows}
    layout["absent"] = sorted(set(layout["absent"]))
    return layout


def rows_of(layout: Layout) -> dict[str, Any]:
    """A layout as flat rows: `kvm_run size`, `kvm_run.exit_reason`, `KVM_RUN`."""
    rows: dict[str, Any] = {**layout["requests"], **layout["constants"]}
    for path, struct in layout["structs"].items():
        rows[f"{path} size"] = struct["size"]
        rows |= {f"{path}.{name}": place for name, place in struct["fields"].items()}
    return rows


def compare(golden: Layout, here: Layout) -> tuple[list[str], list[str]]:
    """Differences (the table is wrong or stale) and notes (these headers are older or newer)."""
    table, said = rows_of(golden), rows_of(here)
    lacking = set(here["absent"])
    differences, notes = [], []
    for name, value in said.items():
        if name not in table and name.removesuffix(" size") in golden["absent"]:
            notes.append(f"{name} is {value} in these headers; the table has it as absent (--write adds it)")
        elif name not in table:
            differences.append(f"{name} is {value} in these headers and not in the table")
        elif table[name] != value:
            differences.append(f"{name} is {value} in these headers and {table[name]} in the table")
    for name in table.keys() - said.keys():
        parents = name.removesuffix(" size").split(".")
        if any(".".join(parents[:n]) in lacking for n in range(1, len(parents) + 1)):
            notes.append(f"{name} is not in these headers")
        else:
            differences.append(f"{name} is in the table and no longer declared")
    known = {name.removesuffix(" size") for name in table}
    for name in lacking - set(golden["absent"]) - known:
        differences.append(f"{name} is declared, and neither in these headers nor in the table")
    return sorted(differences), sorted(notes)


def merged(golden: Layout, here: Layout) -> Layout:
    """`here`, with the rows that other headers gave for names these ones lack."""
    lacking = set(here["absent"])
    for kind in ("requests", "constants", "structs"):
        here[kind] |= {n: row for n, row in golden[kind].items() if n in lacking}
    for path, struct in here["structs"].items():
        old = golden["structs"].get(path, {"fields": {}})["fields"]
        struct["fields"] |= {n: place for n, place in old.items() if f"{path}.{n}" in lacking}
    known = {name.removesuffix(" size") for name in rows_of(here)}
    here["absent"] = [name for name in here["absent"] if name not in known]
    return here


def dumped(layout: Layout) -> str:
    """JSON with one struct, field or name a line, so that a diff reads well."""
    text = json.dumps(layout, indent=1)
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with layout.json; exit 1 on a difference"
    )
    parser.add_argument("--write", action="store_true", help="rewrite layout.json")
    options = parser.parse_args()
    here = probe()
    golden = json.loads(TABLE.read_text()) if TABLE.exists() else None
    if options.write:
        TABLE.write_text(dumped(merged(golden, here) if golden else here))
    elif options.check:
        if golden is None:
            raise SystemExit("probe: there is no layout.json; make it with --write")
        differences, notes = compare(golden, here)
        for line in notes:
            print(f"note: {line}")
        for line in differences:
            print(f"difference: {line}")
        print(
            f"{len(rows_of(here))} rows against headers {here['headers']}:"
            f" {len(differences)} differences, {len(notes)} notes"
        )
        return 1 if differences else 0
    else:
        print(dumped(here), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
