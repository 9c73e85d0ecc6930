"""`hvkvm top`: what a running VM does, second by second: exits, rings, disks, network.

On a terminal one picture that is drawn again, until Ctrl-C or the VM's end; else a block
of lines each time. Asks by the VM's control socket, so the guest is never stopped.
"""

from __future__ import annotations

import os
import sys
from time import monotonic, sleep
from typing import Any

from hvkvm.cli.arguments import Parser
from hvkvm.cli.output import show
from hvkvm.errors import ConfigError, VmGone

EPILOG = """examples:
  hvkvm top
  hvkvm top --vm demo --interval 5
  hvkvm top --count 3
"""
ASK_SECONDS = 5.0
MAX_REASONS = 4
MAX_RATES = 12
"""Counters shown of one device."""
CLEAR = "\x1b[H\x1b[2J"


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm top", "Show what a running VM does, second by second.", EPILOG)
    p.add_argument("--vm", metavar="NAME|PID|PATH", help="which, when there are several")
    p.add_argument("--interval", metavar="SECONDS", default="1", help="between two looks (1)")
    p.add_argument("--count", metavar="N", help="end after so many (until the VM ends, or Ctrl-C)")
    return p


def parse(arguments: list[str]) -> Any:
    """The checked options. ConfigError."""
    options = parser().parse_args(arguments)
    interval, count = options.interval, options.count
    try:
        options.interval = float(interval)
    except ValueError:
        raise ConfigError(f"--interval {interval}: not a number; write one, such as --interval 2") from None
    if not 0.05 <= options.interval <= 3600:
        raise ConfigError(f"--interval {interval}: not 0.05 to 3600 seconds; choose one of them")
    if count is not None:
        if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count)):
            raise ConfigError(f"--count {count}: not a number from 1 on; write one, such as --count 10")
        options.count = int(count)
    return options


class Look:
    """What the VM says of itself at one moment."""

    def __init__(self, info: dict[str, Any], inspect: dict[str, Any]) -> None:
        self.at = monotonic()
        self.info = info
        self.inspect = inspect

    @property
    def channels(self) -> dict[str, dict[str, Any]]:
        """Each open channel by its name, with its sub-channel's index."""
        found = {}
        for channel in (self.inspect.get("vmbus") or {}).get("channels", ()):
            if channel.get("open"):
                index = channel["sub_channel_index"]
                found[f"{channel['name']}{f'.{index}' if index else ''}"] = channel["open"]
        return found

    @property
    def counters(self) -> dict[str, dict[str, float]]:
        """Every number of every device, by the device and by its name."""
        found: dict[str, dict[str, float]] = {}
        pci = self.inspect.get("pci") or {}
        on_pci = {
            f"{kind}{slot}": one for kind in ("nvme", "virtio") for slot, one in pci.get(kind, {}).items()
        }
        for area in (self.inspect.get("devices"), self.inspect.get("network"), on_pci):
            for name, values in (area or {}).items():
                found.setdefault(name, {}).update(_numbers(values))
        return found


def _numbers(values: Any, prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    if isinstance(values, dict):
        for key, value in values.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if isinstance(value, dict | list):
                found.update(_numbers(value, name))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = value
    elif isinstance(values, list):
        for index, value in enumerate(values):
            found.update(_numbers(value, f"{prefix}[{index}]"))
    return found


def lines(before: Look, now: Look) -> list[str]:
    """The picture: rates are of the time between two looks."""
    seconds = max(now.at - before.at, 1e-6)
    info = now.info
    bus = info["vmbus_version"] or "not connected"
    head = f"{info['name']}: up {info['uptime']:.0f} s, {info['resets']} resets"
    found = [f"{head}, SynIC {info['synic'] or 'none'}, VMBus {bus}"]
    found += _vcpus(before, now, seconds)
    found += _channels(before, now, seconds)
    found += _devices(before, now, seconds)
    return found


def _vcpus(before: Look, now: Look, seconds: float) -> list[str]:
    found = [f"{'VCPU':10} {'EXITS/S':>9}  STATE, REASONS A SECOND"]
    for old, new in zip(before.inspect["vcpus"], now.inspect["vcpus"], strict=False):
        rates = {
            reason.removeprefix("KVM_EXIT_"): (count - old["exits"].get(reason, 0)) / seconds
            for reason, count in new["exits"].items()
        }
        top = sorted(rates.items(), key=lambda entry: -entry[1])[:MAX_REASONS]
        reasons = ", ".join(f"{reason} {_rate(rate)}" for reason, rate in top if rate > 0)
        total = _rate(sum(rates.values()))
        found.append(f"{new['name']:10} {total:>9}  {new['state']}{f': {reasons}' if reasons else ''}")
    return found


def _channels(before: Look, now: Look, seconds: float) -> list[str]:
    old = before.channels
    found = []
    for name, channel in now.channels.items():
        last = old.get(name)
        if last is None:
            continue
        ways = []
        for way in ("from_guest", "to_guest"):
            packets = (channel[way]["packets"] - last[way]["packets"]) / seconds
            size, free = channel[way]["size"], channel[way]["free"]
            used = "?" if free is None else f"{100 * (size - free) // size}%"
            ways.append(f"{_rate(packets):>9} {used:>5}")
        signals = _rate((channel["signals"] - last["signals"]) / seconds)
        found.append(f"{name[:24]:24} {' '.join(ways)} {signals:>9}")
    head = f"{'CHANNEL':24} {'FROM/S':>9} {'FULL':>5} {'TO/S':>9} {'FULL':>5} {'IRQS/S':>9}"
    return [head, *found] if found else []


def _devices(before: Look, now: Look, seconds: float) -> list[str]:
    old, found = before.counters, []
    for name, counters in now.counters.items():
        rates = {
            key: (value - old.get(name, {}).get(key, value)) / seconds for key, value in counters.items()
        }
        moving = [f"{key} {_rate(rate)}" for key, rate in rates.items() if rate > 0][:MAX_RATES]
        if moving:
            found.append(f"{name[:24]:24} {', '.join(moving)}")
    return [f"{'DEVICE':24} COUNTS A SECOND", *found] if found else []


def _rate(value: float) -> str:
    """A number of at most five characters or so."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{value / scale:.1f}{unit}"
    return f"{value:.1f}" if value < 100 and value != int(value) else f"{value:.0f}"


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    from hvkvm.cli.ctl_client import find

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with find(options.vm) as vm:

        def look() -> Look:
            return Look(vm.ask("info", ASK_SECONDS), vm.ask("inspect", ASK_SECONDS))

        before = look()
        shown = 0
        while options.count is None or shown < options.count:
            sleep(options.interval)
            try:
                now = look()
            except VmGone:
                show("the VM has ended")
                return 0
            picture = "\n".join(_fit(lines(before, now)) if terminal else lines(before, now))
            show(f"{CLEAR}{picture}" if terminal else f"{picture}\n")
            before, shown = now, shown + 1
    return 0


def _fit(picture: list[str]) -> list[str]:
    from hvkvm.cli.front import window_size

    rows, columns = window_size()
    return [line[: columns - 1] for line in picture[: max(1, rows - 1)]]
