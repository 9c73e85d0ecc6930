"""What `hvkvm ctl` prints for people, and its verbs in a line each. Texts of the guest are made harmless."""

from __future__ import annotations

from typing import Any

from hvkvm.errors import harmless
from hvkvm.observe.bus_text import inspect_lines

SUMMARY = {
    "list": "List the VMs that run, and forget those that are dead.",
    "info": "Show a VM's configuration, enlightenments, up time, resets and exits.",
    "inspect": "Show channels, rings, routes, GPADLs and devices as they are now.",
    "dump": "Show who waits for what, as SIGQUIT prints it.",
    "shutdown": "Ask the guest to power off.",
    "reboot": "Ask the guest to reboot.",
    "hibernate": "Ask the guest to hibernate.",
    "heartbeat": "Ask whether the guest's heartbeat is heard; exit status 1 if not.",
    "time": "Set the guest's clock to the host's, or tell what the guest was told.",
    "keys": "Type on the synthetic keyboard, or press keys together.",
    "break": "Send a break on the serial console, which Linux takes for the SysRq key.",
    "nmi": "Send a non-maskable interrupt, as a server's NMI button does.",
    "save": "Write the whole VM to FILE; `hvkvm run --restore FILE` goes on from there.",
    "dmesg": "Show a Linux guest's kernel log, read from its RAM: also of a guest that hangs.",
    "screenshot": "Write what the guest's framebuffer shows to FILE.png.",
    "net": "List NICs and what went over them; add and remove them, and pull their cables.",
    "kvp": "Read and write the pools of key-value exchange.",
    "freeze": "Freeze the guest's file systems, for a snapshot of its disks.",
    "thaw": "Thaw the guest's file systems.",
    "disk": "Look at a VM's disks and DVD drives; add, remove, resize them, change their media.",
    "quit": "End the run now, as Ctrl-a x on the console does.",
}


def harmless_lines(text: str) -> str:
    """`harmless`, of several lines."""
    return "\n".join(map(harmless, text.split("\n")))


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def vm_list(found: list[dict[str, Any]]) -> str:
    """A table."""
    if not found:
        return "no VM is running"
    rows = [("NAME", "PID", "UP", "RESETS", "KERNEL")]
    for vm in found:
        if "error" in vm:
            rows.append((vm["name"], str(vm.get("pid", "?")), "?", "?", vm["error"]))
        else:
            started = vm["kernel"] or f"firmware {vm['firmware']}"
            rows.append((vm["name"], str(vm["pid"]), _seconds(vm["uptime"]), str(vm["resets"]), started))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def info(result: dict[str, Any]) -> str:
    """A line a fact; of the configuration what is not empty."""
    facts = {key: value for key, value in result.items() if not isinstance(value, dict)}
    facts["uptime"] = _seconds(result["uptime"])
    exits = sorted(result["exits"].items(), key=lambda item: -item[1])
    facts["exits"] = ", ".join(f"{name.removeprefix('KVM_EXIT_')} {count}" for name, count in exits)
    facts |= {f"config.{k}": v for k, v in result["config"].items() if v not in (None, "", [])}
    width = max(map(len, facts))
    return "\n".join(f"{key:{width}}  {_plain(value)}" for key, value in facts.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return "none" if value in (None, "") else str(value)


def inspect(result: dict[str, Any]) -> str:
    """A line for each vCPU, route and channel, and one for each ring."""
    return "\n".join(map(harmless, inspect_lines(result)))


def ended(result: dict[str, Any]) -> str:
    """How the wait ended."""
    if "ending" not in result:
        return f"the guest was reset ({result['resets']} resets)"
    if "status" not in result:
        return "the run has ended"
    return f"the run has ended: {result['ending']}, status {result['status']}"


def heartbeat(result: dict[str, Any]) -> str:
    """One line."""
    if result["alive"]:
        return f"alive, {result['beats']} heartbeats"
    return f"no heartbeat: {result['beats']} answered, the last question {result['missed']} intervals ago"


def time(result: dict[str, Any]) -> str:
    """One line each for the host and for what the guest was told."""
    from time import gmtime, strftime

    sent = result["sent"]
    driver = f"driver version {result['version']}" if result["driver"] else "no driver in the guest"
    host = strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(result["host"]))
    return (
        f"host {host}\nguest: {driver}; told to set its clock {sent['sync']} times, {sent['sample']} samples"
    )


def dmesg(lines: list[tuple[float, str]]) -> str:
    """A line each, as dmesg prints them."""
    from hvkvm.observe.kernel_log import Line

    return "\n".join(str(Line(seconds, text)) for seconds, text in lines)


def screenshot(result: dict[str, Any]) -> str:
    """One line."""
    return f"{result['width']} x {result['height']} pixels in {harmless(result['file'])}"


def nmi(result: dict[str, Any]) -> str:
    """One line."""
    cpus = result["cpus"]
    return f"NMI sent to vCPU {cpus[0]}" if len(cpus) == 1 else f"NMI sent to {len(cpus)} vCPUs"


def kvp(what: str, result: dict[str, Any]) -> list[str]:
    """The value alone for a get; a pair a line for a list; nothing where nothing was asked for."""
    if what == "get":
        return [harmless(str(value)) for _key, value in result["pairs"]]
    return [f"{harmless(key)}={harmless(str(value))}" for key, value in result["pairs"]]


def snapshot(result: dict[str, Any]) -> str:
    """One line."""
    return f"the guest's file systems are {result['state']}"
