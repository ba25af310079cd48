"""What must not be there: memory that nobody planned, and descriptors of engines that are gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from gms_core.protocol.messages import StatusReport

WEIGHTS = "weights"


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


def descriptors(pid: int) -> tuple[int, set[int]]:
    """How many files of memory a process has open, and which processes it watches; -1 is one that has exited."""
    files: set[int] = set()
    watched: set[int] = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry)
            if target == "anon_inode:[pidfd]":
                facts = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
                watched |= {int(line.split()[1]) for line in facts.splitlines() if line.startswith("Pid:")}
            elif target.startswith("/memfd:"):
                files.add(entry.stat().st_ino)
    return len(files), watched


def wrong_descriptors(server: Any, report: StatusReport) -> list[str]:
    """What server and keeper have open that the report does not explain: descriptors of processes that are no engine's, and of memory."""
    files, watched = descriptors(server.pid)
    members = {member.pid for cohort in report.cohorts for member in cohort.members}
    keepers = server.keepers
    wrong = []
    if not watched <= members | set(keepers):
        wrong.append(f"processes {watched - members - set(keepers)} are watched, which are no engine's")
    if files < report.allocations or (not members and files > report.allocations):
        wrong.append(f"{files} files of memory are open, for {report.allocations} allocations")
    kept = [descriptors(keeper)[0] for keeper in keepers]
    if kept != [report.allocations]:
        wrong.append(f"{len(keepers)} keepers have {kept} files of memory, for {report.allocations} allocations")
    return wrong
