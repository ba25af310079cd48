"""Steps that ranks of an engine take together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gms_core.errors import GmsError, UnpopulatedModule
from gms_core.ranks import all_or_none


class Meeting:
    """Where two ranks, each in a thread, hear of each other."""

    def __init__(self) -> None:
        self.said: list[Any] = [None, None]
        self.barrier = threading.Barrier(2, timeout=30)


class Rank:
    def __init__(self, meeting: Meeting, number: int) -> None:
        self.meeting, self.rank_in_group = meeting, number

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        raise NotImplementedError

    def all_gather_object(self, obj: Any) -> list[Any]:
        self.meeting.said[self.rank_in_group] = obj
        self.meeting.barrier.wait()
        return list(self.meeting.said)


def outcomes(*steps: Any) -> list[Any]:
    meeting = Meeting()

    def attempt(number: int) -> Any:
        try:
            return all_or_none(Rank(meeting, number), steps[number])
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(attempt, range(2)))


def fail(error: Exception) -> Any:
    raise error


def test_each_rank_has_its_own_result_when_all_could() -> None:
    assert outcomes(lambda: "a", lambda: "b") == ["a", "b"]
    assert all_or_none(None, lambda: "alone") == "alone"


@pytest.mark.parametrize(("error", "kind"), [(UnpopulatedModule("no weights"), UnpopulatedModule), (KeyError("odd"), GmsError)])
def test_no_rank_goes_on_when_one_could_not(error: Exception, kind: type[Exception]) -> None:
    first, second = outcomes(lambda: "a", lambda: fail(error))
    assert second is error
    assert type(first) is kind
    assert "rank 1 of this engine could not: " in str(first)
