"""What a rank loads, where its weights are (which device, which server, which pool), and who loads with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from gms_core.client import Session
from gms_core.client import connect as open_session
from gms_core.config import settings
from gms_core.devices import HOST, DeviceId, cuda_uuid
from gms_core.engine_config import GmsConfig
from gms_core.runtime_dir import socket_path
from gms_patches.apply import installed_version
from gms_patches.for_vllm import DISTRIBUTIONS


def device_id() -> DeviceId:
    """The device of this worker: ``host``, or the UUID of the GPU that is current."""
    return HOST if current_platform.is_cpu() else cuda_uuid(torch.cuda.current_device())


def connect(options: GmsConfig, *, rank: int | None = None) -> Session:
    """Open a session with the server of this worker's device.

    Raises:
        GmsError: See `gms_core.client.connect`.
    """
    name = f"vllm {installed_version(DISTRIBUTIONS)}"
    return open_session(
        device_id(),
        socket_path=options.socket_path,
        client=name if rank is None else f"{name} rank {rank}",
        timeout_s=options.connect_timeout_s,
    )


def server_socket(options: GmsConfig) -> Path:
    """Where the server of this worker's device listens."""
    return options.socket_path or socket_path(device_id(), settings().runtime_dir)


def pool_name(config: Any, options: GmsConfig) -> str:
    """The pool of this rank's weights."""
    return rank_pool(config, options.tag)


def rank_pool(config: Any, tag: str) -> str:
    """The pool of this rank. A GPU has one rank of an engine, so the tag names it; on ``host`` all ranks share the device."""
    parallel = config.parallel_config
    rank = parallel.data_parallel_rank * parallel.world_size + parallel.rank
    return f"{tag}.{rank}" if current_platform.is_cpu() and rank else tag


class AllRanks:
    """A group of vLLM's as `gms_core.ranks.Ranks`.

    Args:
        group: A ``GroupCoordinator``.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    @property
    def rank_in_group(self) -> int:
        """Which of its ranks this process is."""
        return int(self._group.rank_in_group)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one."""
        return self._group.broadcast_object(obj, src=src)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all; vLLM has no such call."""
        found: list[Any] = [None] * self._group.world_size
        torch.distributed.all_gather_object(found, obj, group=self._group.cpu_group)
        return found


def all_ranks() -> AllRanks | None:
    """All ranks that compute together, if there are several."""
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    return AllRanks(world) if world.world_size > 1 else None


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What vLLM asks a loader for.

    Attributes:
        config: A ``VllmConfig``.
        model_config: Of the model that is loaded.
        prefix: Of the layers' names.
    """

    config: Any
    model_config: Any
    prefix: str

    @property
    def device(self) -> torch.device:
        """Where the weights go."""
        return torch.device("cpu") if current_platform.is_cpu() else torch.device("cuda", torch.cuda.current_device())
