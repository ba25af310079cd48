"""What scratch KV relies on in vLLM: how the budget is found, how the raw buffers of the KV cache are made, and which calls compute on them."""

from __future__ import annotations

from gms_patches.patch import Symbol, group

_BUDGET = "a plan of the KV memory in place of a measurement"
_BUFFERS = "KV caches on scratch memory"
_GUARD = "refusing to compute before the promotion"
_RANKS = "one plan for all ranks"
_IDENTITY = "the identity of the KV memory"
_EACH = "<0.30"
"""Up to here each tensor of a configuration is a buffer of its own."""
_ONE = ">=0.30"
"""From here on one buffer holds the whole KV cache."""
_BRIDGE = "beginning with the first blocks of the KV cache"

KV_CACHE: tuple[Symbol, ...] = (
    *group(
        _BUDGET,
        "vllm.v1.worker.gpu_worker",
        {"Worker.determine_available_memory": ("self",), "Worker.available_kv_cache_memory_bytes": ()},
    ),
    *group(
        _BUDGET,
        "vllm.v1.worker.cpu_worker",
        {
            "CPUWorker.__init__": ("self, vllm_config, local_rank, rank, distributed_init_method, is_driver_worker=",),
            "CPUWorker.determine_available_memory": ("self",),
        },
    ),
    Symbol("vllm.utils.mem_utils:MemorySnapshot.measure", _BUDGET, ("self",)),
    *group(
        _BUFFERS,
        "vllm.v1.kv_cache_interface",
        {"KVCacheConfig.num_blocks": (), "KVCacheConfig.kv_cache_groups": (), "KVCacheTensor.block_stride": ()},
    ),
    *group(_BUFFERS, "vllm.v1.kv_cache_interface", {"KVCacheGroupSpec.layer_names": (), "KVCacheGroupSpec.kv_cache_spec": ()}),
    Symbol("vllm.v1.kv_cache_interface:KVCacheTensor.shared_by", _BUFFERS, (), _EACH),
    Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner._allocate_kv_cache_tensors", _BUFFERS, ("self, kv_cache_config",), _EACH),
    Symbol("vllm.v1.worker.gpu.attn_utils:_allocate_kv_cache", _BUFFERS, ("kv_cache_config, shared_layers, device",), _EACH),
    Symbol("vllm.v1.worker.utils:allocate_kv_cache", _BUFFERS, ("kv_cache_config, device, layout, kernel_block_sizes=",), _ONE),
    *(
        Symbol(f"{runner}.initialize_kv_cache", _BUFFERS, ("self, kv_cache_config, is_profiling=, kv_cache_allocation_context=",), _ONE)
        for runner in ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner")
    ),
    Symbol("vllm.v1.worker.gpu_worker:Worker.sample_tokens", _GUARD, ("self, grammar_output",)),
    Symbol("vllm.distributed.parallel_state:GroupCoordinator.cpu_group", _RANKS),
    *group(
        _IDENTITY,
        "vllm.config.cache",
        {
            "CacheConfig.block_size": (),
            "CacheConfig.num_gpu_blocks_override": (),
            "CacheConfig.enable_prefix_caching": (),
            "CacheConfig.mamba_block_size": (),
            "CacheConfig.mamba_cache_dtype": (),
            "CacheConfig.mamba_ssm_cache_dtype": (),
            "CacheConfig.mamba_cache_mode": (),
            "CacheConfig.kv_sharing_fast_prefill": (),
        },
    ),
    Symbol("vllm.config.scheduler:SchedulerConfig.disable_hybrid_kv_cache_manager", _IDENTITY),
    Symbol("vllm.config.vllm:VllmConfig.scheduler_config", _IDENTITY),
    Symbol("vllm.config.vllm:VllmConfig.use_v2_model_runner", _IDENTITY),
    *group(_IDENTITY, "vllm.config.speculative", {"SpeculativeConfig.method": (), "SpeculativeConfig.num_speculative_tokens": ()}),
    Symbol("vllm.envs:VLLM_KV_CACHE_LAYOUT", _IDENTITY),
    *group(
        _BRIDGE,
        "vllm.v1.core.kv_cache_utils",
        {
            "FreeKVCacheBlockQueue.get_all_free_blocks": ("self",),
            "FreeKVCacheBlockQueue.remove": ("self, block",),
            "FreeKVCacheBlockQueue.prepend_n": ("self, blocks",),
            "KVCacheBlock.block_id": (),
            "KVCacheBlock.block_hash": ("self",),
        },
    ),
    *group(_BRIDGE, "vllm.v1.core.block_pool", {"BlockPool.free_block_queue": (), "BlockPool.num_gpu_blocks": ()}),
    *group(_BRIDGE, "vllm.v1.core.kv_cache_manager", {"KVCacheManager.block_pool": (), "KVCacheManager.coordinator": ()}),
    *group(_BRIDGE, "vllm.v1.core.sched.scheduler", {"Scheduler.kv_cache_manager": ()}),
    *group(_BRIDGE, "vllm.v1.engine.core", {"EngineCore.collective_rpc": ("self, method, timeout=, args=, kwargs=",)}),
    *(
        Symbol(f"{runner}.kv_caches", _BRIDGE)
        for runner in ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner")
    ),
)
