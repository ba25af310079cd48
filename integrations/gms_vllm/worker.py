"""The worker process of an engine that shares its weights."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from vllm.platforms import current_platform

from gms_core.errors import EngineUnsupported
from gms_core.weights import holdings
from gms_core.weights.options import LOAD_FORMAT
from gms_vllm import accounting
from gms_vllm.shadow_worker import GmsShadowMixin

log = logging.getLogger("vllm.gms")

_PLATFORM_WORKERS = {"cuda": ("vllm.v1.worker.gpu_worker", "Worker"), "cpu": ("vllm.v1.worker.cpu_worker", "CPUWorker")}
_REFUSED_HINT = "Start another engine with the new weights, and stop this one."


class GmsWorkerMixin(GmsShadowMixin):
    """What a worker adds so that memory is accounted for, and weights are published only once the engine is ready.

    To be named before vLLM's worker among the bases of a class. With another load format than ``gms`` it changes nothing.
    """

    vllm_config: Any

    def _shares(self) -> bool:
        return bool(self.vllm_config.load_config.load_format == LOAD_FORMAT)

    def init_device(self) -> None:
        """Set the device up; the start-up check leaves out what is shared."""
        base: Any = super()
        if not self._shares():
            base.init_device()
            return
        # An engine that publishes measures its memory first: a reader that attached meanwhile would be in the measurement. And if one of its ranks
        # fails to load, none may have published: the next engine's ranks would wait for the one that is missing.
        holdings.defer_commits()
        if not current_platform.is_cuda():
            base.init_device()
            self.adopts_plan()
            return
        with accounting.startup_check(self.vllm_config, self._options(), self.adopts_plan if self.fails_over else None):
            base.init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then correct the memory budget by what loading came to."""
        base: Any = super()
        with _old_objects_frozen() if self._shares() else contextlib.nullcontext():
            base.load_model(*args, **kwargs)
        holding = holdings.current()
        if holding is not None and self._shares() and current_platform.is_cuda():
            accounting.settle(self, holding)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, which is the last step of the start; then publish."""
        base: Any = super()
        result = base.compile_or_warm_up_model()
        holdings.commit_due()
        return result

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused where weights are shared."""
        self._refuse("reload_weights")
        base: Any = super()
        base.reload_weights(*args, **kwargs)

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused where weights are shared."""
        self._refuse("update_weights")
        base: Any = super()
        base.update_weights(*args, **kwargs)

    def reset_weights(self) -> None:
        """Refused where weights are shared. VLLM has it from 0.32 on."""
        self._refuse("reset_weights")
        base: Any = super()
        base.reset_weights()

    def _refuse(self, call: str) -> None:
        if self._shares():
            raise EngineUnsupported(f"{call} would write weights that other engines read", hint=_REFUSED_HINT)


@contextlib.contextmanager
def _old_objects_frozen() -> Iterator[None]:
    """Leave the objects that are there already out of garbage collections.

    VLLM collects three times while it measures what loading takes (vllm/utils/mem_utils.py, DeviceMemoryProfiler), a quarter of a second each over
    a million objects of imported modules. That is more than attaching takes, and loading makes none of those objects garbage. Nothing is frozen for
    good at this point: vLLM does that once the engine is ready.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _platform_worker() -> Any:
    """VLLM's worker for this platform, from which `GmsWorker` derives."""
    found = _PLATFORM_WORKERS.get(current_platform.device_type)
    if found is None:
        raise EngineUnsupported(f"--load-format gms works on NVIDIA GPUs and on CPUs, not on {current_platform.device_name}")
    return getattr(importlib.import_module(found[0]), found[1])


class GmsWorker(GmsWorkerMixin, _platform_worker()):  # type: ignore[misc]
    """vLLM's worker for this platform, with shared weights."""
