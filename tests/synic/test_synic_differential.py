"""One guest program on both SynICs, KVM's and ours: the guest must see the same, but for listed exceptions.

The list is `synic_differences`, in words docs/compatibility.md. A difference that is
not in it fails, and so does one in it that is gone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guest_machine import Guest
from synic_differences import DIFFERENCES, compare, expected_of
from synic_program import Op, Program, Step, named, readable
from synic_programs import PROGRAMS
from synic_random import is_sound, made_up, shortened
from synic_recorder import Recorder

BOTH = ("kernel", "user")
SEEDS = 8
"""Made-up programs for each number of VPs."""

Pairs = Callable[[int], "Pair"]


class Pair:
    """The same machine twice, once with each SynIC; made anew after something went wrong with one."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self._guests: list[Guest] = []
        self._recorders: list[Recorder] = []

    def run(self, program: Program) -> tuple[list[Step], list[Step]]:
        """What the guest saw with KVM's SynIC and with ours."""
        try:
            if not self._guests:
                for synic in BOTH:
                    self._guests.append(Guest(cpus=self.cpus, synic=synic))
                    self._recorders.append(Recorder(self._guests[-1].start()))
            kernel, user = (recorder.run(program) for recorder in self._recorders)
        except BaseException:
            self.close()
            raise
        return kernel, user

    def differ(self, program: Program) -> bool:
        """Whether it sees any difference."""
        kernel, user = self.run(program)
        return kernel != user

    def close(self) -> None:
        for guest in self._guests:
            guest.close()
        self._guests.clear()
        self._recorders.clear()


@pytest.fixture(scope="module")
def pairs() -> Iterator[Pairs]:
    """`pairs(cpus)`, the same one in every test: a program starts with a machine reset."""
    made: dict[int, Pair] = {}
    yield lambda cpus: made.setdefault(cpus, Pair(cpus))
    for pair in made.values():
        pair.close()


@pytest.mark.hyperv
@pytest.mark.kernel_synic
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_guest_sees_the_same_on_both(pairs: Pairs, name: str) -> None:
    kernel, user = pairs(2).run(PROGRAMS[name])
    wrong = compare(name, kernel, user)
    assert not wrong, "\n".join(wrong)


@pytest.mark.hyperv
@pytest.mark.kernel_synic
@pytest.mark.timeout(1200)  # shortening one that fails takes a while
@pytest.mark.parametrize("cpus", [1, 2])
def test_made_up_programs_see_the_same_on_both(pairs: Pairs, cpus: int) -> None:
    pair = pairs(cpus)
    for seed in range(SEEDS):
        program = made_up(seed, cpus)
        if not pair.differ(program):
            continue
        short = shortened(program, lambda part: is_sound(part, cpus) and pair.differ(part))
        wrong = compare("", *pair.run(short))
        pytest.fail(f"seed {seed}, {cpus} VPs, shortened to\n{readable(short)}\n" + "\n".join(wrong))


@pytest.mark.kvm
def test_a_recording_is_reproducible(boot_agent: Callable[..., Guest]) -> None:
    """Twice the same program, twice the same lines: nothing in them is a matter of time."""
    recorder = Recorder(boot_agent(cpus=2, synic="user"))
    programs = [*PROGRAMS.values(), *(made_up(1000 + seed, 2) for seed in range(8))]
    for program in programs:
        assert recorder.run(program) == recorder.run(program)


def test_made_up_programs_depend_on_the_seed_alone() -> None:
    assert made_up(7, 2) == made_up(7, 2) != made_up(8, 2)
    assert {op.vp for op in made_up(7, 1)} == {0}
    programs = [made_up(seed, 2) for seed in range(50)]
    assert any(Op("reset") in program for program in programs)
    assert all(is_sound(program, 2) and not is_sound(program[1:], 2) for program in programs)


def test_a_failing_program_is_shortened_to_what_it_takes() -> None:
    program = made_up(3, 2)
    first, second = program[4], program[-2]
    short = shortened(program, lambda part: first in part and second in part)
    assert short == (first, second)


def test_comparing_finds_what_is_new_and_what_is_gone() -> None:
    name = "beyond-the-rules"
    names, listed = named(PROGRAMS[name]), expected_of(name)
    kernel = [Step(step, listed.get(step, ("0x0", ""))[0]) for step in names]
    user = [Step(step, listed.get(step, ("", "0x0"))[1]) for step in names]
    assert compare(name, kernel, user) == []
    at = names.index(next(iter(listed)))
    assert "no longer" in compare(name, [*kernel[:at], user[at], *kernel[at + 1 :]], user)[0]
    other = next(index for index, step in enumerate(names) if step not in listed)
    assert "vp" in compare(name, kernel, [*user[:other], Step(names[other], "else"), *user[other + 1 :]])[0]


def test_differences_are_of_steps_that_there_are() -> None:
    for difference in DIFFERENCES:
        assert set(difference.steps) <= set(named(PROGRAMS[difference.program])), difference.name


def test_every_difference_is_documented_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
    section = text.split("## Differences that a guest can see", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)
    assert sorted(rows) == sorted({difference.name for difference in DIFFERENCES})


def test_names_of_steps_are_unique_and_readable() -> None:
    program = (Op("rdmsr", 0, 0x40000092), Op("wrmsr", 1, 0x400000B3, 5), Op("rdmsr", 0, 0x40000092))
    assert named(program) == ["vp0 rdmsr SINT2", "vp1 wrmsr STIMER1_COUNT 0x5", "vp0 rdmsr SINT2 (2)"]
