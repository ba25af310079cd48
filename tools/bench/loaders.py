"""What loads: restores of a snapshot with GMS, and other projects' loaders, each used as its own documentation says.

A peer is imported, and torch with it, only in the process that measures it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gms_core.errors import BackendUnavailable, InvalidArgument

PAGE_CACHE, TMPFS, DISK = "page cache", "tmpfs", "disk"
SOURCES = (PAGE_CACHE, TMPFS, DISK)
"""Where the bytes are: in the page cache of a disk's files, in files that lie in memory, or on the disk and nowhere else."""

INSTALL = "make peers installs it"
GPU_DIRECT = Path("/proc/driver/nvidia-fs/version")
"""Is there where the kernel can read files straight into a GPU's memory. Without it, the library that asks for that may never return."""


class Tensors(NamedTuple):
    """What a peer has loaded.

    Attributes:
        by_name: The tensors.
        notes: What a user should know of how it went.
    """

    by_name: dict[str, Any]
    notes: tuple[str, ...] = ()


class Peer(NamedTuple):
    """Another project's loader.

    Attributes:
        distribution: What is to be installed.
        module: What is imported.
        load: Loads files into a device, and comes back when that has been begun for all tensors.
        condition: Says why it cannot run on a device, without importing it; empty if it can.
    """

    distribution: str
    module: str
    load: Callable[[Sequence[str], str], Tensors]
    condition: Callable[[str], str] = lambda _: ""


def _load_file(files: Sequence[str], device: str) -> Tensors:
    from safetensors.torch import load_file

    loaded: dict[str, Any] = {}
    for file in files:
        loaded.update(load_file(file, device=device))
    if device != "cpu" or not _is_mapped_from_a_file(next(iter(loaded.values())).data_ptr()):
        return Tensors(loaded)
    # What the library gives are the files, mapped: nothing is read before somebody touches it.
    return Tensors({name: tensor.clone() for name, tensor in loaded.items()}, ("the files are mapped, so each tensor was copied",))


def _safe_open(files: Sequence[str], device: str) -> Tensors:
    import torch
    from safetensors import safe_open

    loaded: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_tensor(name)
                loaded[name] = torch.empty_like(tensor, device=device).copy_(tensor)
    return Tensors(loaded)


def _fastsafetensors(files: Sequence[str], device: str) -> Tensors:
    return _fast(files, device, direct=False)


def _fastsafetensors_direct(files: Sequence[str], device: str) -> Tensors:
    return _fast(files, device, direct=True)


def _fast(files: Sequence[str], device: str, *, direct: bool) -> Tensors:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=list(files), device=device, nogds=not direct) as opened:
        return Tensors({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - it is no mapping


def _lacks_gpu_direct(device: str) -> str:
    if device == "cpu":
        return "it reads files straight into a GPU's memory, and this is host memory"
    return "" if GPU_DIRECT.exists() else f"the kernel has no nvidia-fs driver: {GPU_DIRECT} is not there"


def _lacks_gpu(device: str) -> str:
    return "it loads into GPUs alone, and this is host memory" if device == "cpu" else ""


def _model_streamer(files: Sequence[str], device: str) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files), device=device)
        return Tensors(dict(streamer.get_tensors()))


def _instanttensor(files: Sequence[str], device: str) -> Tensors:
    from instanttensor import safe_open

    with safe_open(list(files), framework="pt", device=device) as opened:
        return Tensors(dict(opened.tensors()))


PEERS: Mapping[str, Peer] = {
    "safetensors load_file": Peer("safetensors", "safetensors", _load_file),
    "safetensors safe_open": Peer("safetensors", "safetensors", _safe_open),
    "fastsafetensors": Peer("fastsafetensors", "fastsafetensors", _fastsafetensors),
    "fastsafetensors GDS": Peer("fastsafetensors", "fastsafetensors", _fastsafetensors_direct, _lacks_gpu_direct),
    "Run:ai Model Streamer": Peer("runai-model-streamer", "runai_model_streamer", _model_streamer),
    "InstantTensor": Peer("instanttensor", "instanttensor", _instanttensor, _lacks_gpu),
}

GMS: Mapping[str, str] = {f"gms {backend}": backend for backend in ("staged", "aio", "uring", "local-ssd-pinned")}
"""Restores with GMS, and the backend of each."""


def names() -> tuple[str, ...]:
    """Of all loaders: those of GMS first."""
    return (*GMS, *PEERS)


def chosen(wanted: Sequence[str]) -> tuple[str, ...]:
    """Loaders, in the order of `names`.

    Args:
        wanted: Their names; none: all of them.

    Raises:
        InvalidArgument: There is none of that name.
    """
    if unknown := sorted(set(wanted) - set(names())):
        raise InvalidArgument(f"there is no loader {unknown[0]!r}", hint=f"There are {', '.join(names())}.")
    return tuple(name for name in names() if not wanted or name in wanted)


def prepare(peer: Peer, device: str) -> str:
    """Import a peer. Returns the version of its distribution.

    Args:
        peer: It is not imported if it cannot run.
        device: As torch names it.

    Raises:
        BackendUnavailable: It is not installed, cannot be imported or cannot run on the device; the message is the reason.
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailable("torch is not installed, which it needs")
    if importlib.util.find_spec(peer.module) is None:
        raise BackendUnavailable(f"{peer.distribution} is not installed: {INSTALL}")
    if reason := peer.condition(device):
        raise BackendUnavailable(reason)
    try:
        importlib.import_module("torch")  # libraries of others are linked to those that it brings along
        importlib.import_module(peer.module)
    except (ImportError, OSError) as error:  # a missing module, or a missing shared library
        raise BackendUnavailable(f"{peer.distribution} cannot be imported: {error}") from error
    return importlib.metadata.version(peer.distribution)


def _is_mapped_from_a_file(address: int) -> bool:
    """Whether an address of this process lies in a file that is mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        begin, _, end = span.partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return inode != "0"
    return False
