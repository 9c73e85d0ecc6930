"""What became of a matrix: one table, JUnit's XML and JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvkvm.testing.matrix.cases import FAILED, OK, SKIPPED, Case, Result, counts

SHOWN_LINES = 30
"""Of each stream of a case that failed."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def table(results: Mapping[int, Result], cases: Sequence[Case]) -> Iterator[str]:
    """A row for each case that has a result, and the counts."""
    axes = [axis for axis, _value in cases[0].place] if cases else []
    several = len({result.where for result in results.values()}) > 1
    head = [*map(str.upper, axes), "COMMAND", "RESULT", "SECONDS", "SYNIC", *(["WORKER"] if several else [])]
    rows = [head]
    for case in cases:
        result = results.get(case.number)
        if result is None:
            continue
        warm = ", warm" if result.warm else ""
        seconds = f"{result.seconds:.1f}{warm}" if result.status is not None else ""
        word = f"{result.verdict}: {result.why}" if result.why else result.verdict
        row = [value for _axis, value in case.place]
        rows.append([*row, case.name, word, seconds, result.synic, *([result.where] if several else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        yield "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
    yield summary(results)


def summary(results: Mapping[int, Result]) -> str:
    """One line."""
    found = counts(results.values())
    return f"{len(results)} cases: " + (", ".join(f"{n} {word}" for word, n in found.items()) or "none")


def shown(case: Case, result: Result) -> Iterator[str]:
    """What one would ask of a case that failed."""
    yield f"{case.title}: {result.verdict}: {result.why}"
    for name, text in (("output", result.output), ("standard error", result.errors)):
        lines = text.splitlines()
        if lines:
            left_out = len(lines) - SHOWN_LINES
            yield f"  {name}:" + (f" ({left_out} lines before)" if left_out > 0 else "")
            yield from (f"  | {_printable(line)}" for line in lines[-SHOWN_LINES:])


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in line)


def junit(results: Mapping[int, Result], cases: Sequence[Case], name: str) -> str:
    """JUnit's XML."""
    import xml.etree.ElementTree as ET

    done = [(case, results[case.number]) for case in cases if case.number in results]
    bad = sum(result.verdict not in (OK, SKIPPED, FAILED) for _case, result in done)
    failed = sum(result.verdict == FAILED for _case, result in done)
    skipped = sum(result.verdict == SKIPPED for _case, result in done)
    suite = ET.Element(
        "testsuite",
        name=_xml(name),
        hostname=os.uname().nodename,
        tests=str(len(done)),
        failures=str(failed),
        errors=str(bad),
        skipped=str(skipped),
        time=f"{sum(result.seconds for _case, result in done):.3f}",
    )
    for case, result in done:
        place = " ".join(f"{axis}={value}" for axis, value in case.place)
        one = ET.SubElement(
            suite,
            "testcase",
            classname=_xml(place or "matrix"),
            name=_xml(case.name),
            time=f"{result.seconds:.3f}",
        )
        facts = ET.SubElement(one, "properties")
        found = {
            **dict(case.place),
            "synic": result.synic,
            "warm": str(result.warm).lower(),
            "worker": result.where,
        }
        for key, value in found.items():
            ET.SubElement(facts, "property", name=_xml(key), value=_xml(value))
        if result.verdict == SKIPPED:
            ET.SubElement(one, "skipped", message=_xml(result.why))
        elif result.verdict != OK:
            kind = "failure" if result.verdict == FAILED else "error"
            ET.SubElement(one, kind, message=_xml(f"{result.verdict}: {result.why}"))
            ET.SubElement(one, "system-out").text = _xml(result.output)
            ET.SubElement(one, "system-err").text = _xml(result.errors)
    return ET.tostring(suite, encoding="unicode")


def _xml(text: str) -> str:
    """`text` without what XML cannot hold."""
    return _NOT_XML.sub("?", text)


def as_json(results: Mapping[int, Result], cases: Sequence[Case]) -> dict[str, Any]:
    """For programs: the counts, and each case with its place and result."""
    rows = []
    for case in cases:
        result = results.get(case.number)
        if result is not None:
            rows.append({"place": dict(case.place), "command": case.name, **result._asdict()})
    return {"counts": counts(results.values()), "cases": rows}
