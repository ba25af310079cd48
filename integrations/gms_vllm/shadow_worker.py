"""What a worker adds so that its engine can stand in for another one: a KV cache on scratch memory, and the promotion that puts real memory there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from vllm.platforms import current_platform

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig
from gms_core.errors import EngineUnsupported, NotPromoted
from gms_core.failover import cohort
from gms_core.failover.config import failover_config
from gms_core.failover.nodes.part import join_agent
from gms_core.failover.parent_death import end_with_parent
from gms_core.kv.bridge import most_bytes
from gms_core.kv.planning import KvPlanning
from gms_core.kv.proof import ProofState
from gms_core.kv.rank import RankKv
from gms_core.kv.retained import RetainedKv
from gms_core.pytorch.kv import clearing, views_of
from gms_core.pytorch.progress import DeviceProgress
from gms_core.vmm import open_driver
from gms_core.weights.options import LOAD_FORMAT
from gms_vllm import kv_planning
from gms_vllm.config import loader_options
from gms_vllm.kv_buffers import check_contents, raw_buffers
from gms_vllm.kv_plan import layout_of
from gms_vllm.place import device_id, server_socket
from gms_vllm.sleeping_worker import GmsSleepMixin, give_back_cached, torch_device


class GmsShadowMixin(GmsSleepMixin):
    """A shadow's KV memory, and its promotion. Without failover it changes nothing.

    Attributes:
        planning: What this rank has to do for its pool; None before its device is set up.
        kv: The KV memory; None before the cache is made.
    """

    model_runner: Any
    planning: KvPlanning | None = None
    kv: RankKv | None = None
    _measured = 0
    _progress: DeviceProgress | None = None

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
            self.kv.initialise(
                views_of(self.model_runner.kv_caches, self.kv.memory.arena.base),
                kv_cache_config.num_blocks,
                layout_of(kv_cache_config),
                measured=self._measured,
                explicit=bool(self.vllm_config.cache_config.kv_cache_memory_bytes),
                memory_timeout_s=self._options().memory_timeout_s,
            )

    def gms_stand_by(self) -> tuple[int, str]:
        """Make sure that this rank can be promoted. From here on the loss of its server is noticed by its engine's first API server.

        It raises nothing: vLLM would leave the answers of the other ranks unread.

        Returns:
            With how many blocks, from the first one on, it may begin before it has all of its memory, 0 if it waits for that; and why it can never
            be promoted, if so.
        """
        return (0, "it does not fail over") if self.kv is None else self.kv.stand_by()

    def _kv_placing(self, kv_cache_config: Any) -> Callable[[int], int] | None:
        failover = _failover(self.vllm_config)
        if failover is None:
            return super()._kv_placing(kv_cache_config)
        assert self.planning is not None
        memory = RetainedKv(open_driver(device_id()), clearing(torch_device()), raw_buffers(kv_cache_config), failover.alias_bytes)
        self.kv = RankKv(self.planning, memory, failover.bridge_bytes, asleep=lambda: bool(self.asleep))
        self.kv_memory = memory
        return memory.place

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, which computes on scratch memory."""
        base: Any = super()
        self.gms_rehearse(True)
        try:
            return base.compile_or_warm_up_model()
        finally:
            self.gms_rehearse(False)

    def gms_rehearse(self, wanted: bool) -> None:
        """See `gms_core.kv.rank.RankKv.rehearse`."""
        if self.kv is not None:
            self.kv.rehearse(wanted)

    def gms_settle(self) -> None:
        """Put this rank's host memory into huge pages: the engine stands by next, and if it dies its successor waits for the end of this process."""
        cohort.settle(f"rank {self.vllm_config.parallel_config.rank}")

    def gms_place(self) -> dict[str, Any]:
        """Where this rank computes. Called again, it takes its place in the cohort anew, if the server has been restarted.

        Raises:
            GmsError: The server is not there, or does not want this process.
        """
        socket = self._take_place()
        parallel = self.vllm_config.parallel_config
        return {"rank": parallel.rank, "node": parallel.node_rank, "device": str(device_id()), "socket": str(socket)}

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
        if self.kv is None:
            raise EngineUnsupported("this engine does not fail over", hint="Put failover into the block gms of --model-loader-extra-config.")
        return {"rank": self.kv.planning.rank, **self.kv.promote(timeout_s, bridge=bridge)._asdict()}

    def gms_proven(self) -> tuple[ProofState, str]:
        """See `gms_core.kv.rank.RankKv.proven`."""
        return ("proven", "") if self.kv is None else self.kv.proven()

    def gms_map_rest(self) -> bool:
        """See `gms_core.kv.rank.RankKv.map_rest`."""
        return self.kv is None or self.kv.map_rest()

    def gms_beat(self) -> bool:
        """Whether this rank makes progress: it answers, and its device has done what it was given before the last beat."""
        if self._progress is None:
            self._progress = DeviceProgress(torch_device())
        return self._progress.made()

    def _take_place(self) -> Any:
        options = self._options()
        socket = server_socket(options)
        name = f"rank {self.vllm_config.parallel_config.rank}"
        cohort.take_place(name, [socket], serves=False, connect_timeout_s=options.connect_timeout_s)
        if self.vllm_config.parallel_config.nnodes > 1:
            join_agent(socket, options.connect_timeout_s)
        return socket

    def _check_ready(self, *, scheduled: bool) -> None:
        ready = self.kv is None or self.kv.may_compute(scheduled=scheduled)
        super()._check_ready(scheduled=scheduled)
        if not ready:
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
