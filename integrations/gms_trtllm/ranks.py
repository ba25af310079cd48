"""The ranks of an engine, by what TensorRT-LLM knows of MPI (``tensorrt_llm._utils``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_core.ranks import Ranks


def _call(name: str) -> Callable[..., Any]:
    import tensorrt_llm._utils as tools

    found = getattr(tools, name, None)
    if not callable(found):
        raise EngineUnsupported(
            f"this TensorRT-LLM has no tensorrt_llm._utils.{name}, by which ranks are told apart", hint="Use a version that this adapter knows."
        )
    return found  # type: ignore[no-any-return]


def rank() -> int:
    """Which of the engine's ranks this process is, from 0."""
    return int(_call("mpi_rank")())


def world_size() -> int:
    """How many there are."""
    return int(_call("mpi_world_size")())


class MpiRanks:
    """All ranks of this engine; see `gms_core.ranks.Ranks`."""

    @property
    def rank_in_group(self) -> int:
        """Which of them this process is, from 0."""
        return rank()

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one."""
        return _call("mpi_broadcast")(obj, root=src)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all, in their order."""
        return list(_call("mpi_allgather")(obj))


def all_ranks() -> Ranks | None:
    """The ranks, if there are several; else None."""
    return MpiRanks() if world_size() > 1 else None
