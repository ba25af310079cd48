"""What ``gms bench failover`` has found, as data: a sample of each kill, their summary, and the timeline of one of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec

from gms_core.errors import InvalidArgument

SCHEMA = "gms-bench-failover/1"
INTERRUPTED = "it was interrupted"

Kind = Literal["group", "front-end", "engine-core", "worker", "detokenizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MEANINGS = {
    "killed": "SIGKILL",
    "noticed": "the server knows, and has killed what was left",
    "elected": "the shadow has the lock",
    "held": "it is granted the KV memory",
    "mapped": "it has mapped that memory",
    "promoted": "its front end knows",
    "listening": "clients can connect",
    "first_token": "a fresh request is answered",
    "gone": "the last process of the dead engine has exited",
}
"""What happens in a failover, by the names of the events."""

_BARS = (
    ("dead engine", "until noticed", "killed", "noticed"),
    ("dead engine", "exits", "noticed", "gone"),
    ("shadow", "waits for the lock", "noticed", "elected"),
    ("shadow", "waits for the memory", "elected", "held"),
    ("shadow", "maps it", "held", "mapped"),
    ("shadow", "opens the gate", "mapped", "listening"),
    ("client", "nobody answers", "killed", "listening"),
    ("client", "first token", "listening", "first_token"),
)


class Spread(msgspec.Struct, frozen=True):
    """Several samples of one figure."""

    min: float
    median: float
    p95: float
    max: float


class Restart(msgspec.Struct, frozen=True):
    """One life of the engine without GMS.

    Attributes:
        start_to_first_token_s: Seconds from the start of its command to the answer to a request.
        kill_to_gone_s: Seconds from SIGKILL of all its processes to the exit of the last one.
    """

    start_to_first_token_s: float
    kill_to_gone_s: float


class Requests(msgspec.Struct, frozen=True):
    """What became of requests around a kill.

    Attributes:
        in_flight: That had been sent, and were not answered in full, when the engine was killed.
        in_flight_failed: Of these, those that never were.
        broken: Sent after the kill, on a connection that ended without an answer.
        rejected: Sent after the kill, and answered with an error.
        refused: Tries after the kill at which nobody listened: nothing was sent, so these are no failed requests.
    """

    in_flight: int = 0
    in_flight_failed: int = 0
    broken: int = 0
    rejected: int = 0
    refused: int = 0

    @property
    def failed(self) -> int:
        """Requests that were sent and never answered."""
        return self.in_flight_failed + self.broken + self.rejected


class Failover(msgspec.Struct, frozen=True):
    """One kill.

    Attributes:
        number: From 1.
        kind: What was killed of the primary.
        engine: The one that was killed.
        successor: The one that serves after it.
        term: Of the successor's election; 0 if its log does not tell.
        epoch: Of its memory, likewise.
        events: Seconds after the kill, by the names in `MEANINGS`.
        requests: What became of them.
        compared_tokens: Tokens that were asked for after the kill and are known from before the first one.
        wrong_tokens: Of these, those that differ.
    """

    number: int
    kind: Kind
    engine: str
    successor: str
    term: int
    epoch: int
    events: dict[str, float]
    requests: Requests
    compared_tokens: int
    wrong_tokens: int


class Result(msgspec.Struct, frozen=True):
    """One run of the benchmark.

    Attributes:
        gms: Version.
        devices: Whose servers there were.
        command: Of the engine.
        restart_command: Of the engine without GMS; empty if it was not started.
        kills: How many were asked for.
        kill: What of the primary was to be killed.
        load: Requests that were to be in flight.
        restarts: Lives of the engine without GMS, by ``cold`` and ``warm``.
        failovers: One for each kill.
        max_primaries: The most engines that were the primary at any one look at the servers.
        stock_tokens_equal: Whether the engine without GMS gives the same tokens; None if it was not asked.
        ended_by: What ended the run early, in words; empty if nothing did.
    """

    gms: str
    devices: tuple[str, ...]
    command: tuple[str, ...]
    restart_command: tuple[str, ...]
    kills: int
    kill: str
    shadows: int
    load: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    restarts: dict[str, Restart]
    failovers: tuple[Failover, ...]
    max_primaries: int
    stock_tokens_equal: bool | None
    ended_by: str = ""
    schema: str = SCHEMA

    @property
    def wrong_tokens(self) -> int:
        """Over all kills."""
        return sum(failover.wrong_tokens for failover in self.failovers)

    @property
    def failed_requests(self) -> int:
        """Over all kills."""
        return sum(failover.requests.failed for failover in self.failovers)

    def spreads(self) -> dict[str, Spread]:
        """Seconds from the kill to each event, over all kills, and what the first token took longer than the exit of the dead engine."""
        names = [name for name in MEANINGS if any(name in failover.events for failover in self.failovers)]
        names += sorted({name for failover in self.failovers for name in failover.events} - set(names))
        found = {name: spread(failover.events[name] for failover in self.failovers if name in failover.events) for name in names if name != "killed"}
        both = [failover.events for failover in self.failovers if {"first_token", "gone"} <= failover.events.keys()]
        return found | ({"first_token_after_gone": spread(events["first_token"] - events["gone"] for events in both)} if both else {})

    def ratios(self) -> dict[str, float]:
        """How many times longer each restart took than the median failover, from start or kill to the first token."""
        if not self.failovers:
            return {}
        median = self.spreads()["first_token"].median
        return {name: restart.start_to_first_token_s / median for name, restart in self.restarts.items()}

    def faults(self) -> list[str]:
        """What must not be, in words; empty for a good run."""
        found = []
        if self.max_primaries > 1:
            found.append(f"{self.max_primaries} engines were the primary at once")
        if self.wrong_tokens:
            found.append(f"{self.wrong_tokens} tokens were wrong after a kill")
        if len(self.failovers) < self.kills:
            found.append(f"only {len(self.failovers)} of {self.kills} kills were done")
        if self.ended_by:
            found.append(f"the run has ended early: {self.ended_by}")
        return found

    def median_failover(self) -> Failover | None:
        """The one whose first token took as long as the median, or the next shorter one; None if there was no kill."""
        if not self.failovers:
            return None
        median = statistics.median_low(failover.events["first_token"] for failover in self.failovers)
        return next(failover for failover in self.failovers if failover.events["first_token"] == median)


class Moment(NamedTuple):
    """One event of a failover."""

    name: str
    after_ms: float
    meaning: str


class Bar(NamedTuple):
    """Something that takes its time in a failover."""

    lane: str
    label: str
    start_ms: float
    end_ms: float


def spread(samples: Iterable[float]) -> Spread:
    """The spread of one or more samples; the 95th percentile lies between samples in proportion."""
    values = list(samples)
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return Spread(min(values), statistics.median(values), p95, max(values))


def moments(failover: Failover) -> list[Moment]:
    """The timeline of a failover, in order."""
    order = list(MEANINGS)
    events = {"killed": 0.0, **failover.events}
    found = [Moment(name, 1000 * seconds, MEANINGS.get(name, "")) for name, seconds in events.items()]
    return sorted(found, key=lambda moment: (moment.after_ms, order.index(moment.name) if moment.name in order else len(order)))


def bars(failover: Failover) -> list[Bar]:
    """What the plot of a failover's timeline shows: who does what from when to when. What has no length is left out."""
    at = {moment.name: moment.after_ms for moment in moments(failover)}
    known = [(lane, label, at[start], at[end]) for lane, label, start, end in _BARS if start in at and end in at]
    return [Bar(lane, label, start, end) for lane, label, start, end in known if end > start]


def document(result: Result) -> dict[str, object]:
    """The JSON output: everything that was measured, and the summary."""
    summary = {
        "seconds_after_kill": {name: msgspec.to_builtins(found) for name, found in result.spreads().items()},
        "restart_to_failover_ratio": result.ratios(),
        "wrong_tokens": result.wrong_tokens,
        "failed_requests": result.failed_requests,
        "max_primaries": result.max_primaries,
        "faults": result.faults(),
    }
    fields: Mapping[str, object] = msgspec.to_builtins(result)
    return {"schema": result.schema, "summary": summary, **fields}


def read(path: Path) -> Result:
    """A result that was saved as JSON.

    Raises:
        InvalidArgument: It is none.
    """
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read as a result of this benchmark: {error}", hint="Make one with -o json.") from error
    if result.schema != SCHEMA:
        raise InvalidArgument(f"{path} has the schema {result.schema!r}, not {SCHEMA!r}")
    return result


def differences(found: Sequence[Sequence[object]], right: Sequence[Sequence[object]]) -> tuple[int, int]:
    """How many tokens of some answers were compared with those of the right ones, and how many of them differ; a missing one does."""
    compared = sum(len(answer) for answer in right)
    equal = sum(one == other for answer, expected in zip(found, right, strict=True) for one, other in zip(answer, expected, strict=False))
    return compared, compared - equal
