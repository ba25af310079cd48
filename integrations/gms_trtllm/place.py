"""Where the weights of a rank are: which device, which server, which pool."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from gms_core.config import settings
from gms_core.devices import HOST, DeviceId, cuda_uuid
from gms_core.errors import ConfigurationError
from gms_core.runtime_dir import socket_path
from gms_trtllm.ranks import rank

_FIELDS = ("device", "uuid", "rank", "tag")
_FIELD = re.compile(r"\{(\w*)\}")


def is_cpu() -> bool:
    """Whether there is no GPU. TensorRT-LLM needs one; its double in GMS's tests does not."""
    return not torch.cuda.is_available()


def current_index() -> int:
    """The number of this rank's device. Without a GPU each rank of a machine counts as having one of its own."""
    return rank() if is_cpu() else torch.cuda.current_device()


def torch_device(index: int) -> torch.device:
    """A device of this process for PyTorch."""
    return torch.device("cpu") if is_cpu() else torch.device("cuda", index)


def device_id(index: int) -> DeviceId:
    """The same for GMS: ``host``, or the GPU's UUID."""
    return HOST if is_cpu() else cuda_uuid(index)


def pool_name(tag: str, index: int) -> str:
    """The pool of this rank. A GPU has one rank of an engine, so the tag names it; on ``host`` all ranks share the device."""
    return f"{tag}.{index}" if is_cpu() and index else tag


def default_socket(device_index: int, tag: str) -> str:  # noqa: ARG001 - one server has all the pools of a device
    """Where the server of a device listens, whatever the tag."""
    return str(socket_path(device_id(device_index), settings().runtime_dir))


def named_socket(path: str, device_index: int, tag: str) -> Path:
    """The socket that a user has named, with the fields that tell ranks apart filled in.

    Args:
        path: May contain ``{device}`` (the number), ``{uuid}``, ``{rank}`` and ``{tag}``.
        device_index: Of the rank's device.
        tag: The user's.

    Raises:
        ConfigurationError: There is no such field, or the path is not absolute.
    """
    unknown = [name for name in _FIELD.findall(path) if name not in _FIELDS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in _FIELDS)
        raise ConfigurationError(f"gms_config.socket_path: {{{unknown[0]}}} stands for nothing", hint=f"There are {known}.")
    values: dict[str, Callable[[], object]] = {
        "device": lambda: device_index,
        "uuid": lambda: device_id(device_index),
        "rank": rank,
        "tag": lambda: tag,
    }
    filled = Path(_FIELD.sub(lambda field: str(values[field[1]]()), path))
    if not filled.is_absolute():
        raise ConfigurationError(
            f"gms_config.socket_path: {path!r} is not an absolute path", hint="The processes of an engine differ in where they are."
        )
    return filled
