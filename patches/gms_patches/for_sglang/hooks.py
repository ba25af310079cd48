"""The functions of SGLang that the adapter hooks. SGLang's own `HookRegistry` puts each hook in place, so `gms_patches.apply` has no part in it.

The registry logs a hook that it could not apply and goes on without it, and a plugin that raises is passed over. So each function is described here
as a patch is: `gms patches check` finds out beforehand, and the adapter can verify at run time that all of them are in force.
"""

from __future__ import annotations

from gms_patches.patch import Kind, Patch

TESTED = ">=0.5.16,<0.5.24"
"""Versions of SGLang that the adapter and its hooks were tested with."""

DISTRIBUTIONS = ("sglang",)

_RAW = "0.5.19"
"""From this version on the arguments stay as the user gave them until `resolve_once`, and loaders say how much memory they found in place."""
_CLASS_FIRST = "0.5.18"
"""From this version on a load format that is a class goes before the loaders of quantised models."""
_SESSIONS = "0.5.21"
"""From this version on an update of weights has a beginning and an end."""

VERIFY_LOAD_FORMAT = Patch(
    name="sglang-verify-load-format",
    target="sglang.srt.configs.load_config:LoadConfig._verify_load_format",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self",),
    reason="`--load-format gms` has to become the adapter's loader class; SGLang takes a class, but knows no name for one.",
    upstream="The choices of --load-format can be extended, the enumeration behind them cannot (sglang/srt/configs/load_config.py, LoadFormat).",
)

_RESOLVE_REASON = "With `--load-format gms` options are checked, and what the engine's other processes need is prepared, before one of them starts."
_RESOLVE_UPSTREAM = "Plugins are loaded before the arguments are parsed, and there is no call once they are."

RESOLVE_ARGUMENTS = Patch(
    name="sglang-resolve-arguments",
    target="sglang.srt.server_args:ServerArgs.resolve_once",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self",),
    reason=_RESOLVE_REASON,
    upstream=_RESOLVE_UPSTREAM,
    necessary_from=_RAW,
)

RESOLVE_ARGUMENTS_BEFORE = Patch(
    name=f"sglang-resolve-arguments-before-{_RAW}",
    target="sglang.srt.server_args:ServerArgs.__post_init__",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=f">=0.5.16,<{_RAW}",
    signatures=("self",),
    reason=_RESOLVE_REASON,
    upstream=_RESOLVE_UPSTREAM,
    unnecessary_from=_RAW,
)

CREATE_MEMORY_SAVER = Patch(
    name="sglang-create-memory-saver",
    target="sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.create",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("enable",),
    reason="KV memory is allocated, given up and taken back through this adapter: with GMS, in the memory of the server.",
    upstream="There are two adapters, one for torch_memory_saver and one that does nothing, and no way to name a third.",
)

RUN_HTTP_SERVER = Patch(
    name="sglang-run-http-server",
    target="sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=(
        "server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, subprocess_watchdog, execute_warmup_func=, launch_callback=",
    ),
    reason="A shadow that is ready must not listen before it is the primary.",
    upstream="--gated-launch-port waits before the weights are loaded, and --warmups is for one tokenizer process alone.",
)

LAUNCH_SERVER = Patch(
    name="sglang-launch-server",
    target="sglang.srt.entrypoints.http_server:launch_server",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=(
        (
            "server_args, init_tokenizer_manager_func=, run_scheduler_process_func=, run_detokenizer_process_func=, "
            "execute_warmup_func=, launch_callback="
        ),
    ),
    reason="Of the ways to start an engine this is the one with a server: its lock and its address have to be had before anything is started.",
    upstream="The options do not say what they are resolved for.",
)

LAUNCH_DETOKENIZERS = Patch(
    name="sglang-launch-detokenizers",
    target="sglang.srt.entrypoints.engine:Engine._launch_detokenizer_subprocesses",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("cls, server_args, port_args, run_detokenizer_process_func",),
    reason="A detokenizer is a process of its engine: if it dies, the engine's servers have to know at once.",
    upstream="Before 0.5.23 its process loads no plugins.",
)

WAIT_AND_WARM_UP = Patch(
    name="sglang-wait-and-warm-up",
    target="sglang.srt.entrypoints.http_server:_wait_and_warmup",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("server_args, launch_callback=, execute_warmup_func=", "server_args, launch_callback=, execute_warmup_func=, post_warmup_callback="),
    reason="It makes requests to the server's own address, at which another engine answers while this one is a shadow.",
    upstream="--skip-server-warmup leaves out some of these requests, not all.",
)

PROFILE_AVAILABLE_BYTES = Patch(
    name="sglang-profile-available-bytes",
    target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator._profile_available_bytes",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, pre_model_load_memory",),
    reason="A shadow's KV cache has the size that the primary's has, not that of the memory which is free beside it.",
    upstream="The budget is what is free; --max-total-tokens only lowers it.",
)

ALLOC_MEMORY_POOL_BEFORE = Patch(
    name=f"sglang-alloc-memory-pool-before-{_RAW}",
    target="sglang.srt.model_executor.model_runner:ModelRunner.alloc_memory_pool",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=f">=0.5.16,<{_RAW}",
    signatures=("self, memory_pool_config=",),
    reason="Weights that were on the device before the engine began must count as weights, or the KV cache is too large.",
    upstream="Later versions ask the loader (BaseModelLoader.preloaded_weights_bytes).",
    unnecessary_from=_RAW,
)

EXPORT_STATIC_STATE = Patch(
    name="sglang-export-static-state",
    target="sglang.srt.managers.scheduler_components.weight_updater:_export_static_state",
    kind=Kind.REPLACE,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("model",),
    fingerprints=("862b825c46e1fd5f",),
    reason="Buffers that are published need no copy while the engine sleeps: the server has them.",
    upstream="Buffers are copied whatever the memory saver keeps (weight_updater.py, release_memory_occupation).",
)

IMPORT_STATIC_STATE = Patch(
    name="sglang-import-static-state",
    target="sglang.srt.managers.scheduler_components.weight_updater:_import_static_state",
    kind=Kind.REPLACE,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("model, static_params",),
    fingerprints=("f09bd33ba4c14e53",),
    reason="It writes the copies back in place, and published buffers are read-only.",
    upstream="Buffers are copied whatever the memory saver keeps (weight_updater.py, resume_memory_occupation).",
)


def _creating(name: str, pool: str, method: str) -> Patch:
    return Patch(
        name=f"sglang-create-{name}-buffers",
        target=f"sglang.srt.mem_cache.memory_pool:{pool}.{method}",
        kind=Kind.WRAP,
        distributions=DISTRIBUTIONS,
        versions=TESTED,
        signatures=("self",),
        reason="Values of the KV cache may lie on memory that other pages share until an engine is promoted, and nothing else may.",
        upstream="The KV cache and tables of indices are allocated with the same tag (sglang/srt/mem_cache/memory_pool.py).",
    )


CREATE_MHA_BUFFERS = _creating("mha", "MHATokenToKVPool", "_create_buffers_normal")
CREATE_MLA_BUFFERS = _creating("mla", "MLATokenToKVPool", "_create_buffers")

CONFIGURE_KV_CACHE = Patch(
    name="sglang-configure-kv-cache",
    target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator.configure",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, *, pre_model_load_memory",),
    reason="Engines that stand in for one another have one plan of the KV memory: it is asked for before this, and provided or compared after it.",
    upstream="There is no call to plugins around the KV cache.",
)

ADD_REQUEST = Patch(
    name="sglang-add-request",
    target="sglang.srt.managers.scheduler:Scheduler._add_request_to_queue",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, req, is_retracted=",),
    reason="A scheduler whose memory is scratch, or is not mapped, refuses a request before it becomes a part of a batch.",
    upstream="A scheduler that is asleep computes what it is asked all the same.",
)

RUN_BATCH = Patch(
    name="sglang-run-batch",
    target="sglang.srt.managers.scheduler:Scheduler.run_batch",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, batch, pp_proxy_tensors=",),
    reason="Whatever came to a batch by another way than a new request must not be computed on scratch or on no memory either.",
    upstream="A scheduler that is asleep computes what it is asked all the same.",
)

HANDLE_RPC = Patch(
    name="sglang-handle-rpc",
    target="sglang.srt.managers.scheduler:Scheduler.handle_rpc_request",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self, recv_req",),
    reason="The calls of a promotion reach all schedulers here, and are answered by each.",
    upstream="A remote call names a method of the scheduler, there is no seam to add one, and the answer has no value.",
)


def _occupation(action: str) -> tuple[Patch, Patch]:
    """What the scheduler does, and what the process that was asked makes of its answer."""
    scheduler = Patch(
        name=f"sglang-{action}-memory-occupation",
        target=f"sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.{action}_memory_occupation",
        kind=Kind.WRAP,
        distributions=DISTRIBUTIONS,
        versions=TESTED,
        signatures=("self, recv_req",),
        reason="Memory is given up and taken back by GMS; what cannot be done is refused, where an assertion would end the engine.",
        upstream="weight_updater.py asserts that the engine is idle, and takes tags out of a set in which they may not be.",
    )
    tokenizer = Patch(
        name=f"sglang-{action}-memory-occupation-answer",
        target=f"sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.{action}_memory_occupation",
        kind=Kind.WRAP,
        distributions=DISTRIBUTIONS,
        versions=TESTED,
        signatures=("self, obj, request=",),
        reason="A refusal of the scheduler becomes an error of the request.",
        upstream="The answer of a scheduler has no field for one, and is thrown away (tokenizer_control_mixin.py).",
    )
    return scheduler, tokenizer


RELEASE_OCCUPATION, RELEASE_ANSWER = _occupation("release")
RESUME_OCCUPATION, RESUME_ANSWER = _occupation("resume")

GET_MODEL_LOADER_BEFORE = Patch(
    name=f"sglang-get-model-loader-before-{_CLASS_FIRST}",
    target="sglang.srt.model_loader.loader:get_model_loader",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=f">=0.5.16,<{_CLASS_FIRST}",
    signatures=("load_config, model_config=",),
    reason="Some quantised models get a loader of their own before a load format that is a class is looked at, and would not be shared.",
    upstream="Later versions look at the class first.",
    unnecessary_from=_CLASS_FIRST,
)

INITIALIZE_MODEL = Patch(
    name="sglang-initialize-model",
    target="sglang.srt.model_loader.loader:_initialize_model",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("model_config, load_config, quant_config=",),
    reason="What loading changes in a model besides its tensors is told apart by looking at the model once it is built.",
    upstream="A loader builds, fills and post-processes a model in one call.",
)

RUN_EVENT_LOOP = Patch(
    name="sglang-run-event-loop",
    target="sglang.srt.managers.scheduler:Scheduler.run_event_loop",
    kind=Kind.WRAP,
    distributions=DISTRIBUTIONS,
    versions=TESTED,
    signatures=("self",),
    reason="Weights are published once the engine has sized its KV cache: a reader that attached before would be in the measurement.",
    upstream="There is no call to plugins when a scheduler is ready.",
)


def _updating(method: str, necessary_from: str = "") -> Patch:
    return Patch(
        name=f"sglang-{method.replace('_', '-')}",
        target=f"sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.{method}",
        kind=Kind.WRAP,
        distributions=DISTRIBUTIONS,
        versions=TESTED,
        signatures=("self, recv_req",),
        reason="Shared weights are read-only: the request is answered with a refusal, where writing would end the engine.",
        upstream="A loader cannot say that its weights must not be written to.",
        necessary_from=necessary_from,
    )


UPDATE_PATCHES = (
    _updating("update_weights_from_disk"),
    _updating("update_weights_from_distributed"),
    _updating("update_weights_from_tensor"),
    _updating("update_weights_from_ipc"),
    _updating("begin_weight_update", _SESSIONS),
    _updating("end_weight_update", _SESSIONS),
    _updating("check_weights"),
)
"""Every request that writes to weights; ``check_weights`` does for one of its actions."""

RESOLVE_PATCHES = (RESOLVE_ARGUMENTS, RESOLVE_ARGUMENTS_BEFORE)
STATIC_STATE_PATCHES = (EXPORT_STATIC_STATE, IMPORT_STATIC_STATE)
OCCUPATION_PATCHES = (RELEASE_OCCUPATION, RESUME_OCCUPATION, RELEASE_ANSWER, RESUME_ANSWER)

PATCHES = (
    VERIFY_LOAD_FORMAT,
    *RESOLVE_PATCHES,
    CREATE_MEMORY_SAVER,
    RUN_HTTP_SERVER,
    LAUNCH_SERVER,
    LAUNCH_DETOKENIZERS,
    WAIT_AND_WARM_UP,
    PROFILE_AVAILABLE_BYTES,
    ALLOC_MEMORY_POOL_BEFORE,
    *STATIC_STATE_PATCHES,
    CREATE_MHA_BUFFERS,
    CREATE_MLA_BUFFERS,
    CONFIGURE_KV_CACHE,
    ADD_REQUEST,
    RUN_BATCH,
    HANDLE_RPC,
    *OCCUPATION_PATCHES,
    GET_MODEL_LOADER_BEFORE,
    INITIALIZE_MODEL,
    RUN_EVENT_LOOP,
    *UPDATE_PATCHES,
)
