"""Names that nobody uses, for `make check`: functions, methods, classes, constants, code never reached.

Two questions, by vulture: what does nobody use at all, and what do only the tests use? A test keeps
dead code alive, so the second counts as well, but for what is there for those who use the library
(`FOR_USERS`), or has to be seen (`FOR_LOOKING`).

    python scripts/steps/dead_code.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from vulture import Vulture  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("hvkvm", "scripts", "kvm_headers")
LAYOUTS = ("hvkvm/abi/", "hvkvm/block/nbd/wire.py", "hvkvm/devices/scsi/mode.py")
"""Numbers and layouts as their headers have them, whole, whoever uses which."""
DRIVERS = ("hvkvm/testing/",)
"""Guests' drivers and stand-ins, for tests, ours and others'."""

BY_NAME = (
    "pytest_*",
    "on_files",
    "__getattr__",
    "__dir__",
    "teardown",
    "do_*",
    "*Spec",
    "tiny_switch_interval",
    "no_leaks",
)
"""What pytest, mkdocs, Python, hypothesis, the fuzzer (`do_`) and the configuration ask for by name."""
DECORATORS = ("@pytest.fixture*", "@rule*", "@invariant*", "@initialize*", "@precondition*")

FOR_USERS = {
    "press": "a key of the guest's keyboard, pressed or released alone",
    "press_power_button": "the machine's power button",
    "add_eventfd": "an event connection with an eventfd of the caller's own",
    "get_directly": "a value of the guest's key-value daemon, asked for by its key",
    "ip_info": "the guest's addresses, as its key-value daemon has them",
    "set_ip_info": "and given to it",
    "from_toml": "the machine of a --config file, in a program",
    "io_data": "the data of an exit, for who enters a vCPU by hand",
    "write_u64": "a word of guest memory, beside those that devices of ours write",
}
"""What only tests use here, and who else may."""
FOR_LOOKING = {
    "ACPI_FADT_POWER_BUTTON": "a bit that has to stay clear",
    "CANNOT_CONNECT": "the exit status of a program whose source is machine code",
    "all_parsers": "every option that there is",
    "auto_eoi_waiting": "interrupts that wait",
    "gsis": "lines that are taken: tests count them",
    "paused": "whether vCPUs stand still",
    "staged": "whether a packet has yet to be published",
    "zone_is_open": "whether KVM queues writes now",
}
"""By what tests see state that has no other face."""

KINDS = {"function", "method", "class", "property", "unreachable_code"}


class Found:
    """One name, where it stands."""

    def __init__(self, path: Path, line: int, name: str, kind: str) -> None:
        self.path = path.relative_to(ROOT).as_posix()
        self.line = line
        self.name = name
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind} {self.name}"


def sources(folders: Iterable[str]) -> list[str]:
    """Every Python file, those without a suffix too."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix == ".py" or (not path.suffix and path.is_file() and _is_python(path)):
                found.append(str(path))
    return found


def _is_python(path: Path) -> bool:
    return path.open("rb").readline(40).startswith(b"#!") and b"python" in path.read_bytes()[:60]


def unused(folders: Iterable[str]) -> Iterator[Found]:
    """What nobody in `folders` uses."""
    vulture = Vulture(ignore_names=BY_NAME, ignore_decorators=DECORATORS)
    vulture.scavenge(sources(folders))
    for item in vulture.get_unused_code():
        constant = item.typ == "variable" and item.name.isupper()
        found = Found(Path(item.filename), item.first_lineno, item.name, item.typ)
        if (item.typ in KINDS or constant) and not found.path.startswith(LAYOUTS):
            yield found


def main() -> int:
    """Print what is dead; 1 if there is any."""
    allowed = FOR_USERS | FOR_LOOKING
    dead = [found for found in unused((*OURS, "tests")) if found.name not in allowed]
    dead = [found for found in dead if not found.path.startswith(DRIVERS)]
    known = {str(found) for found in dead}
    only_tests = [found for found in unused(OURS) if not found.path.startswith(DRIVERS)]
    only_tests = [found for found in only_tests if str(found) not in known]
    bad = [found for found in only_tests if found.name not in allowed]
    for found in dead:
        print(f"{found}: nobody uses it; remove it")
    for found in bad:
        print(f"{found}: only tests use it; remove it, or say in scripts/steps/dead_code.py what it is for")
    for name in sorted(set(allowed) - {found.name for found in only_tests}):
        print(f"scripts/steps/dead_code.py: {name} is used, or gone; its row can go")
    return 1 if dead or bad else 0


if __name__ == "__main__":
    sys.exit(main())
