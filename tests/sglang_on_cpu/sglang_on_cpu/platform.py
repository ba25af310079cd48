"""A platform of SGLang that has nothing but PyTorch. What SGLang offers for CPUs needs kernels that no package index has."""

from __future__ import annotations

import importlib
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def _found(module: str, name: str) -> Any:
    # Imported late: SGLang asks for its platform while it is still importing these modules.
    return getattr(importlib.import_module(f"sglang.srt.mem_cache.{module}"), name)


class PlainTorchPlatform(CpuDeviceMixin, SRTPlatform):
    """Attention of PyTorch, SGLang's ordinary pools, no CUDA graphs."""

    _enum, device_name, device_type = PlatformEnum.OOT, "cpu", "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_mha_kv_pool_cls(self) -> Any:
        return _found("memory_pool", "MHATokenToKVPool")

    def get_mla_kv_pool_cls(self) -> Any:
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod

        # Prompts too are read from the pool as it has them: PyTorch's backend takes no keys and values beside it.
        AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
        pool: Any = _found("memory_pool", "MLATokenToKVPool")
        if not hasattr(_found("kv_cache_configurator", "KVCacheConfigurator"), "_build_oot_mla_kv_pool"):
            return pool

        def made(*args: Any, index_head_dim: int | None = None, **kwargs: Any) -> Any:
            """Before 0.5.21 SGLang gives the pools of other platforms what only those for sparse attention need."""
            return pool(*args, **kwargs)

        return made

    def get_paged_allocator_cls(self) -> Any:
        return _found("allocator", "PagedTokenToKVPoolAllocator")

    def support_cuda_graph(self) -> bool:
        return False

    def init_backend(self) -> None:
        pass
