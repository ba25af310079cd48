"""What a worker adds so that its engine can stand in for another one: a KV cache on scratch memory, and the promotion that puts real memory there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.platforms import current_platform

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig
from gms_core.engine_log import amount
from gms_core.errors import EngineAsleep, EngineFailed, EngineUnsupported, GmsError, NotPromoted
from gms_core.failover.config import failover_config
from gms_core.failover.parent_death import end_with_parent
from gms_core.kv.bridge import MOST_TIMES, ROOM_TIMES, blocks_of, most_bytes, wanted_bytes
from gms_core.kv.front import Range, size_of
from gms_core.kv.plan import KvPlan
from gms_core.kv.planning import KvPlanning
from gms_core.kv.proof import Proof, ProofState
from gms_core.kv.retained import RetainedKv, TakenOver
from gms_core.pytorch.kv import clearing, views_of
from gms_core.vmm import open_driver
from gms_core.weights.options import LOAD_FORMAT
from gms_vllm import cohort, kv_planning
from gms_vllm.config import loader_options
from gms_vllm.kv_buffers import check_contents, raw_buffers
from gms_vllm.kv_plan import layout_of
from gms_vllm.place import device_id, server_socket
from gms_vllm.sleeping_worker import GmsSleepMixin, give_back_cached, torch_device

log = logging.getLogger("vllm.gms")


class GmsShadowMixin(GmsSleepMixin):
    """A shadow's KV memory, and its promotion. Without failover it changes nothing.

    Attributes:
        planning: What this rank has to do for its pool; None before its device is set up.
        kv: The KV memory; None before the cache is made.
    """

    model_runner: Any
    planning: KvPlanning | None = None
    kv: RetainedKv | None = None
    _measured = 0
    _parked = False
    _rehearses = False
    _refused = False
    _taken_over: TakenOver | None = None
    _proof: Proof | None = None
    _mark: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        base: Any = super()
        with _smallest_cache(config.cache_config) if current_platform.is_cpu() and _failover(config) else contextlib.nullcontext():
            base.__init__(*args, **kwargs)

    @property
    def fails_over(self) -> bool:
        """Whether another engine can stand in for this one, and this one for others."""
        return _failover(self.vllm_config) is not None

    def adopts_plan(self) -> bool:
        """Take this process's place in the cohort, and learn whether the KV memory is planned already. The device is set up.

        Returns:
            Whether the engine takes a plan over, so that it needs no room for KV memory of its own.

        Raises:
            EngineUnsupported: The engine has no cohort.
            GmsError: See `gms_vllm.kv_planning.begin`.
        """
        failover = _failover(self.vllm_config)
        if failover is None:
            return False
        if not settings().cohort:
            raise EngineUnsupported(
                "failover: this engine was started in a way that GMS does not know, and has no cohort", hint="Start it with `vllm serve` or LLM()."
            )
        if not cohort.began_here():
            end_with_parent()
        self._take_place()
        self.planning = kv_planning.begin(self.vllm_config, self._options(), failover)
        if self.planning.memory_bytes is not None:
            self.vllm_config.cache_config.kv_cache_memory_bytes = self.planning.memory_bytes
        return self.planning.memory_bytes is not None

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: those of the plan, if there is one, else what vLLM measures."""
        base: Any = super()
        if self.planning is None:
            return int(base.determine_available_memory())
        cache, planned = self.vllm_config.cache_config, self.planning.memory_bytes
        with self.planning.given_up_on_failure():
            if planned is not None and current_platform.is_cpu():
                with _smallest_cache(cache):
                    base.determine_available_memory()
                return planned
            available = int(base.determine_available_memory())
        # What vLLM takes off for other uses it takes off again where the plan is adopted, so the plan has the value from before.
        measured = int(getattr(self, "available_kv_cache_memory_bytes", available))
        failover = _failover(self.vllm_config)
        if not cache.kv_cache_memory_bytes and failover is not None:
            bridge = most_bytes(failover.bridge_bytes, available)  # the server may take as much as that beside it
            available, measured = max(0, available - bridge), max(0, measured - bridge)
        self._measured = cache.kv_cache_memory_bytes or measured
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache on scratch memory; provide the pool's memory, or make sure that what is there is what this cache needs."""
        base: Any = super()
        if not self.fails_over:
            base.initialize_from_config(kv_cache_config)
            return
        if self.planning is None:
            raise EngineUnsupported("failover: this engine sets its device up in a way that GMS does not know", hint="Leave failover out for it.")
        with self.planning.given_up_on_failure():
            # What profiling has left there is room that the server, or another engine, cannot take otherwise.
            give_back_cached()
            check_contents(kv_cache_config)
            base.initialize_from_config(kv_cache_config)
            assert self.kv is not None
            # Only here is it certain that no rank's measurement has failed: it would wait for that one.
            budgets = self.planning.budgets or self.planning.share(self._measured)
            blocks, front = self._find_bridge(kv_cache_config.num_blocks)
            here = KvPlan.new(budgets, kv_cache_config.num_blocks, self.kv.buffers, layout_of(kv_cache_config), blocks)
            cut = self.kv.allocations(front)
            self.planning.check_or_provide(here, cut.sizes, self._options().memory_timeout_s, cut.front)
            self.kv.adopt(self.planning.pool, front)
        self._parked = True
        bridge = f"it begins with {self._bridge_blocks()} of them, in {amount(size_of(self.kv.front))}" if self._bridge_blocks() else "no bridge"
        addresses, scratch = amount(self.kv.size), amount(self.kv.scratch_bytes)
        log.info("KV cache: %d blocks in %s of addresses, on %s of scratch memory; %s", here.num_blocks, addresses, scratch, bridge)

    def _find_bridge(self, num_blocks: int) -> tuple[int, list[Range]]:
        """With how many blocks a promotion may begin, as is planned or as the user wants, and where they lie; none if they cannot be had alone."""
        failover = _failover(self.vllm_config)
        assert failover is not None
        assert self.planning is not None
        assert self.kv is not None
        wanted, adopted = wanted_bytes(failover.bridge_bytes, self.kv.size), self.planning.plan
        if not wanted:
            return 0, []
        blocks = blocks_of(wanted, self.kv.size, num_blocks) if adopted is None else adopted.bridge_blocks
        if not blocks:
            return 0, []
        front = self.kv.first_blocks(views_of(self.model_runner.kv_caches, self.kv.arena.base), num_blocks, blocks)
        size = size_of(front)
        # Nobody has counted on a bridge that nobody has asked for, where the size of the cache was not measured.
        uncounted = adopted is None and failover.bridge_bytes is None and bool(self.vllm_config.cache_config.kv_cache_memory_bytes)
        if not front:
            log.info("no bridge: it is not certain where the blocks of this KV cache lie")
        elif size > MOST_TIMES * wanted:
            log.info("no bridge: %d blocks of this KV cache lie in so many places that they take %s", blocks, amount(size))
        elif uncounted and self.kv.free < self.kv.size + ROOM_TIMES * size:
            log.info("no bridge: there is no room for %s beside a KV cache of this size", amount(size))
        else:
            return blocks, front
        return 0, []

    def gms_stand_by(self) -> tuple[int, str]:
        """Make sure that this rank can be promoted. From here on the loss of its server is noticed by its engine's first API server.

        It raises nothing: vLLM would leave the answers of the other ranks unread.

        Returns:
            With how many blocks, from the first one on, it may begin before it has all of its memory, 0 if it waits for that; and why it can never
            be promoted, if so.
        """
        if self.planning is None:
            return 0, "it does not fail over"
        try:
            self.planning.place.beat()
        except GmsError as error:
            return 0, f"its part of the KV memory went with a server that was lost while the engine started: {error.message}"
        return self._bridge_blocks(), ""

    def _bridge_blocks(self) -> int:
        planned = self.planning.plan if self.planning is not None else None
        return planned.bridge_blocks if planned is not None and self.kv is not None and self.kv.front else 0

    def _kv_placing(self, kv_cache_config: Any) -> Callable[[int], int] | None:
        failover = _failover(self.vllm_config)
        if failover is None:
            return super()._kv_placing(kv_cache_config)
        self.kv = RetainedKv(open_driver(device_id()), clearing(torch_device()), raw_buffers(kv_cache_config), failover.alias_bytes)
        self.kv_memory = self.kv
        return self.kv.place

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, which computes on scratch memory."""
        base: Any = super()
        self._rehearses = True
        try:
            return base.compile_or_warm_up_model()
        finally:
            self._rehearses = False

    def gms_rehearse(self, wanted: bool) -> None:
        """Let steps compute on scratch memory although nobody may see what comes of them, or end that.

        Args:
            wanted: Whether to. It says nothing to a rank that is promoted.
        """
        self._rehearses = wanted

    def gms_settle(self) -> None:
        """Put this rank's host memory into huge pages: the engine stands by next, and if it dies its successor waits for the end of this process."""
        cohort.settle(f"rank {self.vllm_config.parallel_config.rank}")

    def gms_place(self) -> dict[str, Any]:
        """Where this rank computes. Called again, it takes its place in the cohort anew, if the server has been restarted.

        Raises:
            GmsError: The server is not there, or does not want this process.
        """
        socket = self._take_place()
        return {"rank": self.vllm_config.parallel_config.rank, "device": str(device_id()), "socket": str(socket)}

    def gms_promote(self, timeout_s: float, bridge: bool = False) -> dict[str, Any]:
        """Wait until no other engine can touch the KV memory, and map it in the place of the scratch memory. Idempotent.

        Args:
            timeout_s: Seconds to wait at most.
            bridge: Whether the rank may begin with its first blocks, as `gms_stand_by` says: nothing is computed that uses others.

        Returns:
            ``rank``, ``epoch``, ``bytes``, the seconds ``hold_s`` and ``map_s``, and whether it is ``whole``; else see `gms_proven`.

        Raises:
            EngineUnsupported: This engine does not fail over.
            EngineAsleep: It sleeps, and with it vLLM's scheduler.
            EngineFailed: It was asked to compute before, and its scheduler takes what was refused for computed.
            AcquireTimeout: The holder before has not ended in time.
            FenceFailed: It cannot be ended.
        """
        if self.planning is None or self.planning.plan is None or self.kv is None:
            raise EngineUnsupported("this engine does not fail over", hint="Put failover into the block gms of --model-loader-extra-config.")
        rank, pool, mark = self.vllm_config.parallel_config.rank, self.planning.pool, self.planning.plan.mark.encode()
        if self._taken_over is None:
            if self._backend is not None and self._backend.asleep:
                raise EngineAsleep("this engine is asleep, and cannot be promoted", hint="Wake it up first.")
            if self._refused:
                raise EngineFailed(
                    "this engine was asked to compute before its promotion, and its scheduler takes what was refused for computed",
                    hint="Start it again, and promote it before it is asked.",
                )
            self._rehearses = False
            self._taken_over = self.kv.take_over(
                pool, mark, timeout_s, lambda reason: log.info("rank %d waits for pool %s: %s", rank, pool.name, reason), bridge=bridge
            )
            self._parked = False
            taken = self._taken_over
            self._proof = None if taken.whole else Proof(pool)
            log.info(
                "rank %d holds pool %s, epoch %d: %s, granted after %.1f ms, mapped in %.1f ms",
                rank,
                pool.name,
                taken.epoch,
                amount(taken.bytes) if taken.whole else f"the first {self._bridge_blocks()} blocks",
                taken.hold_s * 1e3,
                taken.map_s * 1e3,
            )
        return {"rank": rank, **self._taken_over._asdict()}

    def gms_proven(self) -> tuple[ProofState, str]:
        """Whether all of the memory may be mapped, since every process of the last holder has exited; with the reason if it never may be.

        It raises nothing: vLLM would leave the answers of the other ranks unread.
        """
        return ("proven", "") if self._proof is None else (self._proof.state, self._proof.failure)

    def gms_map_rest(self) -> bool:
        """Map all of the memory after a bridge; every rank has said `gms_proven`. Idempotent.

        Returns:
            Whether it is mapped: not while the engine sleeps.
        """
        if self._proof is None:
            return True
        if self._backend is not None and self._backend.asleep:
            return False
        assert self.planning is not None
        assert self.planning.plan is not None
        assert self.kv is not None
        start = time.perf_counter()
        self.kv.map_rest(self.planning.plan.mark.encode())
        self._proof = None
        log.info("all of the KV memory is mapped, in %.1f ms", (time.perf_counter() - start) * 1e3)
        return True

    def gms_beat(self) -> bool:
        """Whether this rank makes progress: it answers, and its device has done what it was given before the last beat."""
        if not current_platform.is_cuda():
            return True
        if self._mark is not None and not self._mark.query():
            return False
        self._mark = torch.cuda.Event()
        self._mark.record()
        return True

    def _take_place(self) -> Any:
        options = self._options()
        socket = server_socket(options)
        name = f"rank {self.vllm_config.parallel_config.rank}"
        cohort.take_place(name, [socket], serves=False, connect_timeout_s=options.connect_timeout_s)
        return socket

    def _check_ready(self, *, scheduled: bool) -> None:
        parked = self._parked and not self._rehearses
        self._refused = self._refused or (parked and scheduled)
        super()._check_ready(scheduled=scheduled)
        if parked:
            raise NotPromoted(
                "this engine is a shadow: its KV memory is scratch, and a request would be answered with nonsense",
                hint='It computes once it is promoted: by its API server, or by collective_rpc("gms_promote", args=(timeout_s,)).',
            )


def _failover(config: Any) -> FailoverConfig | None:
    """How an engine fails over, if it does."""
    load = config.load_config
    return failover_config(loader_options(load.model_loader_extra_config or {}).gms) if load.load_format == LOAD_FORMAT else None


@contextlib.contextmanager
def _smallest_cache(cache: Any) -> Iterator[None]:
    """While it lasts, vLLM on CPU believes that the smallest KV cache is wanted, and finds room for it beside those of other engines.

    It compares the size with what is free before the engine can know whether it needs any (vllm/v1/worker/cpu_worker.py, ``__init__``), and again
    where the memory is there already (determine_available_memory). An engine that measures is checked by the measurement.
    """
    before = cache.kv_cache_memory_bytes
    cache.kv_cache_memory_bytes = 1
    try:
        yield
    finally:
        cache.kv_cache_memory_bytes = before
