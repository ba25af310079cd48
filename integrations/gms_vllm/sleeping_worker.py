"""What a worker adds so that its engine sleeps and wakes up by GMS."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
from vllm.platforms import current_platform

from gms_core.amounts import amount
from gms_core.engine_config import GmsConfig
from gms_core.failover.config import failover_config
from gms_core.kv.private import PrivateKv
from gms_core.pytorch import placed
from gms_core.pytorch.kv import clearing
from gms_core.sleep import KV_CACHE, KvMemory
from gms_core.vmm import open_driver
from gms_core.weights import holdings
from gms_core.weights.options import LOAD_FORMAT
from gms_vllm.config import loader_options
from gms_vllm.kv_buffers import RawBuffers, raw_buffers
from gms_vllm.place import device_id
from gms_vllm.sleep import GmsSleepBackend, register_backend

log = logging.getLogger("vllm.gms")


class GmsSleepMixin:
    """Sleep and wake-up, and KV memory that can be given back meanwhile. With another load format than ``gms`` it changes nothing.

    Attributes:
        kv_memory: The KV memory, if GMS has placed it; of an engine that fails over a `gms_core.kv.retained.RetainedKv`.
    """

    vllm_config: Any
    kv_memory: KvMemory | None = None
    _backend: GmsSleepBackend | None = None
    _weights: tuple[holdings.Holding, ...] = ()
    _buffers: RawBuffers | None = None

    def _sleeps_by_gms(self) -> bool:
        return bool(self.vllm_config.load_config.load_format == LOAD_FORMAT)

    @property
    def asleep(self) -> frozenset[str]:
        """What of this worker's memory is unmapped now."""
        return frozenset() if self._backend is None else self._backend.sleeper.asleep

    def sleep_backend(self) -> GmsSleepBackend:
        """The mechanism of this worker."""
        if self._backend is None:
            register_backend()
            self._backend = SleepModeBackendFactory.get_backend_class("gms")()
        sleeper = self._backend.sleeper
        sleeper.kv, sleeper.weights = () if self.kv_memory is None else (self.kv_memory,), self._weights
        return self._backend

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, and remember which of this process's weights are this worker's."""
        before = holdings.all_kept()
        base: Any = super()
        base.load_model(*args, **kwargs)
        self._weights = holdings.all_kept()[len(before) :]

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, at addresses of GMS where its memory is to be taken away from beneath it.

        Raises:
            EngineUnsupported: It, or a part of it, was made elsewhere.
        """
        base: Any = super()
        place = self._kv_placing(kv_cache_config)
        if place is None:
            base.initialize_from_config(kv_cache_config)
            return
        self._buffers = RawBuffers(raw_buffers(kv_cache_config), place)
        base.initialize_from_config(kv_cache_config)
        self._buffers.check_complete()
        self._buffers = None

    def _kv_placing(self, kv_cache_config: Any) -> Callable[[int], int] | None:  # noqa: ARG002 - for mixins that override it
        """What gives the raw buffers of the KV cache their addresses; None for memory of PyTorch's own."""
        if not self._has_private_kv():
            return None
        kv = self.kv_memory = PrivateKv(open_driver(device_id()), clearing(torch_device()), self._options().memory_timeout_s)
        return kv.place

    def _has_private_kv(self) -> bool:
        sleeps = self._sleeps_by_gms() and bool(self.vllm_config.model_config.enable_sleep_mode)
        return sleeps and failover_config(self._options()) is None

    def _options(self) -> GmsConfig:
        return loader_options(self.vllm_config.load_config.model_loader_extra_config or {}).gms

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag == KV_CACHE and self._buffers is not None:
            return placed(self._buffers.place, torch_device())
        base: Any = super()
        found: AbstractContextManager[Any] = base._maybe_get_memory_pool_context(tag)  # noqa: SLF001 - it is overridden here
        return found

    def sleep(self, level: int = 1) -> None:
        """Unmap weights and KV memory."""
        base: Any = super()
        if not self._sleeps_by_gms():
            base.sleep(level)
            return
        start = time.perf_counter()
        self.sleep_backend().suspend(level)
        if self._suspends_communicators():
            from vllm.distributed.parallel_state import suspend_device_comms

            suspend_device_comms()
        give_back_cached()
        self._say(f"asleep at level {level}", start)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Map weights and KV memory again.

        Args:
            tags: ``weights`` and ``kv_cache`` name one of them; None means both.
        """
        base: Any = super()
        if not self._sleeps_by_gms():
            base.wake_up(tags)
            return
        start = time.perf_counter()
        self.sleep_backend().resume(tags)
        if self._suspends_communicators():
            from vllm.distributed.parallel_state import resume_device_comms

            resume_device_comms()
        self._say(f"awake but for {', '.join(sorted(self.asleep))}" if self.asleep else "awake", start)

    def discard(self, tags: Collection[str]) -> None:
        """Unmap what is named, and forget what was cached."""
        base: Any = super()
        if not self._sleeps_by_gms():
            base.discard(tags)
            return
        self.sleep_backend().discard(tags)
        give_back_cached()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step; refused while nothing can be computed, unless all that it has to do is to forget requests that have ended."""
        tokens = getattr(args[0] if args else kwargs.get("scheduler_output"), "total_num_scheduled_tokens", None)
        if tokens != 0:
            self._check_ready(scheduled=bool(tokens))
        base: Any = super()
        return base.execute_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Choose the tokens of a step; refused while nothing can be computed."""
        self._check_ready(scheduled=False)
        base: Any = super()
        return base.sample_tokens(*args, **kwargs)

    def execute_dummy_batch(self) -> None:
        """Run a step without requests; refused while nothing can be computed."""
        self._check_ready(scheduled=False)
        base: Any = super()
        base.execute_dummy_batch()

    def _suspends_communicators(self) -> bool:
        return bool(getattr(self.vllm_config.model_config, "enable_nccl_comm_suspend", False))

    def _say(self, state: str, start: float) -> None:
        kv = f" ({amount(self.kv_memory.size)} of KV memory)" if isinstance(self.kv_memory, PrivateKv) else ""
        log.info("%s, in %.1f ms%s", state, (time.perf_counter() - start) * 1000, kv)

    def _check_ready(self, *, scheduled: bool) -> None:  # noqa: ARG002 - for mixins that override it
        """Raise unless a step can be computed.

        Args:
            scheduled: Whether vLLM's scheduler has planned the step, and takes it for computed.

        Raises:
            EngineAsleep: The memory is not mapped.
        """
        if self._backend is not None:  # the scheduler is paused while the engine sleeps, but some steps reach a worker all the same
            self._backend.sleeper.check_awake()


def torch_device() -> torch.device:
    """The device of this worker, for PyTorch."""
    return torch.device("cpu") if current_platform.is_cpu() else torch.device("cuda", torch.cuda.current_device())


def give_back_cached() -> None:
    """Give back what PyTorch keeps for its next allocations, as vLLM's own sleep mode does."""
    if current_platform.is_cuda():
        torch.cuda.empty_cache()
