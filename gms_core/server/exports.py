"""Sends descriptors of allocations, as many in one message as the kernel takes."""

from __future__ import annotations

from collections.abc import Sequence

from gms_core.protocol.framing import batches
from gms_core.protocol.messages import Descriptors
from gms_core.server.memory import Memory
from gms_core.server.sessions import Session


async def send_descriptors(memory: Memory, session: Session, allocations: Sequence[tuple[int, int]]) -> None:
    """Answer a request with the descriptors of allocations (id, bytes), in their order."""
    pieces = batches(allocations)
    for number, piece in enumerate(pieces, start=1):
        ids, sizes = tuple(identifier for identifier, _ in piece), tuple(size for _, size in piece)
        await session.send(Descriptors(ids, sizes, more=number < len(pieces)), tuple(memory.descriptors(ids)))
