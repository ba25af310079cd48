"""What a worker adds so that its engine can stand by on scratch, and be promoted."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from gms_core.client import Membership
from gms_core.config import settings
from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import EngineUnsupported, NotPromoted
from gms_core.failover.config import failover_config
from gms_core.layout import Identity
from gms_core.pytorch import placed
from gms_core.runtime_dir import socket_path
from gms_vllm.cohort import take_place, this_process
from gms_vllm.config import LOAD_FORMAT
from gms_vllm.identity import expected_identity
from gms_vllm.place import device_id, pool_name
from gms_vllm.retained_kv import RetainedKv
from gms_vllm.sleep import KV_CACHE, RetainedKvMemory
from gms_vllm.sleeping_worker import GmsSleepMixin

log = logging.getLogger("vllm.gms")


class GmsShadowMixin(GmsSleepMixin):
    """Scratch KV, the plan of the KV memory, and promotion. Without a failover block it changes nothing."""

    _retained: RetainedKv | None = None
    _kv_identity: Identity | None = None
    _available_bytes = 0
    _warm = False
    _mark: Any = None

    def _failover(self) -> FailoverConfig | None:
        if self.vllm_config.load_config.load_format != LOAD_FORMAT:
            return None
        return failover_config(self._options())

    def init_device(self) -> None:
        """Set the device up, and join the engine's cohort on the device's server."""
        base: Any = super()
        base.init_device()
        failover = self._failover()
        if failover is None:
            return
        if not settings().cohort:
            raise EngineUnsupported("failover: this worker was started by something that has named no cohort", hint="Use `vllm serve` or `LLM`.")
        gms = self._options()
        membership = this_process(self._name(), (), serves=False, connect_timeout_s=gms.connect_timeout_s).join(self._socket())
        name = pool_name(self.vllm_config, gms.model_copy(update={"tag": failover.kv_tag}))
        device = torch.device("cpu") if current_platform.is_cpu() else torch.device("cuda", torch.cuda.current_device())
        self._retained = RetainedKv(membership, name, device, gms, failover)
        self._kv_identity = kv_identity(self.vllm_config, gms)

    def determine_available_memory(self) -> int:
        """Measure what the KV cache can have; an engine that finds a plan adopts it, and does not measure beside a busy neighbour."""
        base: Any = super()
        if self._retained is None or self._kv_identity is None:
            return int(base.determine_available_memory())
        cache: Any = self.vllm_config.cache_config
        plan = self._retained.ask_plan(self._kv_identity)
        if plan is not None:
            cache.kv_cache_memory_bytes = plan.available_bytes
            log.info("adopted the plan of %.2f GiB of KV memory", plan.available_bytes / 2**30)
        available = int(base.determine_available_memory())
        self._available_bytes = int(cache.kv_cache_memory_bytes or getattr(self, "available_kv_cache_memory_bytes", 0) or available)
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, on scratch."""
        base: Any = super()
        if self._retained is None:
            base.initialize_from_config(kv_cache_config)
            return
        if current_platform.is_cuda():
            torch.cuda.empty_cache()  # what the profile has left in PyTorch's cache is needed by the server
        sizes = [tensor.size for tensor in kv_cache_config.kv_cache_tensors]
        self._retained.lay_out(sizes, kv_cache_config.num_blocks, self._available_bytes)
        base.initialize_from_config(kv_cache_config)
        self._retained.check_placed()
        if self._retained.arena is not None:
            self.kv_memory = RetainedKvMemory(self._retained.arena)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        retained = self._retained
        if tag == KV_CACHE and retained is not None and retained.arena is not None:
            return placed(retained.place, retained.device)
        return super()._maybe_get_memory_pool_context(tag)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, which may run steps on scratch; from then on only a promoted engine runs any."""
        base: Any = super()
        result = base.compile_or_warm_up_model()
        self._warm = True
        return result

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step; refused while the KV cache is scratch."""
        if self._retained is not None and self._warm and not self._retained.promoted:
            raise NotPromoted("this engine is a shadow: its KV memory is scratch", hint="It answers once it is promoted.")
        return super().execute_model(*args, **kwargs)

    def gms_place(self) -> dict[str, Any]:
        """Where this rank is: ``rank``, ``device``, and the ``socket`` of the device's server, which it joins again if that was restarted."""
        if self._retained is not None:
            take_place(self._name(), [self._socket()], serves=False, connect_timeout_s=self._options().connect_timeout_s)
        return {"rank": int(self.vllm_config.parallel_config.rank), "device": str(device_id()), "socket": str(self._socket())}

    def gms_promote(self, timeout_s: float) -> dict[str, Any]:
        """Give the KV cache its memory. Returns ``rank``, ``epoch``, ``bytes``, ``hold_s`` and ``map_s``.

        Raises:
            EngineUnsupported: The engine does not fail over.
            GmsError: The memory was not granted, or could not be mapped.
        """
        if self._retained is None:
            raise EngineUnsupported("this engine does not fail over", hint="Give it a failover block.")
        if self.sleep_backend().asleep:
            self.wake_up()
        return {"rank": int(self.vllm_config.parallel_config.rank), **self._retained.promote(timeout_s)}

    def gms_beat(self) -> bool:
        """Whether this rank makes progress: it got here, and its device has done what it was given before the last beat."""
        if not current_platform.is_cuda():
            return True
        if self._mark is not None and not self._mark.query():
            return False
        self._mark = torch.cuda.Event()
        self._mark.record()
        return True

    def _name(self) -> str:
        return f"rank {self.vllm_config.parallel_config.rank}"

    def _join(self) -> Membership:
        patience_s = self._options().connect_timeout_s
        return this_process(self._name(), (), serves=False, connect_timeout_s=patience_s).join(self._socket())

    def _socket(self) -> Path:
        return self._options().socket_path or socket_path(device_id(), settings().runtime_dir)


def kv_identity(config: Any, gms: GmsConfig) -> Identity:
    """What has to be equal for two engines to have the same KV memory. To be asked before loading, which changes the configuration.

    Args:
        config: A ``VllmConfig``.
        gms: The engine's block.
    """
    weights = expected_identity(config, config.model_config, content="", extra=gms.identity)
    cache, scheduler = config.cache_config, config.scheduler_config
    speculative = config.speculative_config
    fields = {
        "block_size": str(cache.block_size),
        "gpu_memory_utilization": str(cache.gpu_memory_utilization),
        "kv_cache_memory_bytes": str(cache.kv_cache_memory_bytes or ""),
        "num_gpu_blocks_override": str(cache.num_gpu_blocks_override or ""),
        "max_num_seqs": str(scheduler.max_num_seqs),
        "max_num_batched_tokens": str(scheduler.max_num_batched_tokens),
        "draft": str(speculative.model or speculative.method or "") if speculative is not None else "",
        "draft_tokens": str(speculative.num_speculative_tokens) if speculative is not None else "",
    }
    return Identity({**weights.fields, **{name: value for name, value in fields.items() if value}})
