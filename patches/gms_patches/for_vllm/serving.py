"""What failover relies on in vLLM's front end, its processes and its way to end."""

from __future__ import annotations

from gms_patches.patch import Symbol, group

_CALLS = "calls from the front end to all ranks"
_ENDS = "leaving in order"
_COUNT = "several API servers"
_REFUSED = "refusals of failover"


SERVING: tuple[Symbol, ...] = (
    *group(
        _CALLS,
        "vllm.v1.engine.async_llm",
        {
            "AsyncLLM.collective_rpc": ("self, method, timeout=, args=, kwargs=",),
            "AsyncLLM.reset_prefix_cache": ("self, reset_running_requests=, reset_connector=",),
            "AsyncLLM.engine_core": (),
            "AsyncLLM.vllm_config": (),
            "AsyncLLM.errored": ("self",),
        },
    ),
    *group(
        _CALLS,
        "vllm.v1.engine.core_client",
        {"AsyncMPClient.call_utility_async": ("self, method, *args",), "MPClient.ensure_alive": ("self",)},
    ),
    *group(_CALLS, "vllm.v1.engine.core", {"EngineCore": (), "EngineCore.scheduler": (), "EngineCoreProc": (), "EngineCoreProc.run_engine_core": ()}),
    *group(_CALLS, "vllm.v1.core.sched.output", {"SchedulerOutput.total_num_scheduled_tokens": ()}),
    *group(_ENDS, "vllm.v1.engine.async_llm", {"AsyncLLM.shutdown": ("self, timeout=",)}),
    *group(_ENDS, "vllm.config.vllm", {"VllmConfig.shutdown_timeout": ()}),
    *group(_ENDS, "vllm.v1.core.sched.interface", {"SchedulerInterface.get_num_unfinished_requests": ("self",)}),
    Symbol("vllm.entrypoints.launchers.launcher:NoSignalServer._accept_tasks", _ENDS, (), ">=0.33"),
    *group(_COUNT, "vllm.engine.arg_utils", {"EngineArgs._api_process_rank": (), "EngineArgs._api_process_count": ()}),
    *group(_COUNT, "vllm.config.parallel", {"ParallelConfig._api_process_rank": (), "ParallelConfig._api_process_count": ()}),
    *group(
        _REFUSED,
        "vllm.config.parallel",
        {"ParallelConfig.nnodes": (), "ParallelConfig.distributed_executor_backend": ()},
    ),
    *group(_REFUSED, "vllm.config.vllm", {"VllmConfig.kv_transfer_config": ()}),
    *group(_REFUSED, "vllm.envs", {"VLLM_USE_RUST_FRONTEND": ()}),
    *group(_CALLS, "vllm.envs", {"VLLM_API_KEY": ()}),
    *group(
        _REFUSED,
        "vllm.usage.usage_lib",
        {"UsageContext.OPENAI_API_SERVER": (), "UsageContext.LLM_CLASS": (), "UsageContext.ENGINE_CONTEXT": (), "UsageContext.UNKNOWN_CONTEXT": ()},
    ),
)
