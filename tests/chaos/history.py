"""What in a history of many clients cannot be. Pure: it is given what each client was told, and the faults, each with the times around it.

An event is a dictionary with ``client``, ``pid``, ``kind``, the times ``began`` and ``ended`` on the clock that all processes of a machine share, and
the facts of its kind:

- ``has`` and ``leaves`` (``what``, ``number``): a generation to write, a term or an epoch, from its grant to just before it is given up.
- ``published`` (``generation``, ``digest``) and ``read`` (``generation``, ``digest``, and ``said``: the digest in the manifest).
- ``held`` (``epoch``, and the epochs that were in the memory ``before`` and ``after``).
- ``torn``: the client's connection is cut. ``refused`` (``code``) and ``lost``: how a request ended that a server without faults would have granted.
- ``fault`` (``fault``, and ``pids`` where processes are killed): what was done to server and clients, and how long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Event = dict[str, Any]

EXPLAINED = {"journal_unavailable": ("journal limit", "full disk"), "out_of_memory": ("memory hog",)}
"""Refusals by code, and the faults that they have to overlap."""
CUTS = ("journal limit", "full disk")
"""Faults in which the server ends a connection: what was done could not be written down, and a refusal would be a lie."""


def check(events: Iterable[Event]) -> list[str]:
    """What in a history cannot be; empty if all is well."""
    ordered = sorted((event for event in events if "ended" in event), key=lambda event: float(event["ended"]))
    return [
        *_contents(ordered),
        *_lost_generations(ordered),
        *_grants(ordered, "term"),
        *_grants(ordered, "epoch"),
        *_memory(ordered),
        *_holders(ordered),
        *_unexplained(ordered),
    ]


def _contents(events: Sequence[Event]) -> Iterator[str]:
    """A generation is published once, and has one content, which every reader finds whole: also one whose writer never heard that it is published."""
    content: dict[int, str] = {}
    for event in events:
        if event["kind"] == "published":
            if event["generation"] in content:
                yield f"generation {event['generation']} was published twice"
            content[event["generation"]] = event["digest"]
    for event in events:
        if event["kind"] == "read":
            expected = content.setdefault(event["generation"], event["said"])
            if not event["digest"] == event["said"] == expected:
                yield f"generation {event['generation']} was read as {event['digest'][:8]}, and is {expected[:8]}"


def _lost_generations(events: Sequence[Event]) -> Iterator[str]:
    """Who asks after a generation was acknowledged, or read by anybody, finds that one or a later one; a new one is later than that."""
    known: list[tuple[float, int]] = []
    for event in events:  # in the order of the ends, so what is known at an end is the highest so far
        if event["kind"] in ("published", "read"):
            known.append((event["ended"], max(event["generation"], known[-1][1] if known else 0)))
    ends = iter(known)
    due, following = 0, next(ends, None)
    for event in sorted((event for event in events if event["kind"] in ("published", "read")), key=lambda event: float(event["began"])):
        while following is not None and following[0] < event["began"]:
            due, following = following[1], next(ends, None)
        if event["generation"] < due or (event["kind"] == "published" and event["generation"] == due):
            yield f"{event['client']} found generation {event['generation']}, after {due} was acknowledged"


def _grants(events: Sequence[Event], what: str) -> Iterator[str]:
    last = 0
    for event in events:
        if event["kind"] == "has" and event["what"] == what:
            if event["number"] <= last:
                yield f"{what} {event['number']} was granted after {last}"
            last = event["number"]


def _memory(events: Sequence[Event]) -> Iterator[str]:
    for event in events:
        if event["kind"] == "held":
            if event["after"] != event["epoch"]:
                yield f"the memory of epoch {event['epoch']} was written to by epoch {event['after']} while it was held"
            if event["before"] >= event["epoch"]:
                yield f"epoch {event['epoch']} found what epoch {event['before']} had written"


def _holders(events: Sequence[Event]) -> Iterator[str]:
    """Nobody is granted what another one has. Who was killed, or cut off, counts as having it until just before that."""
    faults = [event for event in events if event["kind"] == "fault"]
    told: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        told[event["client"]].append(event)
    latest: dict[str, tuple[float, Event]] = {}
    for grant in events:
        if grant["kind"] != "has":
            continue
        what, until = grant["what"], _end(grant, told[grant["client"]], faults)
        if what in latest:
            before, holder = latest[what]
            if grant["ended"] < before:
                yield f"{grant['client']} was granted {what} {grant['number']} while {holder['client']} had {what} {holder['number']}"
        if what not in latest or until > latest[what][0]:
            latest[what] = (until, grant)


def _end(grant: Event, told: Sequence[Event], faults: Sequence[Event]) -> float:
    """Until when a client had certainly what it was granted."""
    last = float(told[-1]["ended"])
    ends = [
        event["began"] for event in faults if event["ended"] >= grant["began"] and (event["fault"] in CUTS or grant["pid"] in event.get("pids", ()))
    ]
    for event in told:
        left = event["kind"] == "leaves" and event["what"] == grant["what"] and event["began"] >= grant["ended"]
        if left or (event["kind"] == "torn" and event["ended"] >= grant["began"]):
            ends.append(event["began"])
            break
    return float(min(ends, default=last))


def _unexplained(events: Sequence[Event]) -> Iterator[str]:
    """A refusal, and a session that is lost, have a fault as their cause."""
    faults = [event for event in events if event["kind"] == "fault"]

    def during(event: Event, names: Sequence[str]) -> bool:
        return any(fault["fault"] in names and fault["began"] <= event["ended"] and event["began"] <= fault["ended"] for fault in faults)

    torn = {event["client"] for event in events if event["kind"] == "torn"}
    for event in events:
        if event["kind"] == "refused" and not during(event, EXPLAINED.get(event["code"], ())):
            yield f"{event['client']} was refused without a cause: {event['code']}"
        if event["kind"] == "lost" and event["client"] not in torn and not during(event, CUTS):
            yield f"{event['client']} lost its session without a cause"
