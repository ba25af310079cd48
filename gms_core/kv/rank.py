"""The KV memory of one rank of an engine that fails over, from its plan to its promotion: what every engine's worker does alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gms_core.amounts import amount
from gms_core.engine_log import log
from gms_core.errors import EngineAsleep, EngineFailed, GmsError, InvalidArgument
from gms_core.kv.bridge import MOST_TIMES, ROOM_TIMES, blocks_of, wanted_bytes
from gms_core.kv.front import Range, View, size_of
from gms_core.kv.plan import KvPlan
from gms_core.kv.planning import KvPlanning
from gms_core.kv.proof import Proof, ProofState
from gms_core.kv.retained import RetainedKv, TakenOver


class RankKv:
    """A rank's KV memory. The rank is parked, which means that its KV memory is scratch, from `initialise` until it is promoted.

    Args:
        planning: What the rank has to do for its pool.
        memory: In which the buffers of the cache are going to be placed.
        bridge_bytes: How large a bridge the user wants, as of `gms_core.kv.bridge.wanted_bytes`.
        asleep: Tells whether the engine sleeps, wholly or in part.

    Attributes:
        planning: As above.
        memory: As above.
    """

    def __init__(self, planning: KvPlanning, memory: RetainedKv, bridge_bytes: int | None, asleep: Callable[[], bool]) -> None:
        self.planning = planning
        self.memory = memory
        self._bridge_bytes = bridge_bytes
        self._asleep = asleep
        self._parked = False
        self._rehearses = False
        self._refused = False
        self._taken_over: TakenOver | None = None
        self._proof: Proof | None = None

    @property
    def bridge_blocks(self) -> int:
        """With how many blocks, from the first one on, the rank may begin before it has all of its memory; 0 if it waits for that."""
        plan = self.planning.plan
        return plan.bridge_blocks if plan is not None and self.memory.front else 0

    def initialise(self, views: Sequence[View], num_blocks: int, layout: str, *, measured: int, explicit: bool, memory_timeout_s: float) -> None:
        """Provide the pool's memory, or make sure that what is there is what this cache needs. All ranks call it, once the buffers are placed.

        To be called in `KvPlanning.given_up_on_failure`.

        Args:
            views: All tensors of the KV cache.
            num_blocks: That each of them has.
            layout: Digest of where layers and blocks lie in the buffers.
            measured: Budget of this rank; it says nothing where a plan is adopted.
            explicit: Whether that is the user's, and nothing was measured.
            memory_timeout_s: Seconds to wait for memory that others are releasing.

        Raises:
            IdentityMismatch: The cache is not what was planned.
            OutOfMemory: There was no room in time.
        """
        # Only here is it certain that no rank's measurement has failed: it would wait for that one.
        budgets = self.planning.budgets or self.planning.share(measured)
        blocks, front = self._find_bridge(views, num_blocks, explicit=explicit)
        here = KvPlan.new(budgets, num_blocks, self.memory.buffers, layout, blocks)
        cut = self.memory.allocations(front)
        self.planning.check_or_provide(here, cut.sizes, memory_timeout_s, cut.front)
        self.memory.adopt(self.planning.pool, front)
        self._parked = True
        bridge = f"it begins with {self.bridge_blocks} of them, in {amount(size_of(self.memory.front))}" if self.bridge_blocks else "no bridge"
        addresses, scratch = amount(self.memory.size), amount(self.memory.scratch_bytes)
        log().info("KV cache: %d blocks in %s of addresses, on %s of scratch memory; %s", num_blocks, addresses, scratch, bridge)

    def _find_bridge(self, views: Sequence[View], num_blocks: int, *, explicit: bool) -> tuple[int, list[Range]]:
        """With how many blocks a promotion may begin, as is planned or as the user wants, and where they lie; none if they cannot be had alone."""
        memory, adopted = self.memory, self.planning.plan
        wanted = wanted_bytes(self._bridge_bytes, memory.size)
        if not wanted:
            return 0, []
        blocks = blocks_of(wanted, memory.size, num_blocks) if adopted is None else adopted.bridge_blocks
        if not blocks:
            return 0, []
        front = memory.first_blocks(views, num_blocks, blocks)
        size = size_of(front)
        # Nobody has counted on a bridge that nobody has asked for, where the size of the cache was not measured.
        uncounted = adopted is None and self._bridge_bytes is None and explicit
        if not front:
            log().info("no bridge: it is not certain where the blocks of this KV cache lie")
        elif size > MOST_TIMES * wanted:
            log().info("no bridge: %d blocks of this KV cache lie in so many places that they take %s", blocks, amount(size))
        elif uncounted and memory.free < memory.size + ROOM_TIMES * size:
            log().info("no bridge: there is no room for %s beside a KV cache of this size", amount(size))
        else:
            return blocks, front
        return 0, []

    def stand_by(self) -> tuple[int, str]:
        """Make sure that this rank can be promoted. From here on the loss of its server is for the engine's first process to notice.

        It raises nothing: an engine that asks all ranks would leave the answers of the others unread.

        Returns:
            `bridge_blocks`, and why it can never be promoted, if so.
        """
        try:
            self.planning.place.beat()
        except GmsError as error:
            return 0, f"its part of the KV memory went with a server that was lost while the engine started: {error.message}"
        return self.bridge_blocks, ""

    def rehearse(self, wanted: bool) -> None:
        """Let steps compute on scratch memory although nobody may see what comes of them, or end that.

        Args:
            wanted: Whether to. It says nothing to a rank that is promoted.
        """
        self._rehearses = wanted

    def may_compute(self, *, scheduled: bool) -> bool:
        """Whether the memory is there that a step would compute on, or scratch is meant.

        Args:
            scheduled: Whether the engine's scheduler takes the step for computed even if it is refused; it cannot be promoted then.
        """
        parked = self._parked and not self._rehearses
        self._refused = self._refused or (parked and scheduled)
        return not parked

    def promote(self, timeout_s: float, *, bridge: bool = False) -> TakenOver:
        """Wait until no other engine can touch the KV memory, and map it in the place of the scratch memory. Idempotent; ends `park`.

        Args:
            timeout_s: Seconds to wait at most.
            bridge: Whether the rank may begin with its `bridge_blocks`: nothing is computed that uses others.

        Raises:
            EngineAsleep: The engine sleeps, and with it its scheduler.
            EngineFailed: It was asked to compute before, and its scheduler takes what was refused for computed.
            AcquireTimeout: The holder before has not ended in time.
            FenceFailed: It cannot be ended.
        """
        if self._taken_over is not None:
            self._parked = False
            return self._taken_over
        if self._asleep():
            raise EngineAsleep("this engine is asleep, and cannot be promoted", hint="Wake it up first.")
        if self._refused:
            raise EngineFailed(
                "this engine was asked to compute before its promotion, and its scheduler takes what was refused for computed",
                hint="Start it again, and promote it before it is asked.",
            )
        self._rehearses = False
        rank, pool = self.planning.rank, self.planning.pool
        taken = self._taken_over = self.memory.take_over(
            pool,
            self._mark(),
            timeout_s,
            lambda reason: log().info("rank %d waits for pool %s: %s", rank, pool.name, reason),
            bridge=bridge,
        )
        self._parked = False
        self._proof = None if taken.whole else Proof(pool)
        log().info(
            "rank %d holds pool %s, epoch %d: %s, granted after %.1f ms, mapped in %.1f ms",
            rank,
            pool.name,
            taken.epoch,
            amount(taken.bytes) if taken.whole else f"the first {self.bridge_blocks} blocks",
            taken.hold_s * 1e3,
            taken.map_s * 1e3,
        )
        return taken

    def park(self) -> None:
        """Compute nothing until the next `promote`: a rank that this one computes with could not be promoted. The memory stays this rank's."""
        self._parked = True

    def proven(self) -> tuple[ProofState, str]:
        """Whether all of the memory may be mapped, since every process of the last holder has exited; with the reason if it never may be.

        It raises nothing, as `stand_by` does not.
        """
        return ("proven", "") if self._proof is None else (self._proof.state, self._proof.failure)

    def map_rest(self) -> bool:
        """Map all of the memory after a bridge; every rank has said `proven`. Idempotent.

        Returns:
            Whether it is mapped: not while the engine sleeps.
        """
        if self._proof is None:
            return True
        if self._asleep():
            return False
        start = time.perf_counter()
        self.memory.map_rest(self._mark())
        self._proof = None
        log().info("all of the KV memory is mapped, in %.1f ms", (time.perf_counter() - start) * 1e3)
        return True

    def _mark(self) -> bytes:
        if self.planning.plan is None:
            raise InvalidArgument("this rank's KV memory is not initialised")
        return self.planning.plan.mark.encode()
