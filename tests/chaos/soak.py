"""A device server under steady load of all kinds: its memory and descriptors, and those of its keeper and supervisor, have to stay flat.

    make soak SEED=7 SOAK_S=600

The load comes in rounds. In each one new clients publish, attach, move, roll back, plan, hold, elect, open and close sessions, read status and
events, and ask for what they do not get; strangers vanish in the middle of a frame. A round ends in order, or all its clients are killed at once.
Then all is at rest: what is published is one page, and nobody is connected. What is measured there depends on nothing but what the server has kept,
so the rule can be strict. The event log, which has a limit, is filled first. Compared are the medians of the second and of the last quarter of the
rounds: descriptors, threads, allocations and files of the runtime directory must not be one more, memory not more than
`GROWTH_BYTES`. The journal, which is compacted now and then, must never be longer than `JOURNAL_BYTES`. And the history has to fit together, as
`chaos.history` says.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gms_core.client import Session, WriteLease
from gms_core.errors import GmsError
from gms_core.runtime_dir import journal_path
from gms_core.server.event_log import FREQUENT, RARE
from tests.chaos.faults import Scene, vanish
from tests.chaos.history import Event, check
from tests.chaos.restarts import HOST_MEMORY, Clients, left, unpin
from tests.chaos.worker import MODEL, PAGE
from tests.conftest import RunningServer, running_server

ROUNDS = 20
CLIENTS = 4
PAUSE_S = 0.005
GROWTH_BYTES = 2**20
"""A server's memory at rest comes and goes by some hundred KiB."""
JOURNAL_BYTES = 6 * 2**20
"""It is compacted from 1 MiB on once less than half of it counts. At rest one small manifest counts; just before that, several large ones did."""


@dataclass(frozen=True)
class Usage:
    """What one process has.

    Attributes:
        memory: Bytes that it shares with nobody's files (anonymous, in memory or swapped out): what others map does not change it.
    """

    memory: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """What there was at rest after a round, and the most that the server had during it."""

    at_s: float
    usage: dict[str, Usage]
    files: tuple[str, ...]
    journal: int
    allocations: int
    busiest: Usage


@dataclass
class Outcome:
    """What came of a soak.

    Attributes:
        killed: Rounds whose clients were killed.
        counts: What clients have told, by kind.
        findings: What must not be; empty if all is well.
    """

    seed: int
    seconds: float
    rounds: int = 0
    killed: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def growth(samples: Sequence[Sample], most_bytes: int = GROWTH_BYTES) -> list[str]:
    """What is not flat; see the module's text for the rule.

    Args:
        samples: One of each round.
        most_bytes: By which a process's memory may grow.
    """
    quarter = len(samples) // 4
    if not quarter:
        return [f"{len(samples)} rounds are too few to compare their quarters"]
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    found = []

    def compare(what: str, value: Callable[[Sample], int], most: int = 0) -> None:
        before, after = (statistics.median(map(value, some)) for some in (second, last))
        if after - before > most:
            found.append(f"{what}: {before:g} in the second quarter, {after:g} in the last one")

    for name in samples[0].usage:
        compare(f"bytes of memory of the {name}", lambda sample, name=name: sample.usage[name].memory, most_bytes)  # type: ignore[misc]
        compare(f"descriptors of the {name}", lambda sample, name=name: sample.usage[name].descriptors)  # type: ignore[misc]
        compare(f"threads of the {name}", lambda sample, name=name: sample.usage[name].threads)  # type: ignore[misc]
    compare("files of the runtime directory", lambda sample: len(sample.files))
    compare("allocations", lambda sample: sample.allocations)
    if (longest := max(sample.journal for sample in samples)) > JOURNAL_BYTES:
        found.append(f"the journal was {longest} bytes long")
    return found


def usage(pid: int) -> Usage:
    """What a process has now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    memory = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
    return Usage(memory, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))


def run(
    server: RunningServer,
    folder: Path,
    seed: int,
    seconds: float,
    *,
    rounds: int = ROUNDS,
    most_bytes: int = GROWTH_BYTES,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Load the server for so many seconds.

    Args:
        server: It has `HOST_MEMORY`.
        folder: For what clients tell.
        seed: Of whatever is left to chance.
        seconds: Of load, in all.
        rounds: How often all is at rest; at least 4.
        most_bytes: As of `growth`.
        tell: Called with a line after each round.
    """
    outcome, chance = Outcome(seed, seconds), random.Random(seed)
    history: list[Event] = []
    _fill_event_log(server)
    processes = {"server": server.pid, "keeper": server.keepers[0], "supervisor": server.supervisor.pid}
    began = time.monotonic()
    for number in range(rounds):
        place = folder / f"round-{number}"
        place.mkdir()
        with contextlib.closing(Clients(server.socket, place, seed, CLIENTS, first=number * CLIENTS, pause_s=PAUSE_S)) as clients:
            busiest = _load(server, chance, processes["server"], seconds / rounds)
            if chance.random() < 0.5:
                moment = time.monotonic()
                pids = [worker.pid for worker in clients.running]
                clients.close()
                history.append({"client": "", "kind": "fault", "fault": "kill client", "pids": pids, "began": moment, "ended": time.monotonic()})
                outcome.killed += 1
                told = clients.told()
            else:
                told = clients.end(outcome.findings)
        history += told
        outcome.findings += [f"{event['client']}: {event['error']}" for event in told if event["kind"] == "failed"]
        try:
            with _rest(server, outcome.findings) as allocations:
                sample = Sample(
                    round(time.monotonic() - began, 1),
                    {name: usage(pid) for name, pid in processes.items()},
                    tuple(sorted(path.name for path in server.directory.iterdir())),
                    journal_path(server.socket).stat().st_size,
                    allocations,
                    busiest,
                )
        except (GmsError, OSError) as error:
            outcome.findings.append(f"after round {number}: {error}")
            break
        outcome.samples.append(sample)
        outcome.rounds += 1
        tell(_line(sample, len(told)))
    outcome.counts = dict(Counter(event["kind"] for event in history))
    outcome.findings += [*check(history), *growth(outcome.samples, most_bytes)]
    return outcome


def _fill_event_log(server: RunningServer) -> None:
    """Have as many events of both sorts as the server keeps: from then on there are not more of them."""
    with server.connect("checker") as session:
        for mode, times in (("rw", RARE // 2), ("ro", FREQUENT // 2)):
            if mode == "ro":
                _publish_a_page(session)
            for _ in range(times):  # begun and given up: two events
                session.acquire("weights", mode, MODEL, timeout_s=10).release()


def _publish_a_page(session: Session) -> None:
    lease = session.acquire("weights", "rw", MODEL, timeout_s=10, slab_bytes=PAGE)
    assert isinstance(lease, WriteLease)
    session.driver.write(lease.arena.address(lease.arena.allocate(PAGE)), bytes(PAGE))
    lease.commit(json.dumps([PAGE, hashlib.sha256(bytes(PAGE)).hexdigest(), ""]).encode(), MODEL).release()


def _load(server: RunningServer, chance: random.Random, pid: int, seconds: float) -> Usage:
    """Let a round go on for so long; returns the most that the server had at a moment, of each."""
    strangers = Scene(server, chance, [], lambda _: None)
    end, most = time.monotonic() + seconds, usage(pid)
    while (remaining := end - time.monotonic()) > 0:
        vanish(strangers)
        time.sleep(min(remaining, 0.5))
        now = usage(pid)
        most = Usage(max(most.memory, now.memory), max(most.descriptors, now.descriptors), max(most.threads, now.threads))
    return most


@contextlib.contextmanager
def _rest(server: RunningServer, findings: list[str]) -> Iterator[int]:
    """Publish one page, and wait until nobody else is connected; says how many allocations there are."""
    unpin(server)
    findings += left(server)
    with server.connect("checker") as session:
        _publish_a_page(session)
    findings += left(server)
    with server.connect("checker") as session:
        while len((report := session.status()).sessions) > 1:
            time.sleep(0.01)
        yield report.allocations


def _line(sample: Sample, events: int) -> str:
    words = [f"{name} {one.memory / 2**20:.1f} MiB, {one.descriptors} descriptors" for name, one in sample.usage.items()]
    return "; ".join([*words, f"journal {sample.journal / 2**20:.1f} MiB", f"{events} events"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=Path("build/soak.json"))
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    began = time.monotonic()

    def tell(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - began:7.1f} s  {line}\n")
        sys.stdout.flush()

    tell(f"SEED={seed} SOAK_S={options.seconds:g}")
    with tempfile.TemporaryDirectory(prefix="gms-") as folder, running_server(Path(folder, "run"), host_memory=HOST_MEMORY) as server:
        outcome = run(server, Path(folder), seed, options.seconds, tell=tell)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    for finding in outcome.findings[:20]:
        tell(f"FOUND {finding}")
    tell(f"{options.out}: {'not flat, or wrong' if outcome.findings else 'flat'}; {outcome.counts}")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
