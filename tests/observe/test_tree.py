"""Nested values as text: what is flat stays on a line, the rest is indented."""

from __future__ import annotations

from hvkvm.observe.tree import WIDTH, lines


def test_scalars_share_a_line() -> None:
    assert lines({"a": 1, "b": None, "c": True, "d": "", "e": 2.26, "f": [1, 2], "g": []}) == [
        "a 1, b none, c yes, d none, e 2.3, f 1 2, g none"
    ]


def test_a_number_that_names_something_is_no_value() -> None:
    assert lines({"in_flight": {0: 81, "1": 2}, "queues": {"1": "8 entries"}}) == [
        "in_flight: 0: 81, 1: 2",
        "queues: 1: 8 entries",
    ]


def test_what_is_nested_is_below() -> None:
    tree = {
        "rings": {"in": {"size": 1, "deep": {"x": 1, "y": {"z": 2}}}},
        "n": 1,
        "list": [{"name": "p", "at": {"b": 1}}, {"name": "q"}, {}, [1, [2]]],
        "none": {},
    }
    assert lines(tree) == [
        "n 1, none none",
        "rings:",
        "  in:",
        "    size 1",
        "    deep:",
        "      x 1",
        "      y: z 2",
        "list:",
        "  - name p",
        "    at: b 1",
        "  - name q",
        "  - 1 2",
    ]


def test_long_lines_wrap_between_values() -> None:
    found = lines({"outer": {f"name{n}": n for n in range(40)}})
    assert found[0] == "outer:"
    assert len(found) > 3
    assert all(len(line) <= WIDTH + 1 for line in found)
    text = " ".join(line.strip() for line in found[1:])
    assert text == ", ".join(f"name{n} {n}" for n in range(40))
