"""The KV memory of a rank of an engine that fails over: planned once for all engines, scratch until promoted, then the pool's."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from gms_core.client import Membership, RetainedArena, RetainedPool
from gms_core.client.arena import round_up
from gms_core.client.session import SLAB_BYTES
from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import EngineUnsupported, IdentityMismatch
from gms_core.layout import Identity
from gms_core.pytorch.tensors import bytes_on, storage_at
from gms_core.vmm.driver import Driver

log = logging.getLogger("vllm.gms")


class KvPlan(msgspec.Struct, frozen=True):
    """What the first engine has found out about its KV memory, and all others adopt.

    Attributes:
        available_bytes: What this rank could give to the KV cache, before vLLM takes its constants off.
        kv_bytes: Bytes of the arena.
        num_blocks: Blocks of the KV cache.
        buffers: Bytes of each raw buffer, in the order in which they are made.
    """

    available_bytes: int
    kv_bytes: int
    num_blocks: int
    buffers: tuple[int, ...]


def slabs(size: int, slab: int) -> list[int]:
    """Sizes of the allocations for so many bytes: whole slabs, and what is left."""
    whole, rest = divmod(size, slab)
    return [slab] * whole + [rest] * bool(rest)


class RetainedKv:
    """One rank's KV memory.

    Args:
        membership: The rank's place in its cohort.
        pool: The name of its retained pool.
        device: Where it is, for PyTorch.
        gms: The engine's block.
        failover: How it fails over.

    Attributes:
        device: Where it is, for PyTorch.
        promoted: Whether the pool's memory lies beneath the KV cache. Before that it is scratch.
        arena: Where the KV cache lies; None before `lay_out`.
    """

    def __init__(self, membership: Membership, pool: str, device: torch.device, gms: GmsConfig, failover: FailoverConfig) -> None:
        self.promoted = False
        self.arena: RetainedArena | None = None
        self._session = membership.session
        self._pool = RetainedPool(membership.session, pool)
        self.device = device
        self._gms = gms
        self._failover = failover
        self._plan: KvPlan | None = None
        self._buffers: list[tuple[int, int]] = []
        self._placed = 0

    @property
    def _driver(self) -> Driver:
        return self._session.driver

    def ask_plan(self, identity: Identity) -> KvPlan | None:
        """The plan to adopt, or None if this rank has to make it.

        Raises:
            GmsError: Another engine did not make it in time, or the pool is laid out for something else.
        """

        def waiting(reason: str) -> None:
            log.info("waiting for the plan of pool %s: %s", self._pool.name, reason)

        planned = self._pool.plan(identity, self._gms.acquire_timeout_s, waiting)
        self._plan = msgspec.json.decode(planned.plan, type=KvPlan) if planned is not None else None
        return self._plan

    def lay_out(self, sizes: Sequence[int], num_blocks: int, available_bytes: int) -> None:
        """Make addresses for raw buffers of these sizes, scratch beneath them, and, as the first engine, the pool's memory.

        Raises:
            IdentityMismatch: The plan that was adopted says something else.
            OutOfMemory: The device has no room for the KV memory, or for the scratch.
        """
        granularity = self._driver.granularity
        total = sum(round_up(size, granularity) for size in sizes)
        plan = KvPlan(available_bytes, total, num_blocks, tuple(sizes))
        planned = self._pool.planned
        if planned is None:
            slab = SLAB_BYTES.get(self._session.welcome.driver, 2**30)
            planned = self._pool.provide(msgspec.json.encode(plan), slabs(total, slab), self._gms.memory_timeout_s)
            log.info("planned %.2f GiB of KV memory, %d blocks, in pool %s", total / 2**30, num_blocks, self._pool.name)
        elif self._plan is None or (self._plan.kv_bytes, self._plan.num_blocks, self._plan.buffers) != (total, num_blocks, tuple(sizes)):
            raise IdentityMismatch(
                f"this engine's KV cache of {num_blocks} blocks in {len(sizes)} buffers of {total} bytes in all is not what pool {self._pool.name!r} "
                f"was planned for: {self._plan}",
                hint="Start all engines that stand in for one another with the same options.",
            )
        arena = RetainedArena(self._driver, total)
        try:
            arena.adopt(self._pool.receive, planned.allocations, planned.spares)
            cost = arena.map_scratch(self._failover.alias_bytes)
        except BaseException:
            arena.close()
            raise
        self.arena = arena
        self._buffers = [(size, round_up(size, granularity)) for size in sizes]
        log.info("%.2f GiB of KV addresses lie on %.2f GiB of scratch until this engine is promoted", total / 2**30, cost / 2**30)

    def place(self, size: int) -> int | None:
        """The address for the next raw buffer of so many bytes; None for a buffer that is none of the KV cache."""
        if self.arena is None:
            return None
        if self._placed == 0 and len(self._buffers) > 1 and size == sum(wanted for wanted, _ in self._buffers):
            # One buffer for all of them together (vllm/v1/worker/kv_connector_model_runner_mixin.py, allocate_uniform_kv_caches).
            self._buffers = [(size, self.arena.size)]
        if not self._buffers or size != self._buffers[0][0]:
            return None
        address = self.arena.base + self._placed
        self._placed += self._buffers.pop(0)[1]
        return address

    def check_placed(self) -> None:
        """Raise unless every buffer of the KV cache has got its place.

        Raises:
            EngineUnsupported: VLLM has made it in another way.
        """
        if self._buffers:
            raise EngineUnsupported(
                f"failover: {len(self._buffers)} buffers of this engine's KV cache were made in a way that GMS does not know",
                hint="Start without the failover block, and report the model.",
            )

    def promote(self, timeout_s: float) -> dict[str, Any]:
        """Hold the pool and map its memory at the addresses of the KV cache. Idempotent once it has succeeded.

        Args:
            timeout_s: Seconds to wait for the proof that the holder before is gone.

        Returns:
            ``epoch``, ``bytes``, and what it took: ``hold_s`` and ``map_s``.

        Raises:
            GmsError: The memory was not granted, or could not be mapped.
        """
        if self.arena is None:
            raise EngineUnsupported("this engine has no KV cache that could be promoted")
        start = time.perf_counter()
        held = self._pool.hold(timeout_s)
        granted = time.perf_counter()
        self.arena.map_pool(held.turn)
        if held.epoch == 1 and self.device.type == "cuda":  # memory of the host is zero when it is new; later epochs find what engines wrote
            bytes_on(storage_at(self.arena.base, self.arena.size, self.device)).zero_()
            torch.cuda.synchronize(self.device)
        self.promoted = True
        return {"epoch": held.epoch, "bytes": self.arena.size, "hold_s": granted - start, "map_s": time.perf_counter() - granted}
