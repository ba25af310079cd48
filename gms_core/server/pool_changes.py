"""What has happened to a pool between two looks at it, as events. Pure; it does not matter by which way the pool has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gms_core.events import Facts, Kind
from gms_core.layout import Allocation, Layout
from gms_core.server.published import Draft, PublishedPool
from gms_core.server.retained import RetainedPool
from gms_core.server.seat import Claim

Change = tuple[Kind, Facts]


@dataclass(frozen=True, slots=True)
class PublishedView:
    """A published pool at one instant, by reference: a look must cost nothing to speak of.

    Attributes:
        draft: The one that is being written.
        committed: The one that new readers get.
        layouts: All that have memory, by generation.
    """

    draft: Draft | None = None
    committed: Layout | None = None
    layouts: Mapping[int, Layout] = field(default_factory=dict)


NEW = PublishedView()
"""A pool that nothing has happened to."""


@dataclass(frozen=True, slots=True)
class RetainedView:
    """A retained pool at one instant."""

    planner: Claim | None = None
    allocations: tuple[Allocation, ...] = ()
    spares: tuple[Allocation, ...] = ()
    epoch: int = 0
    holder: Claim | None = None
    whole: bool = True


def same_published(pool: PublishedPool, view: PublishedView) -> bool:
    """Whether nothing of it has changed but who reads, which is what happens most: no other look is needed then."""
    kept = len(view.layouts) - (view.committed is not None)
    return pool.draft is view.draft and pool.committed is view.committed and len(pool.retired) == kept


def look_published(pool: PublishedPool) -> PublishedView:
    """The pool as it is now."""
    committed = pool.committed
    if committed is None:
        return PublishedView(pool.draft, None, dict(pool.retired))
    return PublishedView(pool.draft, committed, {**pool.retired, committed.generation: committed})


def look_retained(pool: RetainedPool) -> RetainedView:
    """The pool as it is now."""
    planner = pool.planner.claim if pool.planner is not None else None
    return RetainedView(planner, pool.allocations, pool.spares, pool.seat.number, pool.seat.holder, pool.unproven is None)


def published_changes(before: PublishedView, after: PublishedView) -> Iterator[Change]:
    """What has happened to a published pool, in the order in which it must have."""
    draft = before.draft
    if draft is not None and after.draft is not draft:
        layout = after.layouts.get(draft.generation)
        if layout is not None:
            size, count = layout.size, len(layout.allocations)
            yield Kind.POOL_COMMITTED, {"session": draft.session, "generation": layout.generation, "bytes": size, "allocations": count}
        else:
            yield Kind.POOL_DRAFT_DROPPED, {"session": draft.session, "generation": draft.generation}
    for generation, layout in before.layouts.items():
        if generation not in after.layouts:
            yield Kind.POOL_GENERATION_FREED, {"generation": generation, "bytes": layout.size}
    if after.draft is not None and after.draft is not draft:
        yield Kind.POOL_DRAFT_BEGUN, {"session": after.draft.session, "generation": after.draft.generation}


def retained_changes(before: RetainedView, after: RetainedView) -> Iterator[Change]:
    """What has happened to a retained pool, in the order in which it must have."""
    if after.allocations is not before.allocations:
        if before.allocations:
            yield Kind.POOL_DROPPED, {"bytes": _size(before)}
        if after.allocations:
            planner = before.planner.label if before.planner is not None else ""
            yield Kind.POOL_PLANNED, {"engine": planner, "bytes": _size(after), "allocations": len(after.allocations) + len(after.spares)}
    if after.planner is not None and after.planner != before.planner:
        yield Kind.POOL_PLANNING, {"engine": after.planner.label, "cohort": after.planner.cohort}
    holder = after.holder
    if holder is None:
        return
    facts: dict[str, str | int | float | bool] = {"engine": holder.label, "cohort": holder.cohort, "epoch": after.epoch}
    if after.epoch > before.epoch:
        yield Kind.POOL_EPOCH_GRANTED, {**facts, "part": "all" if after.whole else "the bridge"}
    elif after.whole and not before.whole:
        yield Kind.POOL_WHOLE, facts


def _size(view: RetainedView) -> int:
    return sum(allocation.size for allocation in (*view.allocations, *view.spares))
