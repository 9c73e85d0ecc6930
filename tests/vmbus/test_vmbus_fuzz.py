"""The fuzzer's short form, what it found, and that it would find it again.

`tests/soak/test_soak_vmbus.py` runs it for long; `tests/guests/fuzz_run.py` says how to replay a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fuzz_run
import pytest
from fuzz_bus import AS_IT_IS, Step

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.channels import Channels
from hvkvm.vmbus.open_channel import OpenedChannel

SEQUENCES = 20

CONNECT: list[Step] = [
    ("contact", vmbus.VERSION_WIN10_V5_3, 2, AS_IT_IS),
    ("message", wire.REQUESTOFFERS, 0, 0, 0, AS_IT_IS),
    ("turns", 200),
]
KVP = 3


def opened(index: int, pages: int = 4) -> list[Step]:
    """A driver that has taken channel `index`, with a ring of `pages` for the host's packets."""
    return [
        ("gpadl", index, 0, 4 + pages, -1, AS_IT_IS),
        ("open", index, 4, 0, AS_IT_IS),
        ("turns", 50),
        ("serve", index, 0, 1, -1, AS_IT_IS),
        ("turns", 50),
    ]


FOUND: dict[str, list[Step]] = {
    "a request that never fits": [*CONNECT, *opened(KVP, 2), ("ask", "get", 0), ("ring", KVP), ("turns", 9)],
    "a ring that is broken": [*CONNECT, *opened(0), ("word", 0, True, 0, 0xFFFFFFFF), ("ring", 0)],
    "connects that are left to retry": [*CONNECT, ("storm", 64, 10), ("turns", 200)] * 5,
    "no fd for the answer": [("fault", 0, 0, 5), *CONNECT],
    "no fd for the doorbell": [*CONNECT, ("fault", 1, 0, 1), *opened(0), ("fault", 2, 1, 1), *opened(1)],
    "an answer that makes no sense": [
        *CONNECT,
        *opened(KVP),
        ("ask", "get", 0),
        ("serve", KVP, 0, 1, -1, (8, ())),
        ("turns", 9),
        ("ask", "get", 0),
    ],
}


@pytest.mark.parametrize("batch", range(4))
def test_whatever_a_guest_does(tmp_path: Path, batch: int) -> None:
    for seed in range(batch * SEQUENCES, (batch + 1) * SEQUENCES):
        fuzz_run.fuzz(seed, tmp_path)


def test_memory_does_not_grow(tmp_path: Path) -> None:
    fuzz_run.grind(1, tmp_path, rounds=6)


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_mended(tmp_path: Path, name: str) -> None:
    fuzz_run.run(FOUND[name], tmp_path)


@pytest.mark.parametrize(
    ("owner", "name", "mistake", "found"),
    [
        (ChannelIo, "fits", lambda *_: True, "a request that never fits"),
        (Channels, "hide_all", lambda self: self.by_relid.clear(), "a ring that is broken"),
        (OpenedChannel, "start", lambda _: 1 // 0, "an answer that makes no sense"),
    ],
)
def test_a_mistake_of_ours_is_found_and_told_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, mistake: Any, found: str
) -> None:
    monkeypatch.setattr(owner, name, mistake)
    text = fuzz_run.failure(FOUND[found], tmp_path)
    assert text
    kind = fuzz_run.kind_of(text)
    steps = fuzz_run.shortest(
        FOUND[found] + CONNECT, lambda some: fuzz_run.kind_of(fuzz_run.failure(some, tmp_path)) == kind
    )
    assert len(steps) < len(FOUND[found])
    assert fuzz_run.failure(steps, tmp_path)
