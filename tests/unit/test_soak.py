"""The soak of a device server: a short one, and that its verdict notices whatever grows. `make soak` takes minutes."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.restarts import HOST_MEMORY
from tests.chaos.soak import GROWTH_BYTES, JOURNAL_BYTES, Sample, Usage, growth, run, usage
from tests.conftest import running_server

ROUNDS = 12


@pytest.mark.timeout(120)
def test_server_is_flat_when_it_has_served_clients_of_all_kinds(runtime_dir: Path, tmp_path: Path) -> None:
    with running_server(runtime_dir, host_memory=HOST_MEMORY) as server:
        # In its first seconds a server still comes to what it needs, and a busy machine spreads these over the rounds.
        outcome = run(server, tmp_path, 5, 6.0, rounds=ROUNDS, most_bytes=4 * 2**20)
    assert outcome.findings == []
    assert len(outcome.samples) == outcome.rounds == ROUNDS
    assert {"read", "published", "held", "has", "looked", "visited", "asked wrongly"} <= outcome.counts.keys()


def samples(server: Callable[[int], Usage] = lambda _: STILL, **facts: Callable[[int], int]) -> list[Sample]:
    found = []
    for number in range(ROUNDS):
        files = tuple(map(str, range(facts.get("files", lambda _: 4)(number))))
        journal, allocations = facts.get("journal", lambda _: 2**20)(number), facts.get("allocations", lambda _: 3)(number)
        processes = {"server": server(number), "keeper": STILL, "supervisor": STILL}
        found.append(Sample(float(number), processes, files, journal, allocations, STILL))
    return found


STILL = Usage(20 * 2**20, 20, 2)


def test_nothing_is_found_when_all_is_flat() -> None:
    assert growth(samples()) == []


def test_nothing_is_found_when_only_the_first_quarter_grows() -> None:
    assert growth(samples(lambda number: Usage(2**20 * min(number, 3), min(number, 3), min(number, 3)))) == []


def test_nothing_is_found_when_one_round_stands_out() -> None:
    assert growth(samples(lambda number: Usage(2**30, 100, 9) if number == ROUNDS - 1 else STILL)) == []


@pytest.mark.parametrize(
    ("grown", "finding"),
    [
        (samples(lambda number: Usage(20 * 2**20 + number * GROWTH_BYTES // 4, 20, 2)), "bytes of memory of the server"),
        (samples(lambda number: Usage(20 * 2**20, 20 + number // 6, 2)), "descriptors of the server: 20 in the second quarter, 21 in the last one"),
        (samples(lambda number: Usage(20 * 2**20, 20, 2 + number // 4)), "threads of the server"),
        (samples(files=lambda number: 4 + number // 5), "files of the runtime directory"),
        (samples(allocations=lambda number: 3 + number // 6), "allocations"),
        (samples(journal=lambda number: JOURNAL_BYTES + 1 if number == 1 else 0), "the journal was"),
        (samples()[:3], "too few"),
    ],
)
def test_growth_is_found_when_there_is_any(grown: list[Sample], finding: str) -> None:
    found = growth(grown)
    assert len(found) == 1
    assert finding in found[0]


def test_usage_grows_when_a_process_takes_more(tmp_path: Path) -> None:
    before = usage(os.getpid())
    with (tmp_path / "file").open("wb"), mmap.mmap(-1, 2**24, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(os.urandom(len(block)))
        after, taken = usage(os.getpid()), len(block)
    assert after.descriptors == before.descriptors + 1
    assert after.memory >= before.memory + taken // 2
