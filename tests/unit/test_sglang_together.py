"""Ranks that compute together take a step together, or not at all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gms_core.errors import OutOfMemory
from gms_sglang.together import Outcome, together


class Ranks:
    """Two ranks, each in a thread of its own, which meet where they gather."""

    def __init__(self, refuses: int | None) -> None:
        self.awake = [False, False]
        self._refuses = refuses
        self._met = threading.Barrier(2, timeout=60.0)
        self._outcomes: list[Outcome] = [{}, {}]

    def wake(self) -> list[list[Outcome]]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(self._wake, range(2)))

    def _wake(self, rank: int) -> list[Outcome]:
        def step() -> str:
            self.awake[rank] = True  # what is done in part has to be taken back too
            if rank == self._refuses:
                raise OutOfMemory("no room")
            return f"rank {rank}"

        def gather(mine: Outcome) -> list[Outcome]:
            self._outcomes[rank] = mine
            self._met.wait()
            return list(self._outcomes)

        def take_back() -> None:
            self.awake[rank] = False

        return together(step, gather, take_back)


def test_all_ranks_are_awake_when_none_refuses() -> None:
    ranks = Ranks(None)
    assert ranks.wake() == [[{"answer": "rank 0"}, {"answer": "rank 1"}]] * 2
    assert ranks.awake == [True, True]


@pytest.mark.parametrize("refuses", [0, 1])
def test_all_ranks_stay_asleep_when_one_refuses(refuses: int) -> None:
    ranks = Ranks(refuses)
    for outcomes in ranks.wake():
        assert outcomes[refuses]["error"]["code"] == OutOfMemory.code
    assert ranks.awake == [False, False]
