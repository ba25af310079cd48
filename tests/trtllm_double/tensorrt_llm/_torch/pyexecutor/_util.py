"""How large a KV cache becomes: it is made small, something is computed, and what is free then is the final one's."""

from tensorrt_llm import _double
from tensorrt_llm._torch.pyexecutor.resource_manager import (
    BYTES_PER_TOKEN,
    CHUNK_BYTES,
    TOKENS_PER_BLOCK,
    KVCacheManager,
    KVCacheManagerV2,
    ResourceManagerType,
)


class KvCacheCreator:
    def __init__(self, *, model_engine, kv_cache_config, tokens_per_block=TOKENS_PER_BLOCK):
        self._model_engine = model_engine
        self._kv_cache_config = kv_cache_config
        self._tokens_per_block = tokens_per_block
        self._max_kv_tokens_in = kv_cache_config.max_tokens
        self._is_kv_cache_manager_v2 = kv_cache_config.use_kv_cache_manager_v2 is True

    def try_prepare_estimation(self):
        self._kv_cache_config.max_tokens = 8 * TOKENS_PER_BLOCK
        self._kv_cache_config.max_gpu_total_bytes = 8 * CHUNK_BYTES
        return True

    def build_managers(self, resources, estimating_kv_cache=False):
        kind = KVCacheManagerV2 if self._is_kv_cache_manager_v2 else KVCacheManager
        resources[ResourceManagerType.KV_CACHE_MANAGER] = kind(self._kv_cache_config)

    def configure_kv_cache_capacity(self, py_executor=None):
        measured = int(_double.mem_get_info()[0] * self._kv_cache_config.free_gpu_memory_fraction)
        if self._is_kv_cache_manager_v2:
            self._kv_cache_config.max_tokens = self._max_kv_tokens_in
        else:
            most = measured // BYTES_PER_TOKEN
            self._kv_cache_config.max_tokens = most if self._max_kv_tokens_in is None else min(most, self._max_kv_tokens_in)
        self._kv_cache_config.max_gpu_total_bytes = measured

    def teardown_managers(self, resources):
        resources.pop(ResourceManagerType.KV_CACHE_MANAGER).shutdown()
