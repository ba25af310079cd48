"""One run: kinds of kills, dealt by a seed, one after the other, and what came of them."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from failover_story import Client, Story

from chaos.fleet import GROUP, Fleet, StuckError
from chaos.kills import KINDS, PARTS, Blow, Scene
from chaos.leftovers import Memory, memory, wrong_descriptors, wrong_memory
from chaos.load import Load
from chaos.reference import ask_stock
from chaos.warden import Warden
from chaos.watch import Watch
from tests.ports import free_port

RARE = {"lose everything", "kill writer"}
LOSE_EVERY = 15
"""Common kinds after which the server is killed with its keeper, and then the next engine that loads the weights."""
COSTS = {"kill promoting": 2, "kill two": 2}
"""Engines that a kind takes, if not one."""
BRIDGE_BYTES = 4 * 2**20
"""With which engines begin in runs of odd seeds; in the others they wait for the end of the last one."""
DEADLINE_S = 8.0
SETTLE_S = 30.0


def possible(story: Story) -> list[str]:
    """Kinds that an engine of a story has processes for."""
    others = set(PARTS) - {GROUP, *story.parts}
    return [kind for kind in KINDS if kind.partition(" ")[2] not in others]


def dealt(chance: random.Random, story: Story) -> Iterator[str]:
    """Kinds without end: every common one comes before any comes again, in an order left to chance; now and then everything is lost."""
    common = [kind for kind in possible(story) if kind not in RARE]
    yield "kill writer"
    count = 0
    while True:
        for kind in chance.sample(common, len(common)):
            yield kind
            count += 1
            if count % LOSE_EVERY == LOSE_EVERY // 2:
                yield from ("lose everything", "kill writer")


def first_kinds(chance: random.Random, kills: int, story: Story) -> list[str]:
    """As many dealt kinds as have that many kills, or one more."""
    kinds: list[str] = []
    for kind in dealt(chance, story):
        if sum(COSTS.get(chosen, 1) for chosen in kinds) >= kills:
            break
        kinds.append(kind)
    return kinds


@dataclass
class Result:
    """What came of a run; `ok` is the point of it.

    Attributes:
        kills: Processes, or groups of them, that were killed or stopped.
        max_primaries: Primaries at one instant, at most, from whichever side there seemed to be the most.
        wrong_tokens: Answers that a stock engine would not have given.
        failed_promotions: Engines that were elected and ended although nobody had killed them, and kills after which nobody served in time.
        leftovers: Processes, descriptors and memory of the dead.
    """

    seed: int
    kills: int = 0
    max_primaries: int = 0
    wrong_tokens: int = 0
    failed_promotions: int = 0
    leftovers: int = 0
    unexpected_ends: int = 0
    requests: dict[str, Any] = field(default_factory=dict)
    engine_starts: int = 0
    duration_s: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    recovery_s: dict[str, dict[str, float]] = field(default_factory=dict)
    primaries_seen: dict[str, Any] = field(default_factory=dict)
    blows: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all was as it has to be."""
        faults = self.wrong_tokens + self.failed_promotions + self.leftovers + self.unexpected_ends
        return self.max_primaries == 1 and not faults and not self.findings


class Run:
    """Kills, and looks.

    Args:
        story: Whose engines are killed.
        seed: Decides everything that is left to chance.
        tell: Called with a line about each step.
        shadows: How many there are to be.
        at_once: How many engines may be starting at the same time.
        nice: Of a primary's rank, as `Fleet` has it.
    """

    def __init__(self, story: Story, seed: int, tell: Callable[[str], None], *, shadows: int = 2, at_once: int = 2, nice: int = 0) -> None:
        self.result = Result(seed)
        self._story, self._server, self._tell = story, story.server, tell
        self._shadows, self._at_once, self._nice = shadows, at_once, nice
        self._first: Memory | None = None

    def go(self, kinds: Sequence[str], warden: Warden, stock: list[list[str]] | None = None) -> Result:
        """Carry out kinds of kills, unless something goes so wrong that it cannot go on.

        Args:
            kinds: Of `KINDS`, in their order.
            warden: Of all that is started.
            stock: What a stock engine answers, if that is known already; else vLLM is asked.
        """
        story = self._story
        began = time.monotonic()
        port = free_port()
        temporary = tempfile.mkdtemp(prefix="gms-")
        failover = {"deadline_s": DEADLINE_S, "bridge_bytes": BRIDGE_BYTES if self.result.seed % 2 else 0}
        options: dict[str, Any] = {"at_once": self._at_once, "failover": failover, "temporary": temporary, "nice": self._nice}
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            fleet = stack.enter_context(Fleet(story, port, warden, **options))
            watch = stack.enter_context(Watch(self._server, port, lambda: running(fleet)))
            asking = stack.enter_context(ThreadPoolExecutor(1))
            expected = asking.submit(lambda: stock if stock is not None else ask_stock(story.model, story.folder))
            with Load(Client(story.model, port), expected) as load:
                scene = Scene(fleet, load, random.Random(self.result.seed))
                self._carry_out(scene, kinds)
            self._note(scene, watch)
        self.result.duration_s = round(time.monotonic() - began, 1)
        return self.result

    def _carry_out(self, scene: Scene, kinds: Sequence[str]) -> None:
        try:
            for done, kind in enumerate(kinds):
                scene.fleet.shadows = min(self._shadows, sum(COSTS.get(later, 1) for later in kinds[done:]))
                since, count = time.monotonic(), len(scene.blows)
                KINDS[kind](scene, kind)
                self._look(scene)
                for blow in scene.blows[count:]:
                    took = f", answered after {blow.recovered_s:.3f} s" if blow.recovered_s is not None else ""
                    self._tell(f"{kind}: {blow.role} {blow.victim} ({blow.part}){took}; {blow.serves} serves [{time.monotonic() - since:.0f} s]")
            self._end(scene)
        except StuckError as error:
            self.result.findings.append(str(error))
            self.result.failed_promotions += "answer" in str(error)
            self._tell(f"stuck: {error}")

    def _look(self, scene: Scene) -> None:
        """Compare the server's memory and descriptors with what they have to be; give it time to hear of the dead."""
        report = scene.fleet.report()
        if self._first is None and report is not None:
            self._first = memory(report)
        first = self._first
        if first is None:
            return
        if first.retained < self._story.kv_bytes:
            self.result.findings.append(f"the retained pool is too small: {first}")

        def settled() -> bool:
            now = scene.fleet.report()
            return now is not None and not wrong_memory(now, first) and not wrong_descriptors(self._server, now)

        try:
            scene.fleet.until(settled, "memory and descriptors are as they were", SETTLE_S)
        except StuckError:
            report = scene.fleet.report()
            scene.fleet.left += [] if report is None else wrong_memory(report, first) + wrong_descriptors(self._server, report)

    def _end(self, scene: Scene) -> None:
        """End all engines in order, the shadows first; nothing but the planned memory may be left then."""
        fleet = scene.fleet
        fleet.shadows = -1
        primary = scene.primary()
        scene.load.end()  # vLLM waits for ever for a request that has come while its engine was being stopped
        for life in sorted(fleet.lives, key=lambda life: life is primary):
            if not life.dying:
                polite = life.last in ("standby", "primary")
                life.doomed, life.must_end, life.files = "its orderly end", True, life.files | life.running.named_memory()
                life.running.process.send_signal(signal.SIGTERM if polite else signal.SIGKILL)
                fleet.until_gone(life)
                if polite and not self._story.ended_in_order(life.running):
                    self.result.findings.append(f"{life.name} did not end in order:\n{life.running.tail()}")
        for life in list(fleet.lives):
            fleet.until_gone(life)
        fleet.until(lambda: (report := fleet.report()) is not None and not report.cohorts, "the server has heard of all ends", SETTLE_S)
        self._look(scene)

    def _note(self, scene: Scene, watch: Watch) -> None:
        result, fleet, load = self.result, scene.fleet, scene.load
        result.kills = len(scene.blows)
        result.max_primaries = watch.most
        result.primaries_seen = {"by_role": watch.most_roles, "by_socket": watch.most_listeners, "conflicts": watch.conflicts, "looks": watch.looks}
        result.wrong_tokens = len(load.wrong)
        result.requests = {"answered": load.answered, "failed": dict(load.failed)}
        result.failed_promotions += sum("promoting" in end.partition("\n")[0] for end in fleet.unexpected)
        result.unexpected_ends = len(fleet.unexpected)
        result.leftovers = len(fleet.left)
        result.engine_starts = fleet.starts
        result.kinds = dict(Counter(blow.kind for blow in scene.blows))
        result.recovery_s = recoveries(scene.blows)
        result.blows = [asdict(blow) for blow in scene.blows]
        result.findings += [f"wrong tokens: {wrong}" for wrong in load.wrong[:10]] + fleet.unexpected + fleet.left + watch.conflicts


def running(fleet: Fleet) -> list[Any]:
    """All engines of which anything is left, for another thread."""
    return [life.running for life in tuple(fleet.lives)]


def recoveries(blows: list[Blow]) -> dict[str, dict[str, float]]:
    """Seconds from a kill to the first answer, by kind."""
    by_kind: dict[str, list[float]] = {}
    for blow in blows:
        if blow.recovered_s is not None:
            by_kind.setdefault(blow.kind, []).append(blow.recovered_s)
    return {
        kind: {"count": len(seconds), "median": round(statistics.median(seconds), 4), "max": round(max(seconds), 4)}
        for kind, seconds in sorted(by_kind.items())
    }


def write(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=2) + "\n")
