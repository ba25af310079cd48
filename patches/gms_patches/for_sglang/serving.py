"""What failover relies on in SGLang: calls from the main process to all ranks, the moment before the port is bound, and the ways in which it dies."""

from __future__ import annotations

from gms_patches.patch import Symbol, group

_CALLS = "calls from the main process to all ranks"
_END = "an orderly end"
_WORKERS = "several tokenizer workers"
_DEATH = "the death of an engine"
_CRASH = "a crash that is noticed at once"
_LEFT = "nothing that is left behind"
_REFUSED = "refusals"
_REST = "schedulers that rest while their engine stands by"
_BALANCE = "ranks beside neighbours of different size"

SERVING: tuple[Symbol, ...] = (
    *group(
        _CALLS,
        "sglang.srt.managers.io_struct",
        {
            "RpcReqInput": (),
            "RpcReqInput.method": (),
            "RpcReqInput.parameters": (),
            "RpcReqOutput": (),
            "RpcReqOutput.success": (),
            "RpcReqOutput.message": (),
            "async_sock_send": ("socket, obj, flags=",),
            "async_sock_recv": ("socket, flags=",),
        },
    ),
    Symbol("sglang.srt.utils.network:get_zmq_socket", _CALLS, ("context, socket_type, endpoint=, bind=",)),
    Symbol("sglang.srt.server_args:PortArgs.rpc_ipc_name", _CALLS),
    Symbol("sglang.srt.managers.scheduler:Scheduler.handle_rpc_request", _CALLS, ("self, recv_req",)),
    Symbol("sglang.srt.managers.scheduler:Scheduler.idle_sleeper", _REST),
    Symbol("sglang.srt.managers.scheduler:Scheduler.maybe_sleep_on_idle", _REST, ("self",)),
    Symbol("sglang.srt.managers.scheduler:Scheduler.ipc_channels", _REST),
    *group(
        _REST,
        "sglang.srt.managers.scheduler_components.ipc_channels",
        {"SchedulerIpcChannels.recv_from_tokenizer": (), "SchedulerIpcChannels.recv_from_rpc": ()},
    ),
    Symbol("sglang.srt.entrypoints.http_server:app", "a server that is held until its engine is the primary"),
    *group(
        _END,
        "sglang.srt.managers.tokenizer_manager",
        {
            "TokenizerManager.auto_create_handle_loop": ("self",),
            "TokenizerManager.sigterm_watchdog": ("self",),
            "TokenizerManager.gracefully_exit": (),
            "TokenizerManager.signal_handler_class": (),
            "SignalHandler.sigterm_handler": ("self, signum=, frame=",),
        },
    ),
    # Workers make a tokenizer manager each when their app starts, and are asked to end alone; the engine ends after them.
    *group(_WORKERS, "sglang.srt.entrypoints.http_server", {"get_global_state": ("",), "_GlobalState.tokenizer_manager": ()}),
    Symbol("sglang.srt.managers.tokenizer_manager:TokenizerManager.rid_to_state", _WORKERS),
    Symbol("sglang.srt.server_args:PortArgs.tokenizer_worker_ipc_name", _WORKERS),
    *group(_WORKERS, "sglang.srt.managers.io_struct", {"ShutdownReq": (), "sock_send": ("socket, obj, flags=",)}),
    Symbol("sglang.srt.utils.cudacore_pyspy_dump_utils:collect_scheduler_processes", _WORKERS, ("",)),
    Symbol("sglang.srt.utils.watchdog:SubprocessWatchdog.stop", _WORKERS, ("self",)),
    Symbol("sglang.srt.managers.tokenizer_manager:TokenizerManager._server_stop_hook", _END, (), ">=0.5.20"),
    Symbol("sglang.srt.utils.common:kill_itself_when_parent_died", _DEATH, ("",)),
    Symbol("sglang.srt.managers.tokenizer_manager:SignalHandler.running_phase_sigquit_handler", _DEATH, ("self, signum=, frame=",)),
    *group(
        _CRASH,
        "sglang.srt.environ",
        {"Envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH": (), "Envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH": ()},
    ),
    *group(
        _LEFT,
        "sglang.srt.managers.load_snapshot",
        {"shm_path_for": ("ipc_name",), "ShmLoadSnapshotReader.read_all": ("self",), "ZmqShmLoadSnapshotReader.read_all": ("self",)},
    ),
    Symbol("sglang.srt.server_args:PortArgs.instance_id", _LEFT),
    Symbol("sglang.srt.managers.tokenizer_manager:TokenizerManager.load_snapshot_reader", _LEFT),
    Symbol("sglang.srt.environ:Envs.SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", _BALANCE),
    Symbol("sglang.srt.environ:envs", _REFUSED),
    *group(
        _REFUSED,
        "sglang.srt.environ",
        {"Envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": (), "Envs.SGLANG_MOONCAKE_CUSTOM_MEM_POOL": ()},
    ),
    # Another app than the one that workers serve under the rules of failover.
    Symbol("sglang.srt.environ:Envs.SGLANG_HTTP_SERVER_APP_PATH", _REFUSED, (), ">=0.5.23"),
    # A front end in another language, which never comes to the function that the gate hooks.
    Symbol("sglang.srt.environ:Envs.SGLANG_RUST_SERVER", _REFUSED, (), ">=0.5.17"),
)
