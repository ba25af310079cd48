"""A device server that is killed again and again while clients work: what they are told fits together. `make chaos` does more of the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.restarts import check, run
from tests.conftest import RunningServer

SEED = 5
KILLS = 10


@pytest.mark.timeout(300)
def test_history_of_all_clients_fits_together_when_the_server_is_killed_again_and_again(server: RunningServer, tmp_path: Path) -> None:
    outcome = run(server, tmp_path, SEED, KILLS)
    assert outcome.findings == []
    assert outcome.kills == KILLS
    assert {"read", "published", "held", "elected", "looked"} <= outcome.counts.keys()


def event(kind: str, began: float, **facts: object) -> dict[str, object]:
    return {"client": "one", "kind": kind, "began": began, "ended": began + 0.5, **facts}


@pytest.mark.parametrize(
    ("events", "finding"),
    [
        ([], None),
        ([event("published", 1, generation=1, digest="a"), event("read", 2, generation=1, digest="a", said="a")], None),
        ([event("published", 1, generation=1, digest="a"), event("read", 2, generation=1, digest="b", said="a")], "was read as"),
        ([event("published", 1, generation=1, digest="a"), event("read", 2, generation=1, digest="b", said="b")], "was read as"),
        ([event("published", 1, generation=1, digest="a"), event("published", 2, generation=1, digest="b")], "twice"),
        ([event("published", 1, generation=2, digest="a"), event("read", 2, generation=1, digest="b", said="b")], "after 2 was acknowledged"),
        ([event("published", 1, generation=2, digest="a"), event("read", 1.2, generation=1, digest="b", said="b")], None),
        ([event("elected", 1, term=1), event("elected", 2, term=2)], None),
        ([event("elected", 1, term=2), event("elected", 2, term=2)], "term 2 was granted after 2"),
        ([event("held", 1, epoch=1, before=0, after=1), event("held", 2, epoch=2, before=1, after=2)], None),
        ([event("held", 1, epoch=1, before=0, after=2)], "was written to by epoch 2"),
        ([event("held", 1, epoch=3, before=4, after=3)], "found what epoch 4"),
        ([event("held", 2, epoch=1, before=0, after=1), event("held", 1, epoch=2, before=1, after=2)], "epoch 1 was granted after 2"),
    ],
)
def test_checker_finds_what_cannot_be(events: list[dict[str, object]], finding: str | None) -> None:
    found = check(events)
    if finding is None:
        assert found == []
    else:
        assert any(finding in sentence for sentence in found)
