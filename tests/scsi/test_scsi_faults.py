"""A disk that fails on purpose: each fault, when it comes, and that nothing is held back for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_asker import page_buffer
from hypothesis import given
from hypothesis import strategies as st
from scsi_asker import Scsi, sense_in

from hvkvm.abi import scsi
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.fault_rules import OPERATIONS, RECENT, SENSES, Action, Plan, Rule
from hvkvm.devices.scsi.faulty import FaultyDisk
from hvkvm.errors import ConfigError
from hvkvm.machine.fault_file import MAX_RULES, plan_of, read_plan

READ, WRITE = OPERATIONS["read"], OPERATIONS["write"]
BLOCK = 512


def read(lba: int, blocks: int = 1) -> bytes:
    return scsi.cdb10.pack(scsi.READ_10, 0, lba, 0, blocks, 0)


def write(lba: int, blocks: int = 1) -> bytes:
    return scsi.cdb10.pack(scsi.WRITE_10, 0, lba, 0, blocks, 0)


class Later:
    """Timers that run when they are told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[..., object], tuple[Any, ...], Later.Timer]] = []

    class Timer:
        def __init__(self) -> None:
            self.active = True

        def cancel(self) -> None:
            self.active = False

    def __call__(self, seconds: float, fn: Callable[..., object], *args: object) -> Timer:
        timer = self.Timer()
        self.calls.append((seconds, fn, args, timer))
        return timer

    def run(self) -> list[float]:
        """All that are due; their seconds."""
        calls, self.calls = [one for one in self.calls if one[3].active], []
        for _seconds, fn, args, _timer in calls:
            fn(*args)
        return [one[0] for one in calls]


class Faulty:
    """A disk of 1 MiB whose bytes are 1, with a plan."""

    def __init__(self, ask: Scsi, folder: Path) -> None:
        self.ask, self.later, self.rescinded = ask, Later(), 0
        self.path = folder / "disk"
        self.path.write_bytes(b"\1" * (1 << 20))
        self.unit = FaultyDisk(ask.disk(self.path), "s", Plan(), self.later, self.rescind)
        ask.execute(self.unit, bytes(6))  # takes the unit attention

    def rescind(self) -> None:
        self.rescinded += 1

    def plan(self, *rules: Rule, seed: int = 0) -> None:
        self.unit.plan = Plan(rules, seed)

    def begin(self, cdb: bytes, n: int = BLOCK) -> list[Reply]:
        replies: list[Reply] = []
        self.unit.execute(Command(cdb, [page_buffer(n)], replies.append))
        self.ask.loop.run()
        return replies


@pytest.fixture
def faulty(ask: Scsi, tmp_path: Path) -> Faulty:
    return Faulty(ask, tmp_path)


def test_without_a_rule_that_is_meant_it_is_a_disk(faulty: Faulty) -> None:
    faulty.plan(Rule(Action.ERROR, READ, 100, 199))
    for lba in (0, 99, 200):
        assert faulty.ask.good(faulty.unit, read(lba), BLOCK) == b"\1" * BLOCK
    faulty.ask.good(faulty.unit, write(150), b"\2" * BLOCK)
    assert faulty.path.read_bytes()[150 * BLOCK : 151 * BLOCK] == b"\2" * BLOCK


def test_error_in_a_range_names_the_first_bad_block(faulty: Faulty) -> None:
    faulty.plan(Rule(Action.ERROR, READ, 100, 199, sense=scsi.UNRECOVERED_READ))
    for cdb, blamed in ((read(100), 100), (read(199), 199), (read(96, 8), 100)):
        reply, _memory = faulty.ask.execute(faulty.unit, cdb, 8 * BLOCK)
        assert sense_in(reply) == scsi.UNRECOVERED_READ
        assert int.from_bytes(reply.sense[3:7], "big") == blamed


def test_busy_then_good_as_often_as_asked_and_after_so_many(faulty: Faulty) -> None:
    faulty.plan(Rule(Action.BUSY, after=2, times=3))
    statuses = [faulty.ask.execute(faulty.unit, read(0), BLOCK)[0].status for _ in range(7)]
    assert statuses == [scsi.GOOD] * 2 + [scsi.BUSY] * 3 + [scsi.GOOD] * 2


def test_delay(faulty: Faulty) -> None:
    faulty.plan(Rule(Action.DELAY, READ, seconds=0.25))
    replies = faulty.begin(read(0))
    assert not replies
    assert faulty.begin(write(0))  # another is not held up
    assert faulty.later.run() == [0.25]
    faulty.ask.loop.run()
    assert [one.status for one in replies] == [scsi.GOOD]


@pytest.mark.parametrize("action", [Action.DROP, Action.DELAY])
@pytest.mark.parametrize("end", ["reset", "drain", "release"])
def test_what_is_held_back_ends_with_a_reset_and_with_the_driver(
    faulty: Faulty, action: Action, end: str
) -> None:
    faulty.plan(Rule(action, WRITE))
    replies = faulty.begin(write(5))
    assert not replies
    assert faulty.unit.inspect()["held"] == 1
    done: list[int] = []
    if end == "release":
        faulty.unit.release()
    else:
        getattr(faulty.unit, end)(lambda: done.append(1))
        faulty.ask.loop.run()
        assert done == [1]
    assert [sense_in(one) for one in replies] == [scsi.COMMAND_CLEARED]
    faulty.later.run()
    faulty.ask.loop.run()
    assert len(replies) == 1
    assert faulty.path.read_bytes() == b"\1" * (1 << 20)


@pytest.mark.parametrize("good", [False, True])
def test_torn_write(faulty: Faulty, good: bool) -> None:
    faulty.plan(Rule(Action.TORN, sectors=3, good=good, sense=scsi.WRITE_ERROR))
    reply, _memory = faulty.ask.execute(faulty.unit, write(8, 16), b"\2" * 16 * BLOCK)
    assert faulty.path.read_bytes()[8 * BLOCK : 24 * BLOCK] == b"\2" * 3 * BLOCK + b"\1" * 13 * BLOCK
    if good:
        assert reply == Reply(scsi.GOOD, b"", 16 * BLOCK)
    else:
        assert sense_in(reply) == scsi.WRITE_ERROR
        assert int.from_bytes(reply.sense[3:7], "big") == 11
    faulty.ask.good(faulty.unit, write(8, 3), b"\3" * 3 * BLOCK)  # not torn: no longer than that
    faulty.ask.good(faulty.unit, read(8, 16), 16 * BLOCK)


def test_torn_write_whose_data_is_shorter_than_it_says_writes_nothing(faulty: Faulty) -> None:
    faulty.plan(Rule(Action.TORN, sectors=3, good=True))
    assert faulty.ask.sense(faulty.unit, write(0, 16), b"\2" * 2 * BLOCK) == scsi.DATA_PHASE_ERROR
    assert faulty.path.read_bytes() == b"\1" * (1 << 20)


def test_rescind_while_in_use(faulty: Faulty) -> None:
    faulty.plan(Rule(Action.RESCIND, READ, after=1))
    faulty.ask.good(faulty.unit, read(0), BLOCK)
    faulty.ask.good(faulty.unit, read(0), BLOCK)
    assert faulty.later.run() == [0]
    assert faulty.rescinded == 1


def test_same_seed_same_faults(faulty: Faulty) -> None:
    runs = []
    for seed in (1, 1, 2):
        faulty.plan(Rule(Action.BUSY, probability=0.5), seed=seed)
        runs.append([faulty.ask.execute(faulty.unit, read(0), BLOCK)[0].status for _ in range(64)])
    assert runs[0] == runs[1] != runs[2]
    assert 10 < runs[0].count(scsi.BUSY) < 54


def test_inspect_says_what_happened(faulty: Faulty) -> None:
    faulty.plan(
        Rule(Action.ERROR, READ, 7, 7, sense=scsi.Sense(4, 0x44)), Rule(Action.DELAY, OPERATIONS["flush"])
    )
    for lba in range(10):
        faulty.ask.execute(faulty.unit, read(lba), BLOCK)
    faulty.begin(scsi.cdb10.pack(scsi.SYNCHRONIZE_CACHE, 0, 0, 0, 0, 0))
    faults = faulty.unit.inspect()["faults"]
    assert isinstance(faults, dict)
    assert faults["rules"] == [
        {"action": "error", "met": 1, "faults": 1},
        {"action": "delay", "met": 1, "faults": 1},
    ]
    assert faults["recent"] == [
        "command 8, read of 1 blocks at 7: failed with sense 04/44/00",
        "command 11, flush: delayed by 0 s",
    ]


RULES = st.builds(
    Rule,
    st.sampled_from(Action),
    st.sampled_from(list(OPERATIONS.values())),
    first=st.none() | st.integers(0, 2000),
    last=st.none() | st.integers(0, 2000),
    after=st.integers(0, 2),
    times=st.none() | st.integers(0, 3),
    probability=st.floats(0, 1),
    sense=st.sampled_from(list(SENSES.values())),
    sectors=st.integers(1, 9),
    good=st.booleans(),
)
CDBS = st.one_of(
    st.binary(max_size=16),
    st.builds(
        lambda op, lba, n: scsi.cdb10.pack(op, 0, lba, 0, n, 0),
        st.sampled_from((0x28, 0x2A)),
        st.integers(0, 3000),
        st.integers(0, 9),
    ),
)


@given(
    rules=st.lists(RULES, max_size=4), commands=st.lists(st.tuples(CDBS, st.integers(0, 4096)), max_size=20)
)
def test_every_command_is_answered_once_whatever_the_plan(
    rules: list[Rule], commands: list[tuple[bytes, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ask = Scsi()
    faulty = Faulty(ask, tmp_path_factory.mktemp("disk"))
    faulty.plan(*rules)
    answers: list[list[Reply]] = []
    for cdb, n in commands:
        answers.append(faulty.begin(cdb, n))
    faulty.later.run()
    ask.loop.run()
    rested: list[int] = []
    faulty.unit.drain(lambda: rested.append(1))
    ask.loop.run()
    assert rested == [1]
    assert all(len(one) == 1 for one in answers)
    recent = faulty.unit.plan.inspect()["recent"]
    assert isinstance(recent, list)
    assert len(recent) <= RECENT
    ask.close()


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "faults.toml"
    path.write_text("""
seed = 7
[[fault]]
do = "error"
op = ["read", 0x93]
lba = "2048-4095"
after = 1
times = 3
probability = 0.25
sense = "4/44"
[[fault]]
do = "torn"
sectors = 4
good = true
[[fault]]
do = "delay"
lba = 9
seconds = 2
""")
    plan = read_plan(path)
    assert plan.seed == 7
    assert plan.rules == (
        Rule(Action.ERROR, READ | {0x93}, 2048, 4095, 1, 3, 0.25, 1.0, scsi.Sense(4, 0x44)),
        Rule(Action.TORN, seconds=1.0, sense=scsi.WRITE_ERROR, sectors=4, good=True),
        Rule(Action.DELAY, first=9, last=9, seconds=2.0),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "x: unknown; the keys are seed and [[fault]]"),
        ("seed = true", "seed: not a number"),
        ("fault = 3", "fault: not a list of tables"),
        ("[[fault]]\nop = 'read'", 'fault 1: no do; say what is to happen, such as do = "error"'),
        ("[[fault]]\ndo = 'explode'", "fault 1: do=explode"),
        ("[[fault]]\ndo = 'busy'\nlbas = 3", "fault 1: lbas: unknown"),
        ("[[fault]]\ndo = 'busy'\nlba = '9-3'", "no range of sectors; write FIRST-LAST"),
        ("[[fault]]\ndo = 'busy'\nlba = -1", "no range of sectors"),
        ("[[fault]]\ndo = 'error'\nsense = 'bad'", "no sense; choose medium-error"),
        ("[[fault]]\ndo = 'error'\nop = 'erase'", "unknown; choose read, write, flush"),
        ("[[fault]]\ndo = 'error'\nop = 256", "no operation code; they are 0 to 255"),
        ("[[fault]]\ndo = 'busy'\nprobability = 2", "not 0 to 1"),
        ("[[fault]]\ndo = 'busy'\nprobability = nan", "not 0 to 1"),
        ("[[fault]]\ndo = 'torn'\nsectors = 0", "not 1 to 65535"),
        ("[[fault]]\ndo = 'delay'\nseconds = inf", "not 0 to 3600"),
        ("[[fault]]\ndo = 'busy'\n" * (MAX_RULES + 1), "65 faults; a disk takes up to 64"),
        ("[[fault]", "give a readable TOML file"),
    ],
)
def test_bad_file_is_one_line_with_the_fault_and_the_remedy(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "faults.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_plan(path)
    line = str(caught.value)
    assert line.startswith(f"--disk faults={path}: ")
    assert "\n" not in line
    assert said in line


def test_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(tmp_path / "none")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda more: (
            st.lists(more, max_size=3)
            | st.dictionaries(
                st.sampled_from(["fault", "seed", "do", "op", "lba", "sense", "times"]), more, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_table_is_a_plan_or_refused_in_words(value: Any) -> None:
    if isinstance(value, dict):
        try:
            plan_of(value, "f")
        except ConfigError as error:
            assert str(error).startswith("f: ")
