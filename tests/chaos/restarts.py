"""Kills of a device server while clients attach, publish, hold and elect: what each of them was told is compared with what all others were told.

    make restarts SEED=7 KILLS=200

Clients are processes that do one thing after the other, chosen by a seed, and say each answer with the times around it. Nothing may be refused that a
server which was never killed would grant, and the answers have to fit together: a generation has one content, which every reader of it finds; who
asks after a commit was acknowledged finds that generation or a later one; an epoch and a term are granted once, and later ones are higher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_core.errors import GmsError
from tests.conftest import RunningServer, running_server

PROGRAM = """
import hashlib, json, os, random, sys, time
from pathlib import Path
from gms_core.client import Membership, RetainedPool, WriteLease, connect
from gms_core.errors import AcquireTimeout
from gms_core.layout import Identity
from gms_core.vmm.driver import Access

socket, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chance, MODEL, PAGE = random.Random(seed), Identity({"content": "abc"}), 4096
session = connect(socket_path=socket, client=name)
number = 0

def say(kind, began, **facts):
    print(json.dumps({"client": name, "kind": kind, "began": began, "ended": time.monotonic(), **facts}), flush=True)

def publish():
    began = time.monotonic()
    lease = session.acquire("weights", "rw", MODEL, timeout_s=60, slab_bytes=4 * PAGE)
    content = b""
    for _ in range(chance.randint(1, 6)):
        part = os.urandom(chance.randint(1, 8 * PAGE))
        offset = lease.arena.allocate(len(part), alignment=1)
        session.driver.write(lease.arena.address(offset), part)
        content += part
    if chance.random() < 0.2:
        lease.release()
        say("gave up", began)
        return
    asked = time.monotonic()
    digest = hashlib.sha256(content).hexdigest()
    read = lease.commit(json.dumps([len(content), digest]).encode(), MODEL)
    say("published", asked, generation=read.layout.generation, digest=digest)
    read.release()

def attach():
    began = time.monotonic()
    lease = session.acquire("weights", chance.choice(["ro", "auto"]), MODEL, timeout_s=60, slab_bytes=4 * PAGE)
    if isinstance(lease, WriteLease):
        lease.release()
        return
    size, digest = json.loads(lease.layout.manifest)
    base = lease.map().base
    found = hashlib.sha256(session.driver.read(base, size)).hexdigest()
    if chance.random() < 0.3:
        lease.unmap()
        session.status()
        lease.remap()
        found = hashlib.sha256(session.driver.read(base, size)).hexdigest()
    say("read", began, generation=lease.layout.generation, digest=found, said=digest)
    lease.release()

def look():
    began = time.monotonic()
    report = session.status()
    say("looked", began, allocations=report.allocations)

def serve():
    # An engine of one process: elected, it holds the memory, and dies without a word or leaves in order.
    global number
    number += 1
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        own = connect(socket_path=socket, client=f"{name} engine {number}")
        cohort = f"{name}-{number}"
        member = Membership.join(own, cohort, cohort, "rank 0")
        began = time.monotonic()
        term = member.elect("primary", 120.0)
        say("elected", began, term=term)
        pool = RetainedPool(own, "kv")
        if pool.plan(Identity({"kind": "kv"}), 60.0) is None:
            pool.provide(b"plan", [2 * PAGE, PAGE], 10.0)
        held = pool.hold(60.0)
        began = time.monotonic()
        base = own.driver.reserve(3 * PAGE)
        at = {a.id: a.offset for a in pool.planned.allocations}
        def take(received):
            for item in received:
                own.driver.map(base + at[item.id], item.size, own.driver.import_descriptor(item.descriptor, item.size))
        pool.receive(take)
        own.driver.set_access(base, 3 * PAGE, Access.READ_WRITE)
        before = int.from_bytes(own.driver.read(base, 8), "little")
        own.driver.write(base, held.epoch.to_bytes(8, "little"))
        time.sleep(chance.uniform(0, 0.1))
        own.status()
        after = int.from_bytes(own.driver.read(base, 8), "little")
        say("held", began, epoch=held.epoch, before=before, after=after)
        if chance.random() < 0.3:
            member.depart(10.0)
        os._exit(0)
    except BaseException as error:
        print(json.dumps({"client": name, "kind": "failed", "error": repr(error)}), flush=True)
        os._exit(1)

ACTIONS = [publish, attach, attach, attach, look, serve] if name.startswith("all") else [serve]
while not os.path.exists(sys.argv[4]):
    try:
        chance.choice(ACTIONS)()
    except AcquireTimeout as error:
        print(json.dumps({"client": name, "kind": "failed", "error": repr(error)}), flush=True)
    except Exception as error:
        import traceback
        print(json.dumps({"client": name, "kind": "failed", "error": traceback.format_exc()[-1500:]}), flush=True)
        session = connect(socket_path=socket, client=name)
"""


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        findings: What must not be; empty if all is well.
    """

    seed: int
    kills: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def check(events: Iterable[dict[str, Any]]) -> list[str]:
    """What in a history cannot be."""
    events = sorted((event for event in events if "ended" in event), key=lambda event: float(event["ended"]))
    return [*_generations(events), *_grants(events, "elected", "term"), *_grants(events, "held", "epoch"), *_held(events)]


def _generations(events: list[dict[str, Any]]) -> Iterator[str]:
    content: dict[int, str] = {}
    for event in events:
        if event["kind"] == "published":
            if event["generation"] in content:
                yield f"generation {event['generation']} was published twice"
            content[event["generation"]] = event["digest"]
    for event in events:
        if event["kind"] == "read":
            expected = content.get(event["generation"], event["said"])
            if not event["digest"] == event["said"] == expected:
                yield f"generation {event['generation']} was read as {event['digest'][:8]}, and is {expected[:8]}"
    acknowledged = [(event["ended"], event["generation"]) for event in events if event["kind"] == "published"]
    for event in events:
        if event["kind"] in ("read", "published"):
            due = max((generation for at, generation in acknowledged if at < event["began"]), default=0)
            if event["generation"] < due or (event["kind"] == "published" and event["generation"] == due):
                yield f"{event['client']} found generation {event['generation']}, after {due} was acknowledged"


def _grants(events: list[dict[str, Any]], kind: str, number: str) -> Iterator[str]:
    last = 0
    for event in events:
        if event["kind"] == kind:
            if event[number] <= last:
                yield f"{number} {event[number]} was granted after {last}"
            last = event[number]


def _held(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        if event["kind"] == "held":
            if event["after"] != event["epoch"]:
                yield f"the memory of epoch {event['epoch']} was written to by epoch {event['after']} while it was held"
            if event["before"] >= event["epoch"]:
                yield f"epoch {event['epoch']} found what epoch {event['before']} had written"


def run(server: RunningServer, folder: Path, seed: int, kills: int, clients: int = 4) -> Outcome:
    """Kill the server again and again while clients work, and compare what they were told."""
    outcome, chance = Outcome(seed), random.Random(seed)
    end = folder / "end"
    logs = [folder / f"client-{number}.log" for number in range(clients)]
    with contextlib.ExitStack() as stack:
        workers = []
        for number, log in enumerate(logs):
            output = stack.enter_context(log.open("wb"))
            name = f"all-{number}" if number < clients - 1 else f"engines-{number}"
            command = [sys.executable, "-c", PROGRAM, str(server.socket), name, str(seed * 1000 + number), str(end)]
            workers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output))
            stack.callback(_reap, workers[-1])
        for _ in range(kills):
            time.sleep(chance.choice([0.0, 0.02, 0.2]) + chance.uniform(0.0, 0.3))
            os.kill(server.supervisor_child, signal.SIGKILL)
            server.wait_until_ready()
            outcome.kills += 1
        time.sleep(1.0)
        end.touch()
        for worker in workers:
            try:
                worker.wait(120)
            except subprocess.TimeoutExpired:
                outcome.findings.append(f"client {worker.args[3]} hangs")  # type: ignore[index]
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    for event in events:
        outcome.counts[event["kind"]] = outcome.counts.get(event["kind"], 0) + 1
    outcome.findings += [f"{event['client']}: {event['error']}" for event in events if event["kind"] == "failed"]
    outcome.findings += check(events)
    outcome.findings += _left(server)
    return outcome


def _left(server: RunningServer) -> list[str]:
    """What the server has that nobody needs any more."""
    deadline = time.monotonic() + 10.0
    while True:
        try:
            with server.connect("checker") as session:
                report = session.status()
        except GmsError as error:
            return [f"the server does not answer: {error}"]
        explained = sum(pool.allocations for pool in report.pools) + sum(pool.allocations for pool in report.retained)
        wrong = [
            f"{report.allocations} allocations, of which pools explain {explained}" if report.allocations != explained else "",
            *(f"pool {pool.name} has a draft or older generations" for pool in report.pools if pool.draft_bytes or pool.retired_bytes),
            *(f"cohort {cohort.name} is left" for cohort in report.cohorts),
        ]
        found = [sentence for sentence in wrong if sentence]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _reap(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.kill()
    worker.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gms-") as folder, running_server(Path(folder) / "run") as server:
        outcome = run(server, Path(folder), options.seed, options.kills)
    sys.stdout.write(
        json.dumps({"seed": outcome.seed, "kills": outcome.kills, "counts": outcome.counts, "findings": outcome.findings[:20]}, indent=2) + "\n"
    )
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
