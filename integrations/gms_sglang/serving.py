"""What is changed of SGLang's main process where an engine fails over: what it starts, when it warms up, and how it comes to serve."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from gms_patches.for_sglang import LAUNCH_DETOKENIZERS, LAUNCH_SERVER, RUN_HTTP_SERVER, WAIT_AND_WARM_UP
from gms_sglang.detokenizer import run_detokenizer
from gms_sglang.failover import Begun, begun, forget_begun
from gms_sglang.hooks import Hook
from gms_sglang.load_file import expect_load_file, unname_load_file
from gms_sglang.load_format import asks_for_gms


def _begin_server(server_args: Any, *_: Any, **__: Any) -> None:
    """SGLang is about to start an engine, and then the server of this process. One that a program starts has no server, and nobody elects it."""
    if not asks_for_gms(server_args.load_format):
        forget_begun()
    if (engine := begun()) is not None:
        engine.take_address()


def _launch_detokenizers(original: Callable[..., Any], cls: Any, server_args: Any, port_args: Any, run_detokenizer_process_func: Any) -> Any:
    if begun() is None:
        return original(cls, server_args, port_args, run_detokenizer_process_func)
    expect_load_file(port_args)  # the schedulers have been started just now, and are still importing
    return original(cls, server_args, port_args, functools.partial(run_detokenizer, run_detokenizer_process_func))


def _warm_up(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    engine = begun()
    if engine is None:
        original(*args, **kwargs)
    else:
        engine.warm_up.run(original, *args, **kwargs)


def _run_http_server(
    original: Callable[..., Any],
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: Any,
    subprocess_watchdog: Any,
    **kwargs: Any,
) -> Any:
    engine = begun()
    with contextlib.nullcontext() if engine is None else _held(engine, tokenizer_manager, port_args, subprocess_watchdog):
        return original(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, subprocess_watchdog, **kwargs)


def _held(engine: Begun, manager: Any, port_args: Any, watchdog: Any) -> AbstractContextManager[None]:
    listener = engine.take_address()  # a program of the user's own can have entered `launch_server` before GMS had seen the options
    if int(engine.option("tokenizer_worker_num") or 1) > 1:
        from gms_sglang.tokenizer_workers import workers_held

        return workers_held(engine, listener, port_args, watchdog)
    from gms_sglang.http_server import held

    unname_load_file(port_args, manager)
    return held(engine, listener, manager, port_args)


HOOKS = (
    Hook(LAUNCH_SERVER, "before", _begin_server),
    Hook(LAUNCH_DETOKENIZERS, "around", _launch_detokenizers),
    Hook(WAIT_AND_WARM_UP, "around", _warm_up),
    Hook(RUN_HTTP_SERVER, "around", _run_http_server),
)
