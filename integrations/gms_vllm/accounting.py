"""Memory accounting beside neighbours: shared weights count once, for nobody twice, and what others allocate is not taken for this engine's.

vLLM budgets ``total x gpu_memory_utilization`` for everything that it uses on a device, weights included, and measures what it uses as the loss of
free memory since a snapshot at the start (vllm/v1/worker/gpu_worker.py, determine_available_memory). A reader's weights are on the device before
that snapshot, or appear while it waits for the writer; either way they are no loss of its own, so they leave its budget instead. A writer's weights
appear after the snapshot and are counted by the loss, as always.

KV memory of an engine that fails over is the server's. The first engine has it made once it has measured what there is room for; the others take
over its plan, so they have no budget that would have to fit.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from gms_core.amounts import GIB
from gms_core.engine_config import GmsConfig
from gms_core.errors import OutOfMemory
from gms_core.weights.holdings import Holding
from gms_patches.apply import applied
from gms_patches.for_vllm import REQUEST_MEMORY
from gms_vllm.place import connect, pool_name

log = logging.getLogger("vllm.gms")


def external_bytes(config: Any, options: GmsConfig) -> int:
    """Bytes of weights that this engine will most likely share, and that are on its device already, published or being written.

    Called before loading, in a worker whose device is set.

    Raises:
        GmsError: The device server does not answer; loading could not succeed either.
    """
    if options.mode == "rw":
        return 0
    with connect(options) as session:
        pools = {pool.name: pool for pool in session.status().pools}
    pool = pools.get(pool_name(config, options))
    return 0 if pool is None else pool.bytes or pool.draft_bytes


@contextlib.contextmanager
def startup_check(config: Any, options: GmsConfig, adopts_plan: Callable[[], bool] | None = None) -> Iterator[None]:
    """While it lasts, vLLM's start-up check and budget leave out what is on the device already, and belongs to this engine all the same.

    These are shared weights, for which vLLM has a seam of its own from 0.32 on, and KV memory that another engine has planned: whoever takes that
    over needs no room for KV memory, and is not asked for any.

    Args:
        config: A ``VllmConfig``.
        options: The engine's block.
        adopts_plan: For an engine that fails over: called once, when the device is set up, and may wait for another engine. Whether this one takes
            planned KV memory over.
    """
    import vllm.v1.worker.gpu_worker as gpu_worker

    seam = "external_weight_memory" in inspect.signature(gpu_worker.request_memory).parameters
    if seam and adopts_plan is None:
        yield
        return

    def build(original: Callable[..., int]) -> Callable[..., int]:
        def request_memory(init_snapshot: Any, cache_config: Any, external_weight_memory: int | None = None) -> int:
            adopts = adopts_plan is not None and adopts_plan()
            if adopts_plan is not None:
                init_snapshot.measure()  # others may have taken or freed memory while this engine waited to be told
            external = external_bytes(config, options)
            if adopts:
                return int(math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization) - external)
            if external_weight_memory is not None:
                budget: int = original(init_snapshot, cache_config, external)
                return budget
            without = copy.copy(init_snapshot)
            without.free_memory += external
            return original(without, cache_config) - external

        return request_memory

    with applied(REQUEST_MEMORY, build):
        yield


def settle(worker: Any, holding: Holding) -> None:
    """Correct the budget and the baseline once it is known which part this engine took.

    Args:
        worker: vLLM's GPU worker, after loading.
        holding: What it loaded.

    Raises:
        OutOfMemory: The budget does not fit beside what the neighbours use now.
    """
    snapshot, cache = worker.init_snapshot, worker.cache_config
    snapshot.free_memory -= holding.neighbours
    snapshot.cuda_memory += holding.neighbours
    snapshot.non_torch_memory += holding.neighbours
    requested = math.ceil(snapshot.total_memory * cache.gpu_memory_utilization) - holding.external_bytes
    worker.requested_memory = requested
    if cache.kv_cache_memory_bytes is None and not 0 < requested <= snapshot.free_memory:
        raise OutOfMemory(
            f"--gpu-memory-utilization {cache.gpu_memory_utilization} leaves {requested / GIB:.2f} GiB beside {holding.external_bytes / GIB:.2f} GiB "
            f"of shared weights, and {snapshot.free_memory / GIB:.2f} of {snapshot.total_memory / GIB:.2f} GiB are free",
            hint="Change --gpu-memory-utilization so that the budgets of all engines on the device, less the weights that they share, fit together.",
        )
    log.info(
        "memory: budget %.2f GiB besides %.2f GiB of shared weights; %.2f GiB were taken by others while waiting",
        requested / GIB,
        holding.external_bytes / GIB,
        holding.neighbours / GIB,
    )
