"""The values of metrics in a server's report. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, get_args

from gms_core.events import Kind
from gms_core.protocol.base import Role
from gms_core.protocol.messages import Durations, Observation, StatusReport

GRANTS = {"write": Kind.POOL_DRAFT_BEGUN, "read": Kind.POOL_LEASE_GRANTED, "hold": Kind.POOL_EPOCH_GRANTED}
"""The event that a lease of each mode is granted."""


class Sample(NamedTuple):
    """One value.

    Attributes:
        labels: Values of the metric's labels, in the order of the table, after the device's.
    """

    name: str
    labels: tuple[str, ...]
    value: float | Durations


def samples(device: str, report: StatusReport | None) -> Iterator[Sample]:
    """All values of a device.

    Args:
        device: Whose.
        report: What its server says; None if it does not answer.
    """
    yield Sample("gms_up", (device,), float(report is not None))
    if report is None:
        return
    yield Sample("gms_build_info", (device, report.server, report.driver), 1)
    plain = {
        "gms_server_uptime_seconds": report.uptime_s,
        "gms_memory_free_bytes": report.memory_free,
        "gms_memory_total_bytes": report.memory_total,
        "gms_memory_allocated_bytes": report.allocated_bytes,
        "gms_allocations": report.allocations,
        "gms_memory_waiting": report.waiting_for_memory,
        "gms_sessions": report.observation.sessions if report.observation is not None else len(report.sessions),
    }
    for name, value in plain.items():
        yield Sample(name, (device,), value)
    yield from _pools(device, report)
    roles = Counter("fenced" if cohort.state == "fencing" else cohort.role for cohort in report.cohorts)
    for role in get_args(Role):
        yield Sample("gms_engines", (device, role), roles[role])
    if report.observation is not None:
        yield from _counted(device, report.observation)


def _pools(device: str, report: StatusReport) -> Iterator[Sample]:
    for pool in report.pools:
        yield Sample("gms_pool_generation", (device, pool.name), pool.generation)
        for layout, size in (("committed", pool.bytes), ("draft", pool.draft_bytes), ("retired", pool.retired_bytes)):
            yield Sample("gms_pool_bytes", (device, pool.name, layout), size)
        yield Sample("gms_pool_readers", (device, pool.name), len(pool.readers))
        yield Sample("gms_pool_pinned", (device, pool.name), sum(one.pinned for one in pool.generations))
        yield Sample("gms_pool_waiting", (device, pool.name), len(pool.waiting))
    for retained in report.retained:
        yield Sample("gms_retained_epoch", (device, retained.name), retained.epoch)
        yield Sample("gms_retained_bytes", (device, retained.name), retained.bytes)
        yield Sample("gms_retained_held", (device, retained.name), float(bool(retained.holder)))
        yield Sample("gms_retained_waiting", (device, retained.name), len(retained.waiting))
    for lock in report.locks:
        yield Sample("gms_lock_term", (device, lock.name), lock.term)
        yield Sample("gms_lock_held", (device, lock.name), float(bool(lock.owner)))


def _counted(device: str, seen: Observation) -> Iterator[Sample]:
    events = seen.events
    for outcome in ("adopted", "lost"):
        yield Sample("gms_server_restarts_total", (device, outcome), seen.restarts.get(outcome, 0))
    yield Sample("gms_commits_total", (device,), events.get(Kind.POOL_COMMITTED, 0))
    for mode, kind in GRANTS.items():
        yield Sample("gms_leases_granted_total", (device, mode), events.get(kind, 0))
    for counted in seen.requests:
        yield Sample("gms_requests_total", (device, counted.request, counted.outcome), counted.count)
    yield Sample("gms_fences_total", (device,), events.get(Kind.ENGINE_FENCED, 0))
    yield Sample("gms_fence_seconds", (device,), seen.fences)
    for name in {str(kind): None for kind in Kind if kind is not Kind.EVENTS_LOST} | dict.fromkeys(events):
        yield Sample("gms_events_total", (device, name), events.get(name, 0))
