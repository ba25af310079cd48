"""What a rank loads, and where its weights are: which device, which server, which pool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gms_core.client import Session
from gms_core.client import connect as open_session
from gms_core.config import settings
from gms_core.devices import HOST, DeviceId, cuda_uuid
from gms_core.engine_config import GmsConfig
from gms_core.runtime_dir import socket_path
from gms_patches.apply import installed_version
from gms_patches.for_sglang import DISTRIBUTIONS
from gms_sglang.arguments import argument

DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What SGLang asks a loader for.

    Attributes:
        model_config: Of the model that is loaded.
        device_config: Where to.
        inner: Configuration of SGLang's own loader.
    """

    model_config: Any
    device_config: Any
    inner: Any

    @property
    def device(self) -> torch.device:
        """Where the weights go."""
        return torch_device()


def is_cpu() -> bool:
    """Whether this engine computes on CPUs."""
    return str(argument("device")) == "cpu"


def device_id() -> DeviceId:
    """The device of this rank: ``host``, or the UUID of the GPU that is current."""
    return HOST if is_cpu() else cuda_uuid(torch.cuda.current_device())


def torch_device() -> torch.device:
    """The same for PyTorch."""
    return torch.device("cpu") if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def server_socket(options: GmsConfig) -> Path:
    """Where the server of this rank's device listens."""
    return options.socket_path or socket_path(device_id(), settings().runtime_dir)


def connect(options: GmsConfig) -> Session:
    """Open a session with the server of this rank's device.

    Raises:
        GmsError: See `gms_core.client.connect`.
    """
    name = f"sglang {installed_version(DISTRIBUTIONS)} rank {world().rank_in_group}"
    return open_session(device_id(), socket_path=options.socket_path, client=name, timeout_s=options.connect_timeout_s)


def pool_name(options: GmsConfig, model_config: Any, load_config: Any) -> str:
    """The pool of this rank's weights."""
    tag, number = options.tag, load_config.draft_model_idx
    if model_config.is_draft_model:
        tag = f"{tag}.{DRAFT}{number}" if number else f"{tag}.{DRAFT}"
    return rank_pool(tag)


def rank_pool(tag: str) -> str:
    """The pool of this rank. A GPU has one rank of an engine, so the tag names it; on ``host`` all ranks share the device."""
    rank = world().rank_in_group
    return f"{tag}.{rank}" if is_cpu() and rank else tag


def world() -> Any:
    """The group of all ranks of this engine that compute together."""
    from sglang.srt.distributed.parallel_state import get_world_group

    return get_world_group()


def all_ranks() -> Any:
    """The same, if there are several; else None."""
    group = world()
    return group if group.world_size > 1 else None
