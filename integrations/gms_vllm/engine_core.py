"""vLLM's engine core as a process of an engine that fails over: it ends with the one that has started it, and answers the calls of the front end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gms_core.failover.cohort import settle, take_place
from gms_core.failover.parent_death import end_with_parent
from gms_vllm import block_supply

_answering: dict[int, int] = {}
"""Requests that each API server is answering, of those that have said so."""


def extend_engine_core() -> None:
    """Give vLLM's engine core the calls that the front end makes, which are reached by name as all of its own are, and let it end with its parent.

    It loads plugins only once it has shaken hands with the process that has started it. If that is killed before, vLLM waits for it for minutes.
    """
    global _run_engine_core
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    EngineCore.gms_join = _join
    EngineCore.gms_settle = _settle
    EngineCore.gms_unfinished = _unfinished
    EngineCore.gms_withhold = block_supply.withhold
    EngineCore.gms_give_all = block_supply.give_all
    if EngineCoreProc.run_engine_core is not run_engine_core:
        _run_engine_core = EngineCoreProc.run_engine_core
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


_run_engine_core: Callable[..., None] | None = None
"""VLLM's own, in a process in which it was replaced; a forked child is one too, a spawned one is not yet."""


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """Be an engine core's process, which ends with the one that has started it. Processes are started by the name of this function."""
    end_with_parent()
    from vllm.v1.engine.core import EngineCoreProc

    (_run_engine_core or EngineCoreProc.run_engine_core)(*args, **kwargs)


def _join(_: Any, sockets: list[str], connect_timeout_s: float) -> None:
    """Join the engine core's process to the cohort."""
    end_with_parent()
    take_place("engine-core", map(Path, sockets), serves=False, connect_timeout_s=connect_timeout_s)


def _settle(_: Any) -> None:
    settle("engine core")


def _unfinished(engine_core: Any, rank: int, servers: int, answering: int) -> int:
    """Requests that the engine, or one of its API servers, has not finished. Each API server says what it is about, until all of them are done."""
    _answering[rank] = answering
    return int(engine_core.scheduler.get_num_unfinished_requests()) + sum(_answering.get(server, 1) for server in range(servers))
