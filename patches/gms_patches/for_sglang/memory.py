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
            "SchedulerWeightUpdaterManager.offload_tags": (),
            "SchedulerWeightUpdaterManager.tp_cpu_group": (),
            "SchedulerWeightUpdaterManager.is_fully_idle": (),
            "SchedulerWeightUpdaterManager.scheduler": (),
        },
    ),
    *group(
        _SLEEP,
        "sglang.srt.managers.io_struct",
        {
            "ReleaseMemoryOccupationReqInput.tags": (),
            "ReleaseMemoryOccupationReqOutput": (),
            "ResumeMemoryOccupationReqInput.tags": (),
            "ResumeMemoryOccupationReqOutput": (),
            "BaseReq.rid": (),
        },
    ),
    Symbol("sglang.srt.managers.tokenizer_manager:TokenizerManager.auto_create_handle_loop", _SLEEP, ("self",)),
    Symbol("sglang.srt.managers.tokenizer_manager:TokenizerManager.server_args", _SLEEP),
    *group(
        _SLEEP,
        "sglang.srt.managers.scheduler",
        {
            "Scheduler.flush_cache": ("self, empty_cache=",),
            "Scheduler.is_fully_idle": ("self, for_health_check=", "self, for_health_check=, ignore_waiting="),
            "Scheduler._engine_paused": (),
        },
    ),
    *group(
        _BUDGET,
        "sglang.srt.mem_cache.kv_cache_configurator",
        {
            "KVCacheConfigurator.config_from_budget": ("self, budget_bytes, *, cap_tokens=",),
            "KVCacheConfigurator.page_size": (),
            "KVCacheConfigurator.is_hybrid_swa": (),
            "KVCacheConfigurator.is_draft_worker": (),
            "KVCacheConfigurator.mambaish_config": (),
            "KVCacheConfigurator.post_capture_kv_active": (),
            "KVCacheConfigurator.spec_algorithm": (),
            "KVCacheConfigResult.max_total_num_tokens": (),
            "KVCacheConfigResult.token_to_kv_pool": (),
            "KVCacheConfigResult.req_to_token_pool": (),
        },
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
            "MHATokenToKVPool.k_buffer": (),
            "MHATokenToKVPool.v_buffer": (),
            "MLATokenToKVPool": (),
            "MLATokenToKVPool.kv_buffer": (),
            "KVCache.size": (),
            "KVCache.page_size": (),
            "KVCache.dtype": (),
            "KVCache.store_dtype": (),
            "KVCache.start_layer": (),
            "KVCache.device": (),
            "ReqToTokenPool": (),
            "ReqToTokenPool.req_to_token": (),
        },
    ),
    *group(
        _PROMOTION,
        "sglang.srt.managers.scheduler",
        {
            "Scheduler": (),
            "Scheduler.req_to_token_pool": (),
            "Scheduler.forward_stream": (),
            "Scheduler.running_batch": (),
            "Scheduler.waiting_queue": (),
            "Scheduler.ipc_channels": (),
        },
    ),
    Symbol("sglang.srt.managers.scheduler:Scheduler._release_aborted_request", _PROMOTION, ("self, req",), ">=0.5.20"),
    *group(_PROMOTION, "sglang.srt.managers.io_struct", {"AbortReq": (), "AbortReq.finished_reason": (), "BaseReq.http_worker_ipc": ()}),
    Symbol("sglang.srt.managers.schedule_batch:Req.http_worker_ipc", _PROMOTION),
    Symbol("sglang.srt.managers.scheduler_components.output_sender:SenderWrapper.send_output", _PROMOTION, ("self, output, recv_obj=",)),
)
