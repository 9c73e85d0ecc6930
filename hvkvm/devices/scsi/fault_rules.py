"""Faults that a tester asks of a disk: which commands, how often, and what becomes of them.

A plan has rules; the first that a command meets, and whose turn it is, decides. Chance comes from the
plan's own seed, so the same commands in the same order meet the same faults again.

Owner: the I/O loop; `inspect` any thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from random import Random

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.tuples import NamedTuple

RECENT = 64
"""So many faults are remembered, the newest."""


class Action(Enum):
    """What becomes of a command."""

    DELAY = "delay"
    """It is done `seconds` later."""
    ERROR = "error"
    """It is not done, and fails with `sense`."""
    BUSY = "busy"
    """It is not done; the guest is to send it again (SAM-5: status BUSY)."""
    DROP = "drop"
    """It is not done, and not answered until the guest resets the unit or its driver goes."""
    TORN = "torn"
    """Only the first `sectors` of a write are written; then it fails with `sense`, or is called good."""
    RESCIND = "rescind"
    """It is done, and the controller is taken from the guest at once, with all that is in flight."""


_READS = (scsi.READ_6, scsi.READ_10, scsi.READ_12, scsi.READ_16)
_WRITES = (
    *(scsi.WRITE_6, scsi.WRITE_10, scsi.WRITE_12, scsi.WRITE_16),
    *(scsi.WRITE_VERIFY, scsi.WRITE_VERIFY_12, scsi.WRITE_VERIFY_16),
)
_SAME = (scsi.WRITE_SAME, scsi.WRITE_SAME_16)
_VERIFIES = (scsi.VERIFY, scsi.VERIFY_12, scsi.VERIFY_16)

OPERATIONS: dict[str, frozenset[int]] = {
    "read": frozenset(_READS),
    "write": frozenset(_WRITES),
    "flush": frozenset((scsi.SYNCHRONIZE_CACHE, scsi.SYNCHRONIZE_CACHE_16)),
    "discard": frozenset((scsi.UNMAP,)),
    "write-same": frozenset(_SAME),
    "verify": frozenset(_VERIFIES),
    "any": frozenset(range(256)),
}
"""Operation codes by the names that a rule uses. Linux discards by UNMAP or by WRITE SAME."""

_NAMES = {code: name for name, codes in OPERATIONS.items() if name != "any" for code in codes}
_WITH_RANGE = frozenset((*_READS, *_WRITES, *_SAME, *_VERIFIES))
WRITES = frozenset(_WRITES)
"""The commands that can be torn."""

SENSES = {
    "medium-error": scsi.UNRECOVERED_READ,
    "write-error": scsi.WRITE_ERROR,
    "hardware-error": scsi.INTERNAL_FAILURE,
    "not-ready": scsi.NOT_READY_STOPPED,
    "no-space": scsi.SPACE_EXHAUSTED,
    "write-protected": scsi.WRITE_PROTECTED,
    "aborted": scsi.COMMAND_CLEARED,
    "unit-attention": scsi.DEVICE_RESET,
}
"""Sense data by the names that a rule uses."""


class Rule(NamedTuple):
    """One fault. A rule without an LBA range takes commands without one, too."""

    action: Action
    operations: frozenset[int] = OPERATIONS["any"]
    first: int | None = None
    last: int | None = None
    """The first and last LBA of a range; a command that touches it is meant."""
    after: int = 0
    """So many that are meant pass first."""
    times: int | None = None
    """So many faults at most; None: no end."""
    probability: float = 1.0
    """Of each that is meant, from 0 to 1."""
    seconds: float = 0.0
    sense: Sense = scsi.UNRECOVERED_READ
    sectors: int = 1
    good: bool = False
    """A torn write is called good."""

    def means(self, cdb: bytes) -> bool:
        """Whether the command is one of these."""
        if cdb[0] not in self.operations:
            return False
        if self.action is Action.TORN and cdb[0] not in WRITES:
            return False
        if self.first is None and self.last is None:
            return True
        found = range_of(cdb)
        if found is None:
            return False
        lba, blocks = found
        return lba + max(blocks, 1) > (self.first or 0) and (self.last is None or lba <= self.last)


def range_of(cdb: bytes) -> tuple[int, int] | None:
    """The LBA and blocks of a command that has them in its CDB; None for others, and for one cut short."""
    if cdb[0] not in _WITH_RANGE or len(cdb) < scsi.GROUP_BYTES[cdb[0] >> 5]:
        return None
    transfer = scsi.transfer_of(cdb)
    return transfer.lba, transfer.blocks


class Plan:
    """`rules` with their counts, and what happened."""

    def __init__(self, rules: Sequence[Rule] = (), seed: int = 0) -> None:
        self.rules = tuple(rules)
        self.seed = seed
        self._random = Random(seed)
        self._met = [0] * len(self.rules)
        self._done = [0] * len(self.rules)
        self._commands = 0
        self._recent: deque[str] = deque(maxlen=RECENT)

    def choose(self, cdb: bytes) -> Rule | None:
        """The fault that this command meets, which is counted then; None for most."""
        self._commands += 1
        if not cdb:
            return None
        for index, rule in enumerate(self.rules):
            if not rule.means(cdb):
                continue
            self._met[index] += 1
            if self._met[index] <= rule.after:
                continue
            if rule.times is not None and self._done[index] >= rule.times:
                continue
            if rule.probability < 1 and self._random.random() >= rule.probability:
                continue
            self._done[index] += 1
            self._recent.append(f"command {self._commands}, {_described(cdb)}: {_what(rule)}")
            return rule
        return None

    def inspect(self) -> dict[str, object]:
        """Each rule with how often it was met and used, and the last faults."""
        met, done = list(self._met), list(self._done)
        return {
            "seed": self.seed,
            "commands": self._commands,
            "rules": [
                {"action": rule.action.value, "met": met[index], "faults": done[index]}
                for index, rule in enumerate(self.rules)
            ],
            "recent": list(self._recent),
        }


def _described(cdb: bytes) -> str:
    name = _NAMES.get(cdb[0], f"operation {cdb[0]:#04x}")
    found = range_of(cdb)
    return name if found is None else f"{name} of {found[1]} blocks at {found[0]}"


def _what(rule: Rule) -> str:
    if rule.action is Action.DELAY:
        return f"delayed by {rule.seconds:g} s"
    sense = "/".join(f"{part:02x}" for part in rule.sense)
    if rule.action is Action.ERROR:
        return f"failed with sense {sense}"
    if rule.action is Action.TORN:
        return f"torn after {rule.sectors} blocks, " + ("called good" if rule.good else f"sense {sense}")
    return {Action.BUSY: "answered BUSY", Action.DROP: "dropped", Action.RESCIND: "controller taken away"}[
        rule.action
    ]
