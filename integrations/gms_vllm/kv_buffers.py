"""The raw buffers of bytes that a model runner makes its KV cache of: which ones are due, and that each is placed once. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gms_core.errors import EngineUnsupported

_HINT = "Start without --enable-sleep-mode, and without failover in the block gms (and in GMS_FAILOVER)."


def raw_buffers(config: Any) -> tuple[int, ...]:
    """Bytes of each raw buffer, in the order in which all model runners make them.

    Before 0.30 each tensor of the configuration is a buffer, but for packed ones, which all lie in one (vllm/v1/worker/gpu_model_runner.py,
    _allocate_kv_cache_tensors; vllm/v1/worker/gpu/attn_utils.py, _allocate_kv_cache). From 0.30 on there is one buffer, whose size each tensor names
    (vllm/v1/worker/utils.py, allocate_kv_cache).

    Args:
        config: A ``KVCacheConfig``.
    """
    tensors = config.kv_cache_tensors
    if tensors and not hasattr(tensors[0], "shared_by"):
        return (tensors[0].size,)
    packed = next((tensor for tensor in tensors if tensor.block_stride > 0), None)
    return tuple(tensor.size for tensor in tensors if tensor.block_stride == 0 or tensor is packed)


def check_contents(config: Any) -> None:
    """Refuse a cache that has more in it than what requests put there: that is written once, and would be lost with the scratch memory.

    Attention with static sinks writes these into the first blocks when it is first used
    (vllm/model_executor/layers/attention/static_sink_attention.py).

    Args:
        config: A ``KVCacheConfig``.

    Raises:
        EngineUnsupported: It is such a cache.
    """
    for group in config.kv_cache_groups:
        specs = [group.kv_cache_spec, *getattr(group.kv_cache_spec, "kv_cache_specs", {}).values()]
        if any(type(spec).__name__ == "SinkFullAttentionSpec" for spec in specs):
            raise EngineUnsupported("failover: the static sinks of this model lie in its KV cache, and would be lost", hint=_HINT)


class RawBuffers:
    """The buffers that are still to be made.

    Args:
        sizes: Bytes of each.
        place: Gives the address for a buffer of so many bytes.
    """

    def __init__(self, sizes: Sequence[int], place: Callable[[int], int]) -> None:
        self._due = list(sizes)
        self._place = place

    def place(self, size: int) -> int | None:
        """The address for a raw tensor, or None if it is none of the buffers."""
        if size not in self._due:
            return None
        self._due.remove(size)
        return self._place(size)

    def check_complete(self) -> None:
        """Make sure that every buffer was made.

        Raises:
            EngineUnsupported: One was not: the KV cache, or a part of it, lies elsewhere.
        """
        if self._due:
            raise EngineUnsupported(
                f"this engine makes its KV cache in a way that GMS does not know: {len(self._due)} of its buffers have no place, the first of "
                f"{self._due[0]} bytes",
                hint=_HINT,
            )
