"""What has happened to a pool between two looks at it, as events. Pure; it does not matter by which way the pool has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gms_core.events import Facts, Kind
from gms_core.layout import Allocation, Layout
from gms_core.server.draft import Draft
from gms_core.server.effects import SessionId
from gms_core.server.published import PublishedPool
from gms_core.server.records import RollbackRecord
from gms_core.server.retained import RetainedPool
from gms_core.server.seat import Claim

Change = tuple[Kind, Facts]

NOBODY = SessionId(0)


@dataclass(frozen=True, slots=True)
class PublishedView:
    """A published pool at one instant, by reference: a look must cost nothing to speak of.

    Attributes:
        draft: The one that is being written.
        committed: The one that new readers get.
        layouts: All that have memory, by generation.
        pins: Generations that are kept without readers.
        number: Of the draft, which a rollback changes.
        rollback: What the committed one came of, if it was a rollback.
    """

    draft: Draft | None = None
    committed: Layout | None = None
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    pins: frozenset[int] = frozenset()
    number: int = 0
    rollback: RollbackRecord | None = None


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
    now, kept = pool.generations, len(view.layouts) - (view.committed is not None)
    return pool.draft is view.draft and now.committed is view.committed and len(now.retired) == kept and now.pins == view.pins


def look_published(pool: PublishedPool) -> PublishedView:
    """The pool as it is now."""
    now, draft = pool.generations, pool.draft
    rollback = next((one for one in pool.rollbacks.values() if one.generation == now.current), None)
    return PublishedView(draft, now.committed, now.all(), frozenset(now.pins), draft.generation if draft is not None else 0, rollback)


def look_retained(pool: RetainedPool) -> RetainedView:
    """The pool as it is now."""
    planner = pool.planner.claim if pool.planner is not None else None
    return RetainedView(planner, pool.allocations, pool.spares, pool.seat.number, pool.seat.holder, pool.unproven is None)


def published_changes(before: PublishedView, after: PublishedView, by: SessionId = NOBODY) -> Iterator[Change]:
    """What has happened to a published pool, in the order in which it must have.

    Args:
        before: The pool at the first look.
        after: At the second.
        by: The session that asked for it, for those changes that do not say themselves whose they are.
    """
    draft, rollback = before.draft, after.rollback
    if rollback is not None and rollback.generation not in before.layouts:
        size = after.layouts[rollback.generation].size
        yield Kind.POOL_ROLLED_BACK, {"session": rollback.session, "to": rollback.to, "generation": rollback.generation, "bytes": size}
    if draft is not None and after.draft is not draft:
        layout = after.layouts.get(draft.generation)
        if layout is not None:
            size, count = layout.size, len(layout.allocations)
            yield Kind.POOL_COMMITTED, {"session": draft.session, "generation": layout.generation, "bytes": size, "allocations": count}
        else:
            yield Kind.POOL_DRAFT_DROPPED, {"session": draft.session, "generation": draft.generation}
    elif draft is not None and after.number != before.number:
        yield Kind.POOL_DRAFT_RENUMBERED, {"session": draft.session, "generation": after.number, "before": before.number}
    for kind, generations in ((Kind.POOL_PINNED, after.pins - before.pins), (Kind.POOL_UNPINNED, before.pins - after.pins)):
        for generation in sorted(generations):
            yield kind, {"session": by, "generation": generation}
    yield from _freed(before, after)
    if after.draft is not None and after.draft is not draft:
        yield Kind.POOL_DRAFT_BEGUN, {"session": after.draft.session, "generation": after.draft.generation}


def _freed(before: PublishedView, after: PublishedView) -> Iterator[Change]:
    """The generations that have gone, each with the bytes that have gone with it: what a rollback has brought back stays."""
    gone = sorted(before.layouts.keys() - after.layouts.keys())
    if not gone:
        return
    left = {allocation.id for layout in after.layouts.values() for allocation in layout.allocations}
    for generation in gone:
        sizes = {allocation.id: allocation.size for allocation in before.layouts[generation].allocations if allocation.id not in left}
        left.update(sizes)
        yield Kind.POOL_GENERATION_FREED, {"generation": generation, "bytes": sum(sizes.values())}


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
