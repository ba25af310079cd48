"""Faults of a device server and its clients, while these attach, publish, move, roll back, hold and elect: what each was told is compared with what
all others were.

    make restarts SEED=7 KILLS=200 FAULTS=200

Clients are processes that do one thing after the other, chosen by a seed, and say each answer with the times around it. The same seed deals the
faults: kills of the server, and as many others of the kinds in `chaos.faults`. Nothing may be refused that a server without faults would grant, but
for a cause, and the answers have to fit together, as `chaos.history` says.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gms_core.client import PoolGenerations, ReadLease
from gms_core.errors import GenerationNotFound, GmsError
from gms_core.server.limits import Limits
from tests.chaos.faults import Scene, dealt, inflict, small_disk
from tests.chaos.history import CUTS, Event, check
from tests.chaos.worker import MODEL
from tests.conftest import RunningServer, running_server

HOST_MEMORY = 4 * 2**20
"""Bytes that the server has: a few times what all clients need at once, and little enough for somebody to have all of it."""
GRACE_S = Limits().grace_s
PATIENCE_S = GRACE_S + 10.0
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        kills: Of the server.
        faults: How many of each kind there were.
        counts: What clients have told, by kind.
        refused: Requests that were refused, by code; each has a fault as its cause, or is a finding.
        findings: What must not be; empty if all is well.
    """

    seed: int
    kills: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


class Clients:
    """Processes that work until they are told to end; to be used as a context, which leaves none behind.

    Attributes:
        running: Their processes. Each leads a group, with the engines that it starts.
    """

    def __init__(self, socket: Path, folder: Path, seed: int, count: int, *, first: int = 0, pause_s: float = 0.0) -> None:
        """Start some: the last one does nothing but start engines.

        Args:
            socket: The server's.
            folder: For what they tell.
            seed: Of what they do.
            count: How many.
            first: Number of the first one.
            pause_s: Seconds between two things that one does, on average.
        """
        self._socket, self._folder, self._seed, self._pause_s = socket, folder, seed, pause_s
        self._end = folder / "end"
        self._started = first
        self._logs: list[Path] = []
        self._all: list[subprocess.Popen[bytes]] = []
        self.running: list[subprocess.Popen[bytes]] = []
        for number in range(count):
            self.running.append(self._start("engines" if number == count - 1 else "all"))

    def _start(self, kind: str) -> subprocess.Popen[bytes]:
        number, self._started = self._started, self._started + 1
        self._logs.append(self._folder / f"client-{number}.log")
        words = [self._socket, f"{kind}-{number}", self._seed * 1000 + number, self._end, self._pause_s]
        with self._logs[-1].open("wb") as output:
            worker = subprocess.Popen(
                [sys.executable, "-P", os.fspath(WORKER), *map(str, words)], stdin=subprocess.DEVNULL, stdout=output, start_new_session=True
            )
        self._all.append(worker)
        return worker

    def replace(self, number: int) -> None:
        """Another one does what the one that was killed has done."""
        dead = self.running[number]
        dead.wait(30)
        self.running[number] = self._start(dead.args[4].partition("-")[0])  # type: ignore[index]

    def end(self, findings: list[str]) -> list[Event]:
        """Have them end in order, and return what they have told."""
        self._end.touch()
        for worker in self.running:
            try:
                worker.wait(120)
            except subprocess.TimeoutExpired:
                findings.append(f"client {worker.args[4]} hangs")  # type: ignore[index]
        self.close()
        self._end.unlink()
        return self.told()

    def told(self) -> list[Event]:
        """What they have told until now."""
        return [json.loads(line) for log in self._logs for line in log.read_text().splitlines()]

    def close(self) -> None:
        """End them all, with their engines. Idempotent."""
        for worker in self._all:
            with contextlib.suppress(ProcessLookupError):  # the group has gone
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait(30)
        self._all.clear()


def run(
    server: RunningServer,
    folder: Path,
    seed: int,
    kinds: Sequence[str],
    *,
    clients: int = 4,
    disk: Path | None = None,
    patience_s: float = PATIENCE_S,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Do one fault after the other while clients work, and compare what they were told.

    Args:
        server: It has `HOST_MEMORY`.
        folder: For what clients tell, and all of it in ``history.json``.
        seed: Of whatever is left to chance.
        kinds: Of faults, in order; see `chaos.faults.dealt`.
        clients: How many there are at a time.
        disk: The small file system that the runtime directory is on.
        patience_s: As `left` says.
        tell: Called with each fault.
    """
    outcome, chance = Outcome(seed), random.Random(seed)
    with contextlib.closing(Clients(server.socket, folder, seed, clients)) as workers:
        scene = Scene(server, chance, workers.running, workers.replace, disk)  # type: ignore[arg-type]
        for kind in kinds:
            time.sleep(chance.choice([0.0, 0.02, 0.2]) + chance.uniform(0.0, 0.3))
            tell(kind)
            before = scene.kills
            inflict(scene, kind)
            if kind in CUTS and scene.kills > before and patience_s >= GRACE_S:
                outcome.findings += _away(server)
            unpin(server)
        time.sleep(1.0)
        told = workers.end(outcome.findings)
    unpin(server)
    told.append(_last_read(server))
    outcome.kills, outcome.faults = scene.kills, dict(Counter(event["fault"] for event in scene.events))
    outcome.counts = dict(Counter(event["kind"] for event in told))
    outcome.refused = dict(Counter(event["code"] for event in told if event["kind"] == "refused"))
    outcome.findings += [f"{event['client']}: {event['error']}" for event in told if event["kind"] == "failed"]
    outcome.findings += check([*told, *scene.events])
    outcome.findings += left(server, patience_s)
    (folder / "history.json").write_text(json.dumps([*told, *scene.events]))
    return outcome


def _away(server: RunningServer) -> list[str]:
    """Wait until the server waits for no session of the one before; those that do not come back in time are given up.

    A server that could not write down that it has ended a session, and was killed, leaves the session and its leases to the next one. Each further
    kill would have that wait for it anew, and a writer among them would keep all others waiting.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with server.connect("checker") as session:
            away = [f"session {one.id} of {one.client} is still waited for" for one in session.status().sessions if one.away]
        if not away or time.monotonic() > deadline:
            return away
        time.sleep(0.1)


def _last_read(server: RunningServer) -> Event:
    """What is published in the end; generation 0 if nothing is."""
    began, generation, digest, said = time.monotonic(), 0, "", ""
    with server.connect("checker") as session:
        if any(one.committed for one in PoolGenerations(session, "weights").all()):
            with session.acquire("weights", "ro", MODEL, timeout_s=10) as lease:
                assert isinstance(lease, ReadLease)
                size, said, _ = json.loads(lease.layout.manifest)
                generation, digest = lease.layout.generation, hashlib.sha256(session.driver.read(lease.map().base, size)).hexdigest()
    times = {"began": began, "ended": time.monotonic()}
    return {"client": "checker", "pid": os.getpid(), "kind": "read", "generation": generation, "digest": digest, "said": said, **times}


def unpin(server: RunningServer) -> None:
    """Unpin what clients have pinned that are dead by now. Those that live read what they pin, and miss nothing."""
    with server.connect("checker") as session:
        for generation in PoolGenerations(session, "weights").all():
            if generation.pinned:
                with contextlib.suppress(GenerationNotFound):
                    PoolGenerations(session, "weights").unpin(generation.generation)


def left(server: RunningServer, patience_s: float = PATIENCE_S) -> list[str]:
    """What the server has that nobody needs any more.

    A client may have closed its session while there was no server, or while the server could not write that down, just before it was killed. The next
    one cannot know, and keeps what the session has for a while, since the process lives.

    Args:
        server: Nobody else uses it.
        patience_s: Seconds to wait. If they are less than such a while, what there is then is not looked at, should there be such a session.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with server.connect("checker") as session:
                report = session.status()
        except GmsError as error:
            return [f"the server does not answer: {error}"]
        found = list(_superfluous(report))
        if not found or time.monotonic() > deadline:
            return [] if patience_s < GRACE_S and any(session.away for session in report.sessions) else found
        time.sleep(0.1)


def _superfluous(report: Any) -> Iterator[str]:
    explained = sum(pool.allocations for pool in report.pools) + sum(pool.allocations for pool in report.retained)
    if report.allocations != explained:
        yield f"{report.allocations} allocations, of which pools explain {explained}"
    for pool in report.pools:
        if pool.draft_bytes or pool.retired_bytes:
            yield f"pool {pool.name} has a draft or older generations"
    for cohort in report.cohorts:
        yield f"cohort {cohort.name} is left"
    for session in report.sessions:
        if session.client != "checker" or session.away:
            yield f"session {session.id} of {session.client} (pid {session.pid}) is left"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kills", type=int, default=200, help="of the server, and some more during other faults")
    parser.add_argument("--faults", type=int, default=None, help="of other kinds; as many as kills if not given")
    parser.add_argument("--out", type=Path, default=Path("build/restarts.json"))
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    faults = options.kills if options.faults is None else options.faults
    began = time.monotonic()

    def tell(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - began:7.1f} s  {line}\n")
        sys.stdout.flush()

    tell(f"SEED={seed} KILLS={options.kills} FAULTS={faults}")
    with tempfile.TemporaryDirectory(prefix="gms-") as folder:
        run_folder = Path(folder, "run")
        run_folder.mkdir(mode=0o700)
        with small_disk(run_folder) as disk, running_server(run_folder, host_memory=HOST_MEMORY) as server:
            if disk is None:
                tell("the disk is never full, since no file system may be mounted here; files are limited instead")
            kinds = dealt(random.Random(seed), options.kills, faults, disk=disk is not None)
            outcome = run(server, Path(folder), seed, kinds, disk=disk, tell=tell)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if outcome.findings:
            shutil.copy(Path(folder, "history.json"), options.out.with_suffix(".history.json"))
    options.out.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    sys.stdout.write(json.dumps({**asdict(outcome), "findings": outcome.findings[:20]}, indent=2) + "\n")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
