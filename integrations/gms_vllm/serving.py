"""What is changed of vLLM's front end: how it binds, comes to serve, and waits for answers. Light: it is imported in every process of vLLM."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_patches.apply import apply, in_force
from gms_patches.for_vllm import CALL_UTILITY, SERVE_HTTP_PATCHES, SETUP_SERVER_PATCHES
from gms_patches.patch import Patch
from gms_vllm.unanswered import wrap_call_utility

log = logging.getLogger("vllm.gms")

_PATCHES = (*SETUP_SERVER_PATCHES, *SERVE_HTTP_PATCHES, CALL_UTILITY)

PATCHED = tuple(dict.fromkeys(patch.target.partition(":")[0] for patch in _PATCHES))
"""Modules of vLLM in which something is wrapped, over all versions."""


def patch_front_end(module: str) -> None:
    """Wrap what has to be wrapped of a module. Where that cannot be done nothing changes, and an engine that is to fail over refuses to start."""
    for patch in _PATCHES:
        if patch.target.partition(":")[0] == module:
            try:
                apply(patch, _builder(patch))
            except EngineUnsupported as error:
                log.debug("failover is not available: %s", error)
            except Exception:  # a damaged GMS must not stop engines that do not use it
                log.exception("failover is not available")


def _builder(patch: Patch) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if patch is CALL_UTILITY:
        return wrap_call_utility
    return _wrap_setup_server if patch in SETUP_SERVER_PATCHES else _wrap_serve_http


def can_hold() -> bool:
    """Whether what serves in this process is wrapped."""
    return not {patch.name for patch in SERVE_HTTP_PATCHES}.isdisjoint(in_force())


def _wrap_setup_server(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup_server(args: Any, *, reuse_port: bool) -> Any:
        if str(args.load_format).lower() != "gms":
            return original(args, reuse_port=reuse_port)
        from gms_core.failover.config import failover_config
        from gms_vllm.config import loader_options
        from gms_vllm.gate import set_up

        failover = failover_config(loader_options(args.model_loader_extra_config or {}).gms)
        return original(args, reuse_port=reuse_port) if failover is None else set_up(original, args, failover, reuse_port=reuse_port)

    return setup_server


def _wrap_serve_http(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def serve_http(app: Any, sock: Any, *args: Any, **kwargs: Any) -> Any:
        client = getattr(app.state, "engine_client", None)
        load = client.vllm_config.load_config if client is not None else None
        if load is None or load.load_format != "gms":
            return await original(app, sock, *args, **kwargs)
        from gms_core.failover.config import failover_config
        from gms_vllm.config import loader_options
        from gms_vllm.front_end import serve

        gms = loader_options(load.model_loader_extra_config or {}).gms
        failover = failover_config(gms)
        if failover is None:
            return await original(app, sock, *args, **kwargs)
        return await serve(app, client, sock, gms, failover, lambda: original(app, sock, *args, **kwargs))

    return serve_http
