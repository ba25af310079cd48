"""The beginning of an engine that fails over, in the process that makes its configuration: before anything of it has been started."""

from __future__ import annotations

import os
from typing import Any

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig
from gms_core.errors import EngineUnsupported
from gms_core.failover.cohort import GRACE_S, ApiPlace, begin_cohort
from gms_core.failover.nodes.part import begin_part
from gms_patches.on_import import when_imported
from gms_vllm.engine_core import extend_engine_core
from gms_vllm.gate import is_set_up
from gms_vllm.serving import can_hold
from gms_vllm.unsupported import check_failover

_API_SERVER = "OPENAI_API_SERVER"
_IN_PROCESS = (None, "UNKNOWN_CONTEXT", "LLM_CLASS", "ENGINE_CONTEXT")
"""Who uses an engine in its own process has no server that could be held: its worker refuses to compute before it is promoted, and that is all."""


def api_place(config: Any) -> ApiPlace:
    """What ``EngineArgs`` or a ``ParallelConfig`` says of the process that made it; its rank is -1 if it only starts API servers."""
    return ApiPlace(config._api_process_rank, config._api_process_count)  # noqa: SLF001 - there is no public name in any version


def begin_failover(arguments: Any, config: Any, failover: FailoverConfig, usage_context: Any, *, headless: bool) -> None:
    """Check that this engine can fail over, and give its processes their cohort.

    Args:
        arguments: ``EngineArgs``.
        config: The ``VllmConfig`` that was made of them.
        failover: How it fails over.
        usage_context: For what vLLM starts it.
        headless: Whether there is no API server on this node.

    Raises:
        EngineUnsupported: It cannot; the message says why.
        GmsError: Its lock cannot be had.
    """
    check_failover(config, failover, api_servers=api_place(arguments).servers, headless=headless)
    if headless:
        _begin_here(config, failover)
        return
    context = getattr(usage_context, "value", usage_context)
    api_server = api_place(arguments)
    further = api_server.main_pid != os.getpid() and bool(settings().cohort)
    serves = context not in _IN_PROCESS
    if serves and not (context == _API_SERVER and can_hold() and (further or is_set_up())):
        raise EngineUnsupported(
            "failover: this front end cannot be held until its engine is promoted",
            hint="Start it with `vllm serve`, without --grpc; `gms patches check` shows whether this vLLM is known.",
        )
    if not further:
        _begin_here(config, failover)
        when_imported("vllm.v1.engine.core", extend_engine_core)  # for an engine core that is forked, and never registers plugins
    if serves and api_server.rank < 0:
        from gms_core.failover.front_end.main_process import take_part

        take_part(GRACE_S + config.shutdown_timeout)
    elif serves and api_server.rank == 0:
        from gms_core.failover.front_end.api_server import open_early

        open_early(failover)


def _begin_here(config: Any, failover: FailoverConfig) -> None:
    """Name the cohort of what is started from here: the engine, or its part on this node."""
    begin_cohort("vllm")
    parallel = config.parallel_config
    if failover.nodes is not None and parallel.nnodes > 1:
        part = begin_part(failover.nodes, node=parallel.node_rank, nodes=parallel.nnodes, host=parallel.master_addr)
        if parallel.node_rank > 0:
            part.until_gathered()  # before it takes any memory: the first node may start other engines before this one
