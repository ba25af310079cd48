"""What must not be there: memory that nobody planned, and descriptors of engines that are gone."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from chaos.kills import WEIGHTS
from gms_core.protocol.messages import StatusReport


class Memory(NamedTuple):
    """What a device server has allocated."""

    weights: int
    retained: int
    total: int
    allocations: int


def memory(report: StatusReport) -> Memory | None:
    """What is allocated; None while weights are being written or KV memory is being planned."""
    weights = [pool for pool in report.pools if pool.name == WEIGHTS]
    if len(weights) != 1 or not weights[0].generation or weights[0].draft_bytes or len(report.retained) != 1 or not report.retained[0].bytes:
        return None
    pool, kv = weights[0], report.retained[0]
    return Memory(pool.bytes, kv.bytes, report.allocated_bytes, report.allocations)


def wrong_memory(report: StatusReport, first: Memory) -> list[str]:
    """What differs from the memory that the first engines came to; nothing while that cannot be said."""
    now = memory(report)
    if now is None:
        return []
    found = [f"{name} was {before}, is {after}" for name, before, after in zip(Memory._fields, first, now, strict=True) if before != after]
    pool, kv = next(pool for pool in report.pools if pool.name == WEIGHTS), report.retained[0]
    if pool.retired_bytes:
        found.append(f"{pool.retired_bytes} bytes of weights of older generations are left")
    if now.weights + now.retained != now.total or pool.allocations + kv.allocations != now.allocations:
        found.append(f"{now} do not add up: {pool.allocations} + {kv.allocations} allocations")
    return found


def descriptors(pid: int) -> Counter[str]:
    """Open descriptors of a process, counted by what they are."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        found["memory" if target.startswith("/memfd:") else target.partition(":")[0]] += 1
        found["pidfd"] += target == "anon_inode:[pidfd]"
    return found


def wrong_descriptors(server: Any, report: StatusReport) -> list[str]:
    """What the device server has open that its report does not explain: it watches a process for each member, and has a file for each allocation."""
    found = descriptors(server.pid)
    members = sum(len(cohort.members) for cohort in report.cohorts)
    wrong = []
    if found["pidfd"] != members:
        wrong.append(f"{found['pidfd']} processes are watched, of {members} members")
    if found["memory"] < report.allocations or (not members and found["memory"] != report.allocations):
        wrong.append(f"{found['memory']} files of memory are open, for {report.allocations} allocations")
    return wrong
