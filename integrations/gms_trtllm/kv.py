"""The KV memory of this rank, where its engine fails over: planned by the first engine, taken over by those that stand in for it.

Either way the rank holds a retained pool once it is promoted, so that no other engine's rank is still there. With a V2 whose pools can be placed that
pool is the KV memory, and scratch lies beneath the addresses before. Elsewhere the KV memory is the engine's own, and the pool holds a mark alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gms_core.client import connect
from gms_core.config import settings
from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.engine_log import log
from gms_core.errors import ConfigurationError, EngineUnsupported
from gms_core.failover.config import failover_config
from gms_core.kv import planning
from gms_core.kv.plan import FORMAT, KvPlan
from gms_core.kv.planning import KvPlanning
from gms_core.kv.rank import RankKv
from gms_core.kv.retained import RetainedKv
from gms_core.layout import Identity
from gms_core.pytorch.kv import clearing
from gms_core.ranks import all_or_none
from gms_core.vmm import open_driver
from gms_core.weights.identity import digest_of
from gms_patches.apply import Applied, apply
from gms_patches.for_trtllm import BUILD_MANAGERS, PREPARE_ESTIMATION
from gms_trtllm.identity import plain
from gms_trtllm.kv_placing import can_place, placing
from gms_trtllm.place import current_index, device_id, is_cpu, pool_name, torch_device
from gms_trtllm.ranks import all_ranks, rank, world_size

_OF_SIZE = frozenset({"max_tokens", "max_gpu_total_bytes", "free_gpu_memory_fraction", "host_cache_size"})
"""Options of ``kv_cache_config`` that say how large a cache becomes: that is planned."""
_OF_THE_WEIGHTS = frozenset({"content"})
"""Fields of the weights' identity that say nothing of the KV memory. The pool of the weights sees to it that engines have the same ones."""
_MANAGER = "KV_CACHE_MANAGER"
"""What TensorRT-LLM calls its KV cache among its resources."""
_WITHOUT = "Leave GMS_FAILOVER out for this engine."

_in_force: list[Applied] = []


def plan_kv_memory(socket: Path, weights: Identity) -> None:
    """Let the KV memory of this rank be planned, and held by one engine at a time.

    Args:
        socket: Of the server of its device.
        weights: What is loaded; its KV cache is made for that.

    Raises:
        EngineUnsupported: This TensorRT-LLM makes its KV cache in a way that is not known. Nothing was changed.
    """
    try:
        for patch, build in ((PREPARE_ESTIMATION, _preparing), (BUILD_MANAGERS, _building)):
            _in_force.append(apply(patch, build))
    except BaseException:
        leave_kv_memory()
        raise
    this_rank().belongs_to(socket, weights)


def leave_kv_memory() -> None:
    """Undo it. Idempotent."""
    while _in_force:
        _in_force.pop().revert()
    this_rank.cache_clear()


def _preparing(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def try_prepare_estimation(self: Any) -> bool:
        memory = this_rank()
        if memory.planning is not None:  # of a further executor of this process
            return original(self)
        planned = memory.plan(self)
        with planned.given_up_on_failure():
            blocks = [0 if plan is None else plan.num_blocks for plan in _of_all_ranks(planned.plan)]
            if planned.memory_bytes is None:  # as on all ranks
                return original(self)
            _adopt(self, max(blocks), planned)
            return False

    return try_prepare_estimation


def _building(original: Callable[..., None]) -> Callable[..., None]:
    def build_managers(self: Any, resources: Any, estimating_kv_cache: bool = False) -> None:
        memory = this_rank()
        if estimating_kv_cache or memory.planning is None or memory.kv is not None:
            original(self, resources, estimating_kv_cache)
            return
        with memory.planning.given_up_on_failure():
            with memory.placing():
                all_or_none(all_ranks(), lambda: original(self, resources, estimating_kv_cache))
            memory.initialise(self, resources)

    return build_managers


def _of_all_ranks(plan: KvPlan | None) -> list[KvPlan | None]:
    """What each rank knows of the plan: one whose server has forgotten it makes it anew."""
    ranks = all_ranks()
    return [plan] if ranks is None else ranks.all_gather_object(plan)


def _adopt(creator: Any, blocks: int, planned: KvPlanning) -> None:
    """Let TensorRT-LLM make the KV cache that is planned, without measuring anything."""
    creator._skip_est = False  # noqa: SLF001 - else it would measure all the same, in `build_managers`
    config, block = creator._kv_cache_config, creator._tokens_per_block  # noqa: SLF001 - of the adapter's table
    if planned.memory_bytes and hasattr(config, "max_gpu_total_bytes"):
        config.max_gpu_total_bytes = planned.memory_bytes
    if not _is_v2(creator):  # for which tokens are no measure of memory
        if config.max_tokens is not None and -(-config.max_tokens // block) < blocks:
            raise ConfigurationError(
                f"kv_cache_config.max_tokens {config.max_tokens} is less than pool {planned.pool.name!r} was planned with: {blocks * block}",
                hint="Leave the option out: engines that stand in for one another have the first one's KV cache. Or give this one another kv_tag.",
            )
        config.max_tokens = blocks * block
    log().info("a KV cache of %d blocks is planned: nothing is measured, and free_gpu_memory_fraction is not used", blocks)


def _is_v2(creator: Any) -> bool:
    return bool(getattr(creator, "_is_kv_cache_manager_v2", False))


class RankCache:
    """The KV memory of this process's rank.

    Attributes:
        planning: What it has to do for its pool; None before the engine asks for a KV cache.
        kv: What it has; None before that cache is made.
        is_placed: Whether the engine's KV cache lies in it.
    """

    def __init__(self) -> None:
        self.planning: KvPlanning | None = None
        self.kv: RankKv | None = None
        self.is_placed = False
        self.is_asleep = False
        self._place: tuple[Path, Identity] | None = None
        self._index = 0
        self._managers: list[Any] = []
        self._memory: RetainedKv | None = None

    def belongs_to(self, socket: Path, weights: Identity) -> None:
        """Say where the server of its device listens, and what was loaded."""
        self._place = socket, weights

    def plan(self, creator: Any) -> KvPlanning:
        """Learn whether the KV cache is planned. All ranks call it.

        Raises:
            GmsError: The server refuses this engine, or the plan is not for it.
        """
        assert self._place is not None
        socket, weights = self._place
        _check(creator)
        self.is_placed = _is_v2(creator) and can_place()
        options, index = GmsConfig(), current_index()
        self._index = index
        tag = _failover().kv_tag
        name = f"tensorrt_llm rank {rank()} (kv)"
        session = all_or_none(all_ranks(), lambda: connect(device_id(index), socket_path=socket, client=name, timeout_s=options.connect_timeout_s))
        self.planning = planning.begin(
            session,
            pool_name(tag, index),
            self._identity(weights, creator),
            tag=tag,
            rank=rank(),
            ranks=all_ranks(),
            timeout_s=options.acquire_timeout_s,
        )
        return self.planning

    def _identity(self, weights: Identity, creator: Any) -> Identity:
        chosen = creator._kv_cache_config.model_dump(exclude_defaults=True)  # noqa: SLF001 - of the adapter's table
        return Identity(
            {
                **{name: value for name, value in weights.fields.items() if name not in _OF_THE_WEIGHTS},
                "kv_tokens_per_block": str(creator._tokens_per_block),  # noqa: SLF001 - as above
                "kv_options": digest_of(plain(chosen, _OF_SIZE)),
                "kv_memory": "placed" if self.is_placed else "own",
                "kv_plan": FORMAT,
                "lock": _failover().lock,  # engines of another lock would wait for memory that nobody is going to leave to them
            }
        )

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """Let the KV cache that is made meanwhile lie in the pool, if it can."""
        with placing(self._provide) if self.is_placed else contextlib.nullcontext():
            yield

    def _provide(self, buffers: Sequence[int]) -> RetainedKv:
        index = current_index()
        self._memory = RetainedKv(open_driver(device_id(index)), clearing(torch_device(index)), buffers, _failover().alias_bytes)
        return self._memory

    def initialise(self, creator: Any, resources: Mapping[Any, Any]) -> None:
        """The engine has made its KV cache: provide the pool, or make sure that the cache is what was planned. All ranks call it.

        Raises:
            EngineUnsupported: The cache does not lie where it should, or is none that is known.
            IdentityMismatch: It is not what was planned.
            OutOfMemory: There was no room in time.
        """
        begun = self.planning
        assert begun is not None
        measured, blocks = all_or_none(all_ranks(), lambda: self._look_at(creator, resources))
        if begun.budgets is None:
            begun.share(measured)
        all_or_none(all_ranks(), lambda: self._provide_or_compare(begun, blocks, measured))

    def _look_at(self, creator: Any, resources: Mapping[Any, Any]) -> tuple[int, int]:
        """What the engine has made: bytes that it has measured, and blocks."""
        found = {str(getattr(name, "name", name)).upper(): manager for name, manager in resources.items()}
        if found.get(_MANAGER) is None:
            raise EngineUnsupported(f"failover: this engine has no {_MANAGER} among its resources: {sorted(found)}", hint=_WITHOUT)
        self._managers = [manager for manager in found.values() if hasattr(manager, "reset_reuse_state") or hasattr(manager, "enable_block_reuse")]
        config = creator._kv_cache_config  # noqa: SLF001 - of the adapter's table
        measured = int(getattr(config, "max_gpu_total_bytes", 0) or 0)
        if self.is_placed and (self._memory is None or not measured):
            raise EngineUnsupported(
                "failover: this engine's KV cache is made in a way that GMS does not know", hint="Leave use_kv_cache_manager_v2 out for this engine."
            )
        told = getattr(found[_MANAGER], "blocks_in_primary_pool", None)
        blocks = int(config.max_tokens or 0) // int(creator._tokens_per_block) if told is None else int(told)  # noqa: SLF001 - as above
        return measured, blocks

    def _provide_or_compare(self, begun: KvPlanning, blocks: int, measured: int) -> None:
        planned = begun.plan
        if planned is not None and not self.is_placed and blocks < planned.num_blocks:
            log().warning("this KV cache has %d blocks, and was planned with %d: the device has no room for more", blocks, planned.num_blocks)
            blocks = planned.num_blocks
        self.kv = RankKv(begun, self._memory or self._provide(()), 0, asleep=lambda: self.is_asleep)
        self.kv.initialise(
            [],
            blocks,
            digest_of([type(manager).__name__ for manager in self._managers]),
            measured=measured,
            explicit=False,
            memory_timeout_s=GmsConfig().memory_timeout_s,
        )

    def place(self) -> tuple[str, int]:
        """The socket of the server of its device, and how many ranks there are."""
        assert self._place is not None
        return str(self._place[0]), world_size()

    def stand_by(self) -> tuple[int, str, bool]:
        """Make sure that this rank can be promoted, and let its caches forget what lies on scratch, or in memory that is given back.

        Returns:
            As `RankKv.stand_by`, and whether the KV cache lies in the pool.
        """
        if self.kv is None:
            return 0, "this rank has no KV cache that was planned", self.is_placed
        self._use_device()
        for manager in self._managers:
            forget = getattr(manager, "reset_reuse_state", None)
            if forget is not None:
                forget()
            elif getattr(manager, "enable_block_reuse", False):
                return 0, "its KV cache cannot be made to forget: set kv_cache_config.enable_block_reuse to false", self.is_placed
        return *self.kv.stand_by(), self.is_placed

    def promote(self, timeout_s: float) -> tuple[int, int, int, float, float]:
        """As `RankKv.promote`, in a thread of any device; returns what `gms_core.failover.front_end.engine.RankMemory` has."""
        assert self.kv is not None
        self._use_device()
        taken = self.kv.promote(timeout_s)
        return rank(), taken.epoch, taken.bytes, taken.hold_s, taken.map_s

    def _use_device(self) -> None:
        """Make this thread use the rank's device: a new thread has the first one."""
        if not is_cpu():
            torch.cuda.set_device(self._index)

    def suspend(self) -> None:
        """Unmap the KV cache as far as it lies in the pool, whose memory stays held. Idempotent."""
        if self.is_placed and self.kv is not None:
            self.is_asleep = True
            self.kv.memory.suspend()

    def resume(self) -> None:
        """Map it again. Idempotent."""
        if self.is_asleep and self.kv is not None:
            self.kv.memory.resume()
            self.is_asleep = False


def _check(creator: Any) -> None:
    """Refuse engines whose KV memory others read: they have registered what lay beneath the addresses before the promotion.

    Raises:
        EngineUnsupported: It is such an engine.
    """
    options = getattr(creator, "_llm_args", None)
    kinds = {
        "cache_transceiver_config": getattr(options, "cache_transceiver_config", None),
        "kv_connector_config": getattr(options, "kv_connector_config", None) or getattr(creator, "_kv_connector_manager", None),
    }
    for kind, found in kinds.items():
        if found is not None:
            raise EngineUnsupported(f"failover: the KV memory of engines with {kind} cannot be handed over", hint=_WITHOUT)


def _failover() -> FailoverConfig:
    config = failover_config(GmsConfig()) if settings().cohort else None
    if config is None:
        raise EngineUnsupported("failover: this process has a cohort's KV memory, and no failover block", hint="Start it with gms-trtllm-serve.")
    return config


@functools.cache
def this_rank() -> RankCache:
    """The KV memory of this process."""
    return RankCache()


def calls() -> Mapping[str, Callable[..., Any]]:
    """What this rank can be asked; see `gms_trtllm.engine_calls`."""
    memory = this_rank()
    return {"place": memory.place, "stand_by": memory.stand_by, "promote": memory.promote}
