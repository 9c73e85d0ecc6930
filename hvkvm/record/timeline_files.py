"""A `timeline.Timeline` as a file: Chrome's trace format, or SVG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

from hvkvm.record.timeline import Sample, Span, Timeline

WIDTH = 1200
LEFT = 150
ROW = 18
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
_PID = 1
_PHASES, _BUS, _CHANNELS = 1, 2, 10


def chrome(timeline: Timeline) -> dict[str, Any]:
    """As the trace format's JSON object; times in microseconds since the beginning."""

    def us(at: float) -> int:
        return round((at - timeline.begin) * 1e6)

    def span(one: Span, tid: int) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": one.name,
            "pid": _PID,
            "tid": tid,
            "ts": us(one.begin),
            "dur": us(one.end) - us(one.begin),
        }

    events: list[dict[str, Any]] = [_name("process_name", 0, "hvkvm"), _name("thread_name", _PHASES, "boot")]
    events += [span(one, _PHASES) for one in timeline.phases]
    events.append(_name("thread_name", _BUS, "VMBus messages"))
    events += [
        {
            "ph": "i",
            "s": "t",
            "name": one.name,
            "pid": _PID,
            "tid": _BUS,
            "ts": us(one.at),
            "args": {"from": "guest" if one.to_host else "host"},
        }
        for one in timeline.instants
    ]
    for row, (name, spans) in enumerate(_by_name(timeline).items()):
        events.append(_name("thread_name", _CHANNELS + row, f"channel {name}"))
        events += [span(one, _CHANNELS + row) for one in spans]
    reasons = _reasons(timeline)
    for sample in timeline.samples:
        for index, exits in enumerate(sample.exits):
            args = {reason: exits.get(reason, 0) for reason in reasons[index]}
            events.append(
                {"ph": "C", "name": f"exits vcpu{index}", "pid": _PID, "ts": us(sample.at), "args": args}
            )
    moved = _moved(timeline)
    for before, sample in _pairs(timeline):
        for device, ways in moved.items():
            seconds = max(sample.at - before, 1e-3)
            args = {way: round(sample.moved.get(f"{device} {way}", 0) / seconds) for way in ways}
            events.append(
                {"ph": "C", "name": f"{device} bytes/s", "pid": _PID, "ts": us(sample.at), "args": args}
            )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"lost": timeline.lost}}


def _name(kind: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": tid, "args": {"name": name}}


def _by_name(timeline: Timeline) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in timeline.spans:
        found.setdefault(span.name, []).append(span)
    return found


def _reasons(timeline: Timeline) -> list[list[str]]:
    """Of each vCPU, those that came at all."""
    count = max((len(sample.exits) for sample in timeline.samples), default=0)
    return [sorted({reason for s in timeline.samples for reason in s.exits[index]}) for index in range(count)]


def _moved(timeline: Timeline) -> dict[str, list[str]]:
    """Each device that moved bytes, and the directions in which it did."""
    found: dict[str, list[str]] = {}
    for name in sorted({name for sample in timeline.samples for name in sample.moved}):
        device, _, way = name.rpartition(" ")
        found.setdefault(device, []).append(way)
    return found


def svg(timeline: Timeline) -> str:
    """As a picture of its own: phases on top, exits of each vCPU, disks and NICs, messages, channels."""
    rows = list(_rows(timeline))
    height = ROW * 2 + sum(size for size, _ in rows)
    seconds = max(timeline.end - timeline.begin, 1e-6)
    size_of_all = f'width="{LEFT + WIDTH + 20}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size_of_all} font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="{height}" fill="white"/>',
    ]
    top = ROW
    for tick in range(11):
        x = LEFT + WIDTH * tick / 10
        parts.append(f'<line x1="{x:.0f}" y1="{top}" x2="{x:.0f}" y2="{height}" stroke="#ddd"/>')
        parts.append(f'<text x="{x + 2:.0f}" y="12" fill="#555">{seconds * tick / 10:.2f} s</text>')
    for size, drawn in rows:
        parts.append(f'<g transform="translate(0,{top})">{drawn}</g>')
        top += size
    return "\n".join([*parts, "</svg>", ""])


def _rows(timeline: Timeline) -> Iterator[tuple[int, str]]:
    """Heights, and what is drawn in them."""

    def x(at: float) -> float:
        return LEFT + WIDTH * (at - timeline.begin) / max(timeline.end - timeline.begin, 1e-6)

    def bar(one: Span, colour: str) -> str:
        width = max(1.0, x(one.end) - x(one.begin))
        times = f"{one.begin - timeline.begin:.3f} to {one.end - timeline.begin:.3f} s"
        place = f'x="{x(one.begin):.1f}" y="2" width="{width:.1f}" height="{ROW - 4}"'
        return f'<rect {place} fill="{colour}"><title>{escape(one.name)}: {times}</title></rect>'

    phases = []
    for index, one in enumerate(timeline.phases):
        phases.append(bar(one, _COLOURS[index % len(_COLOURS)]))
        phases.append(f'<text x="{x(one.begin) + 3:.1f}" y="13" fill="white">{escape(one.name)}</text>')
    yield ROW, _label("boot") + "".join(phases)
    for index, reasons in enumerate(_reasons(timeline)):
        yield 3 * ROW, _exits(timeline, index, reasons, x)
    for device, ways in _moved(timeline).items():
        yield 2 * ROW, _bytes(timeline, device, ways, x)
    if timeline.instants:
        ticks = "".join(
            f'<line x1="{x(one.at):.1f}" y1="3" x2="{x(one.at):.1f}" y2="{ROW - 3}"'
            f' stroke="{_COLOURS[0 if one.to_host else 1]}"><title>{one.name}</title></line>'
            for one in timeline.instants
        )
        yield ROW, _label("VMBus messages") + ticks
    for index, (name, spans) in enumerate(_by_name(timeline).items()):
        yield ROW, _label(name) + "".join(bar(one, _COLOURS[index % len(_COLOURS)]) for one in spans)


def _exits(timeline: Timeline, index: int, reasons: list[str], x: Any) -> str:
    """Exits a second, one reason on the other."""
    rates = [_rates(sample, before, index) for before, sample in _pairs(timeline)]
    most = max((sum(rate.values()) for rate in rates), default=0.0) or 1.0
    bars = _stacked(timeline, rates, reasons, most, 3 * ROW - 4, x)
    return _label(f"vcpu{index}: {most:.0f} exits/s") + bars


def _bytes(timeline: Timeline, device: str, ways: list[str], x: Any) -> str:
    """Bytes a second of a device, one direction on the other."""
    rates = [
        {way: sample.moved.get(f"{device} {way}", 0) / max(sample.at - before, 1e-3) for way in ways}
        for before, sample in _pairs(timeline)
    ]
    most = max((sum(rate.values()) for rate in rates), default=0.0) or 1.0
    bars = _stacked(timeline, rates, ways, most, 2 * ROW - 4, x)
    return _label(f"{device}: {most / 1e6:.1f} MB/s") + bars


def _stacked(
    timeline: Timeline, rates: list[dict[str, float]], names: list[str], most: float, high: int, x: Any
) -> str:
    """Bars for each sample, one name on the other; `most` is as high as `high`."""
    drawn = []
    for number, reason in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        for (before, sample), rate in zip(_pairs(timeline), rates, strict=True):
            value = rate.get(reason, 0.0)
            if value:
                below = sum(rate.get(other, 0.0) for other in names[:number])
                y, size = high * (1 - (below + value) / most) + 2, high * value / most
                left, width = x(before), max(0.5, x(sample.at) - x(before))
                place = f'x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{size:.1f}"'
                title = f"<title>{escape(reason)}: {value:.0f}/s</title>"
                drawn.append(f'<rect {place} fill="{colour}">{title}</rect>')
    return "".join(drawn)


def _pairs(timeline: Timeline) -> list[tuple[float, Sample]]:
    """Each sample with the time of the one before."""
    times = [timeline.marks.get("kernel", timeline.begin), *(sample.at for sample in timeline.samples)]
    return list(zip(times, timeline.samples, strict=False))


def _rates(sample: Sample, before: float, index: int) -> dict[str, float]:
    seconds = max(sample.at - before, 1e-3)
    return {reason: count / seconds for reason, count in sample.exits[index].items()}


def _label(text: str) -> str:
    return f'<text x="4" y="13">{escape(text[:24])}</text>'
