"""Every symbol of vLLM that the adapter touches, with the parameter lists that it can work with. A test compares the adapter's source with it."""

from __future__ import annotations

from gms_patches.for_vllm.kv_cache import KV_CACHE
from gms_patches.for_vllm.serving import SERVING
from gms_patches.for_vllm.sleep_mode import SLEEP_MODE
from gms_patches.patch import Symbol, group

_PROCESSED = ">=0.30"
"""From this version on vLLM can take weights that are post-processed already."""
_LEGACY = "<0.30"


_LOAD = (
    *group(
        "the load format",
        "vllm.model_executor.model_loader",
        {"register_model_loader": ("load_format",), "get_model_loader": ("load_config",)},
    ),
    *group(
        "the load format",
        "vllm.model_executor.model_loader.base_loader",
        {
            "BaseModelLoader": (),
            "BaseModelLoader.__init__": ("self, load_config",),
            "BaseModelLoader.download_model": ("self, model_config",),
            "BaseModelLoader.load_weights": ("self, model, model_config",),
            "BaseModelLoader.load_model": ("self, vllm_config, model_config, prefix=",),
        },
    ),
    Symbol(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.get_external_weight_memory",
        "memory accounting through vLLM's own seam",
        ("self, vllm_config",),
        ">=0.32",
    ),
    *group(
        "options of the loader",
        "vllm.config.load",
        {
            "LoadConfig": (),
            "LoadConfig.load_format": (),
            "LoadConfig.model_loader_extra_config": (),
            "LoadConfig.device": (),
            "LoadConfig.download_dir": (),
        },
    ),
    *group(
        "choosing the worker",
        "vllm.engine.arg_utils",
        {
            "EngineArgs.load_format": (),
            "EngineArgs.worker_cls": (),
            "EngineArgs.model": (),
            "EngineArgs.model_weights": (),
            "EngineArgs.quantization": (),
            "EngineArgs.model_loader_extra_config": (),
        },
    ),
    *group(
        "draft models, which stay private",
        "vllm.config.speculative",
        {"SpeculativeConfig.draft_model_config": ()},
    ),
    Symbol("vllm.platforms:current_platform", "telling CUDA from CPU"),
    *group(
        "telling CUDA from CPU",
        "vllm.platforms.interface",
        {"Platform.is_cuda": ("self",), "Platform.is_cpu": ("self",), "Platform.device_type": (), "Platform.device_name": ()},
    ),
    *group(
        "leaving communicators out of what is published",
        "vllm.distributed.device_communicators.base_device_communicator",
        {"DeviceCommunicatorBase": (), "All2AllManagerBase": ()},
    ),
    *group(
        "one decision for all ranks",
        "vllm.distributed.parallel_state",
        {
            "get_world_group": ("",),
            "get_tp_group": ("",),
            "get_pp_group": ("",),
            "GroupCoordinator": (),
            "GroupCoordinator.broadcast_object": ("self, obj=, src=",),
            "GroupCoordinator.rank_in_group": (),
            "GroupCoordinator.world_size": (),
        },
    ),
)

_ATTACH = (
    *group(
        "building a model without memory",
        "vllm.model_executor.model_loader.utils",
        {
            "initialize_model": ("vllm_config, *, prefix=, model_class=, model_config=",),
            "process_weights_after_loading": ("model, model_config, target_device",),
        },
    ),
    Symbol("vllm.utils.torch_utils:set_default_torch_dtype", "building a model without memory", ("dtype",)),
    *group("taking over weights", "vllm.model_executor.layers.quantization.base_config", {"QuantizeMethodBase": ()}),
    Symbol(
        "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.supports_pre_processed_weights", "taking over weights", (), _PROCESSED
    ),
    Symbol("vllm.model_executor.utils:weights_already_processed", "taking over weights", ("",), _PROCESSED),
    Symbol("vllm.model_executor.layers.quantization.kv_cache:BaseKVCacheMethod", "taking over weights"),
    Symbol(
        "vllm.model_executor.layers.quantization.kv_cache:BaseKVCacheMethod.process_weights_after_loading", "taking over weights", ("self, layer",)
    ),
    Symbol("vllm.model_executor.layers.linear:UnquantizedLinearMethod", "taking over weights"),
    Symbol("vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod", "taking over weights"),
    *group(
        "taking over weights",
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        {"UnquantizedFusedMoEMethod": (), "UnquantizedFusedMoEMethod.experts_cls": ()},
    ),
    *group(
        "taking over weights before 0.30",
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        {
            "UnquantizedFusedMoEMethod.process_weights_after_loading": ("self, layer",),
            "UnquantizedFusedMoEMethod.get_fused_moe_quant_config": ("self, layer",),
            "UnquantizedFusedMoEMethod.unquantized_backend": (),
            "UnquantizedFusedMoEMethod.moe_quant_config": (),
            "UnquantizedFusedMoEMethod.moe_kernel": (),
        },
        _LEGACY,
    ),
    Symbol(
        "vllm.model_executor.layers.fused_moe.oracle.unquantized:make_unquantized_moe_kernel",
        "taking over weights before 0.30",
        ("quant_config, moe_config, backend, experts_cls, routing_tables=",),
        _LEGACY,
    ),
    Symbol(
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts._expert_routing_tables",
        "taking over weights before 0.30",
        ("self",),
        _LEGACY,
    ),
    Symbol("vllm.config.model:ModelConfig.word_embeddings_untied_by_checkpoint", "tied embeddings", (), _PROCESSED),
    Symbol(
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention.process_weights_after_loading",
        "matrices that MLA derives from its weights",
        ("self, act_dtype",),
    ),
)

_IDENTITY = (
    *group(
        "the identity of the weights",
        "vllm.config.model",
        {
            "ModelConfig.hf_config": (),
            "ModelConfig.model": (),
            "ModelConfig.model_weights": (),
            "ModelConfig.revision": (),
            "ModelConfig.dtype": (),
            "ModelConfig.quantization": (),
            "ModelConfig.model_impl": (),
            "ModelConfig.runner_type": (),
            "ModelConfig.enable_sleep_mode": (),
        },
    ),
    *group(
        "the identity of the weights",
        "vllm.config.parallel",
        {
            "ParallelConfig.data_parallel_size": (),
            "ParallelConfig.data_parallel_rank": (),
            "ParallelConfig.decode_context_parallel_size": (),
            "ParallelConfig.enable_expert_parallel": (),
            "ParallelConfig.expert_placement_strategy": (),
            "ParallelConfig.enable_eplb": (),
            "ParallelConfig.enable_elastic_ep": (),
            "ParallelConfig.rank": (),
            "ParallelConfig.world_size": (),
            "ParallelConfig.worker_cls": (),
        },
    ),
    *group("the identity of the weights", "vllm.config.cache", {"CacheConfig.cache_dtype": (), "CacheConfig.kv_cache_dtype_skip_layers": ()}),
    *group("the identity of the weights", "vllm.config.kernel", {"KernelConfig.moe_backend": (), "KernelConfig.linear_backend": ()}),
    Symbol("vllm.config.attention:AttentionConfig.backend", "the identity of the weights"),
    *group("the identity of the weights", "vllm.envs", {"environment_variables": (), "is_set": ("name",)}),
    *group(
        "refusals",
        "vllm.config.vllm",
        {
            "VllmConfig.offload_config": (),
            "VllmConfig.weight_transfer_config": (),
            "VllmConfig.speculative_config": (),
            "VllmConfig.kernel_config": (),
            "VllmConfig.attention_config": (),
            "VllmConfig.load_config": (),
            "VllmConfig.cache_config": (),
            "VllmConfig.device_config": (),
        },
    ),
    *group("refusals", "vllm.config.offload", {"UVAOffloadConfig.cpu_offload_gb": (), "PrefetchOffloadConfig.offload_group_size": ()}),
)

_WORKER = (
    *group(
        "memory accounting and the moment of publication",
        "vllm.v1.worker.gpu_worker",
        {
            "Worker": (),
            "Worker.init_device": ("self",),
            "Worker.load_model": ("self, *, load_dummy_weights=",),
            "Worker.compile_or_warm_up_model": ("self",),
            "Worker.init_snapshot": (),
            "Worker.requested_memory": (),
            "request_memory": ("init_snapshot, cache_config", "init_snapshot, cache_config, external_weight_memory="),
        },
    ),
    *group(
        "refusing new weights",
        "vllm.v1.worker.gpu_worker",
        {"Worker.reload_weights": ("self, *args, **kwargs",), "Worker.update_weights": ("self, update_info",)},
    ),
    Symbol("vllm.v1.worker.gpu_worker:Worker.reset_weights", "refusing new weights", ("self",), ">=0.32"),
    *group(
        "memory accounting",
        "vllm.utils.mem_utils",
        {
            "MemorySnapshot.free_memory": (),
            "MemorySnapshot.total_memory": (),
            "MemorySnapshot.cuda_memory": (),
            "MemorySnapshot.non_torch_memory": (),
        },
    ),
    *group("memory accounting", "vllm.config.cache", {"CacheConfig.gpu_memory_utilization": (), "CacheConfig.kv_cache_memory_bytes": ()}),
)

_CPU = (
    *group(
        "the CPU engine",
        "vllm.v1.worker.cpu_worker",
        {
            "CPUWorker": (),
            "CPUWorker.init_device": ("self",),
            "CPUWorker.load_model": ("self, *, load_dummy_weights=",),
            "CPUWorker.compile_or_warm_up_model": ("self",),
        },
    ),
    Symbol("vllm.model_executor.layers.utils:cpu_unquantized_gemm", "the CPU engine", ("layer, x, weight, bias=",)),
)

SYMBOLS: tuple[Symbol, ...] = (*_LOAD, *_ATTACH, *_IDENTITY, *_WORKER, *_CPU, *SERVING, *SLEEP_MODE, *KV_CACHE)
