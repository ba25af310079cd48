"""What sleep mode relies on in vLLM: its registry of mechanisms, and the calls of a worker that sleeps."""

from __future__ import annotations

from gms_patches.patch import Symbol, group

_MECHANISM = "the mechanism of sleep mode"
_CHOICE = "choosing the mechanism of sleep mode"
_CALLS = "sleep and wake-up of a worker"
_KV = "KV memory that can be taken away"
_COMMUNICATORS = "communicators that sleep too"


SLEEP_MODE: tuple[Symbol, ...] = (
    *group(
        _MECHANISM,
        "vllm.device_allocator.sleep_mode_backend",
        {
            "SleepModeBackend": (),
            "SleepModeBackend.__init__": ("self",),
            "SleepModeBackend.suspend": ("self, level=",),
            "SleepModeBackend.resume": ("self, tags=",),
            "SleepModeBackend._state": (),
            "SleepModeBackendFactory": (),
            "SleepModeBackendFactory.register_backend": ("cls, name, module_path, class_name",),
            "SleepModeBackendFactory.get_backend_class": ("cls, name",),
        },
    ),
    Symbol("vllm.device_allocator.sleep_mode_backend:SleepModeBackend.discard", _MECHANISM, ("self, tags",), ">=0.32"),
    *group(_CHOICE, "vllm.config.model", {"ModelConfig.sleep_mode_backend": (), "ModelConfig.enable_cumem_allocator": ()}),
    *group(_CHOICE, "vllm.engine.arg_utils", {"EngineArgs.enable_sleep_mode": ()}),
    *group(_CHOICE, "vllm.engine.arg_utils", {"EngineArgs.sleep_mode_backend": ()}, ">=0.33"),
    *group(
        _CALLS,
        "vllm.v1.worker.gpu_worker",
        {
            "Worker.sleep": ("self, level=",),
            "Worker.wake_up": ("self, tags=",),
            "Worker.execute_model": ("self, scheduler_output",),
            "Worker.execute_dummy_batch": ("self",),
        },
    ),
    *group(_CALLS, "vllm.v1.worker.gpu_worker", {"Worker.discard": ("self, tags",)}, ">=0.32"),
    *group(_CALLS, "vllm.v1.worker.cpu_worker", {"CPUWorker.sleep": ("self, level=",), "CPUWorker.wake_up": ("self, tags=",)}),
    *group(
        _KV,
        "vllm.v1.worker.gpu_worker",
        {"Worker.initialize_from_config": ("self, kv_cache_config",), "Worker._maybe_get_memory_pool_context": ("self, tag",)},
    ),
    *group(_KV, "vllm.v1.kv_cache_interface", {"KVCacheConfig.kv_cache_tensors": (), "KVCacheTensor.size": ()}),
    *group(
        _COMMUNICATORS,
        "vllm.distributed.parallel_state",
        {"suspend_device_comms": ("",), "resume_device_comms": ("",)},
        ">=0.30",
    ),
    *group(_COMMUNICATORS, "vllm.config.model", {"ModelConfig.enable_nccl_comm_suspend": ()}, ">=0.30"),
)
