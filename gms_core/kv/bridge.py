"""How large the part of the KV memory is that a promoted engine may begin with. Pure."""

from __future__ import annotations

USUAL_BYTES = 2**30
"""Of a bridge that nobody has said anything about: room for some requests with thousands of tokens, whose blocks take a few MiB each."""
USUAL_SHARE = 16
"""Of the KV memory, of which such a bridge takes one part at most."""
MOST_TIMES = 1.5
"""A bridge may be so many times as large as was wanted, for the granules in which its blocks lie; else there is none."""
ROOM_TIMES = 3
"""So many times a bridge has to be free beside the KV cache, where nothing was measured: engines take memory after that, as for CUDA graphs."""


def wanted_bytes(bridge_bytes: int | None, size: int) -> int:
    """How large a bridge is to be.

    Args:
        bridge_bytes: What the user says; None for the usual size.
        size: Bytes of the KV memory.
    """
    return min(USUAL_BYTES, size // USUAL_SHARE) if bridge_bytes is None else bridge_bytes


def most_bytes(bridge_bytes: int | None, size: int) -> int:
    """How large a bridge may become: what an engine that measures leaves to the server, which has so much memory made beside the pool's.

    Args:
        bridge_bytes: As of `wanted_bytes`.
        size: Bytes of the KV memory.
    """
    return int(MOST_TIMES * wanted_bytes(bridge_bytes, size))


def blocks_of(bridge_bytes: int, size: int, num_blocks: int) -> int:
    """How many blocks a bridge of about so many bytes has; 0 if that is not worth while.

    Args:
        bridge_bytes: What is wanted.
        size: Bytes of the KV memory.
        num_blocks: That it has.
    """
    blocks = bridge_bytes * num_blocks // size if size else 0
    return blocks if 2 <= blocks <= num_blocks // 2 else 0
