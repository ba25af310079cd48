"""Every metric of GMS: its name, kind, labels and meaning. The same table is in docs/reference/metrics.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        kind: As Prometheus calls it.
        help: What it says, in a sentence.
        labels: Besides ``device``, which all have.
    """

    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = {
    "gms_up": Metric("gauge", "Whether the device's server has answered: 1 or 0. Without an answer there is nothing else of that device."),
    "gms_build_info": Metric("gauge", "1, with the version of the server and its memory driver.", ("version", "driver")),
    "gms_server_uptime_seconds": Metric("gauge", "Seconds since the server's process was started."),
    "gms_server_restarts_total": Metric(
        "counter", "Times that a server followed one that had not given up what it had, which was adopted or lost.", ("outcome",)
    ),
    "gms_memory_free_bytes": Metric("gauge", "Free memory of the device."),
    "gms_memory_total_bytes": Metric("gauge", "All memory of the device, or what the host device offers."),
    "gms_memory_allocated_bytes": Metric("gauge", "Memory that the server owns."),
    "gms_allocations": Metric("gauge", "Allocations that the server owns."),
    "gms_memory_waiting": Metric("gauge", "Requests that wait for memory."),
    "gms_sessions": Metric("gauge", "Open sessions, the one that asks for the metrics among them."),
    "gms_pool_generation": Metric("gauge", "Committed generation of a published pool; 0 if there is none.", ("pool",)),
    "gms_pool_bytes": Metric("gauge", "Memory of a published pool: of its committed layout, its draft, and its retired layouts.", ("pool", "layout")),
    "gms_pool_readers": Metric("gauge", "Sessions with a read lease on a published pool, whatever the generation.", ("pool",)),
    "gms_pool_pinned": Metric("gauge", "Generations of a published pool that are pinned: kept without readers.", ("pool",)),
    "gms_pool_waiting": Metric("gauge", "Sessions that wait for a lease on a published pool.", ("pool",)),
    "gms_retained_epoch": Metric("gauge", "Last epoch of a retained pool that was granted.", ("pool",)),
    "gms_retained_bytes": Metric("gauge", "Memory of a retained pool.", ("pool",)),
    "gms_retained_held": Metric("gauge", "Whether an engine holds a retained pool: 1 or 0.", ("pool",)),
    "gms_retained_waiting": Metric("gauge", "Sessions that wait to hold a retained pool.", ("pool",)),
    "gms_lock_term": Metric("gauge", "Last term of a failover lock that was granted.", ("lock",)),
    "gms_lock_held": Metric("gauge", "Whether an engine has a failover lock: 1 or 0.", ("lock",)),
    "gms_engines": Metric("gauge", "Engines that have joined the server, by role; one that is being ended is fenced.", ("role",)),
    "gms_commits_total": Metric("counter", "Generations that were committed; those that a rollback brought back are not among them."),
    "gms_leases_granted_total": Metric("counter", "Leases that were granted: write, read, or hold of a retained pool.", ("mode",)),
    "gms_requests_total": Metric(
        "counter", "Requests that were carried out, by outcome: ok, the code of an error, gone (the client was) or failed.", ("request", "outcome")
    ),
    "gms_fences_total": Metric("counter", "Engines that the server began to end."),
    "gms_fence_seconds": Metric("histogram", "Seconds from there to the exit of the engine's last process."),
    "gms_events_total": Metric("counter", "Events by kind.", ("kind",)),
}
