"""What sleep mode, memory accounting and scratch KV rely on in SGLang: its memory saver, its KV pools, and the plan of their size."""

from __future__ import annotations

from gms_patches.patch import Symbol, group

_SAVER = "a memory saver of its own"
_SLEEP = "sleep and wake-up of a scheduler"
_BUDGET = "a plan of the KV memory in place of a measurement"
_PRELOADED = "weights that are on the device already"
_POOLS = "KV caches on scratch memory"
_PROMOTION = "the promotion of a scheduler"
_GRAPHS = "a memory saver that leaves CUDA graphs alone"

MEMORY: tuple[Symbol, ...] = (
    *group(
        _SAVER,
        "sglang.srt.utils.torch_memory_saver_adapter",
        {
            "TorchMemorySaverAdapter": (),
            "TorchMemorySaverAdapter.configure_subprocess": ("self",),
            "TorchMemorySaverAdapter.region": ("self, tag, enable_cpu_backup=",),
            "TorchMemorySaverAdapter.cuda_graph": ("self, **kwargs",),
            "TorchMemorySaverAdapter.disable": ("self",),
            "TorchMemorySaverAdapter.pause": ("self, tag",),
            "TorchMemorySaverAdapter.resume": ("self, tag",),
            "TorchMemorySaverAdapter.check_validity": ("self, caller_name",),
            "TorchMemorySaverAdapter.enabled": ("self",),
        },
    ),
    *group(
        _SAVER,
        "sglang.srt.constants",
        {"GPU_MEMORY_TYPE_KV_CACHE": (), "GPU_MEMORY_TYPE_WEIGHTS": (), "GPU_MEMORY_TYPE_CUDA_GRAPH": ()},
    ),
    # It looks at `enabled` alone: a memory saver that says no leaves capturing as it is without one.
    Symbol("sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend:BreakableCudaGraphBackend", _GRAPHS),
    *group(
        _SLEEP,
        "sglang.srt.managers.scheduler_components.weight_updater",
        {
            "SchedulerWeightUpdaterManager": (),
            "SchedulerWeightUpdaterManager.release_memory_occupation": ("self, recv_req",),
            "SchedulerWeightUpdaterManager.resume_memory_occupation": ("self, recv_req",),
            "SchedulerWeightUpdaterManager.offload_tags": (),
            "SchedulerWeightUpdaterManager.memory_saver_adapter": (),
        },
    ),
    *group(
        _SLEEP,
        "sglang.srt.managers.io_struct",
        {"ReleaseMemoryOccupationReqInput.tags": (), "ResumeMemoryOccupationReqInput.tags": ()},
    ),
    *group(
        _SLEEP,
        "sglang.srt.managers.scheduler",
        {
            "Scheduler.flush_cache": ("self, empty_cache=",),
            "Scheduler.is_fully_idle": ("self, for_health_check=", "self, for_health_check=, ignore_waiting="),
        },
    ),
    *group(
        _BUDGET,
        "sglang.srt.mem_cache.kv_cache_configurator",
        {
            "KVCacheConfigurator.configure": ("self, *, pre_model_load_memory",),
            "KVCacheConfigurator.gpu_id": (),
            "KVCacheConfigurator.is_draft_worker": (),
            "KVCacheConfigurator.model_config": (),
            # With a recurrent state its share is taken inside the budget, so there the reading of free memory is replaced, not the result.
            "KVCacheConfigurator.mambaish_config": (),
            "get_available_gpu_memory": ("device, gpu_id, distributed=, empty_cache=, cpu_group=",),
        },
    ),
    *group(
        _BUDGET,
        "sglang.srt.model_executor.model_runner",
        {"ModelRunner.max_total_num_tokens": (), "ModelRunner.pre_model_load_memory": (), "ModelRunner.loader": ()},
    ),
    Symbol(
        "sglang.srt.model_executor.model_runner:ModelRunner.account_preloaded_weights",
        _PRELOADED,
        ("self, preloaded_weights_bytes",),
        ">=0.5.19",
    ),
    Symbol("sglang.srt.model_loader.loader:BaseModelLoader.preloaded_weights_bytes", _PRELOADED, (), ">=0.5.19"),
    # These two are the pools that may lie on scratch; what they allocate are values, which may be wrong until the promotion.
    *group(
        _POOLS,
        "sglang.srt.mem_cache.memory_pool",
        {
            "MHATokenToKVPool": (),
            "MHATokenToKVPool._create_buffers_normal": ("self",),
            "MHATokenToKVPool.k_buffer": (),
            "MHATokenToKVPool.v_buffer": (),
            "MLATokenToKVPool": (),
            "MLATokenToKVPool._create_buffers": ("self",),
            "MLATokenToKVPool.kv_buffer": (),
            "KVCache.size": (),
            "KVCache.page_size": (),
            "KVCache.dtype": (),
            "KVCache.layer_num": (),
            "KVCache.memory_saver_adapter": (),
            "ReqToTokenPool": (),
            "ReqToTokenPool.req_to_token": (),
        },
    ),
    *group(
        _PROMOTION,
        "sglang.srt.managers.scheduler",
        {
            "Scheduler": (),
            "Scheduler.tp_worker": (),
            "Scheduler.tp_cpu_group": (),
            "Scheduler.weight_updater": (),
            "Scheduler.memory_saver_adapter": (),
            "Scheduler.req_to_token_pool": (),
        },
    ),
    Symbol("sglang.srt.managers.tp_worker:TpModelWorker.model_runner", _PROMOTION, ("self",)),
    *group(
        _PROMOTION,
        "sglang.srt.model_executor.model_runner",
        {"ModelRunner.token_to_kv_pool": (), "ModelRunner.req_to_token_pool": (), "ModelRunner.model": ()},
    ),
)
