"""The calls of the process that serves to the ranks of its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gms_core.failover.cohort import ApiPlace
from gms_core.failover.front_end.engine import RankMemory, Step, Stood
from gms_core.failover.front_end.named import PATIENCE_S, Order, tell
from gms_core.failover.threads import in_thread
from gms_trtllm.cohort import process_name

KV_CACHE = "kv_cache"
"""What TensorRT-LLM calls its KV memory where it can be taken away."""


class TrtllmCalls:
    """`EngineCalls` over what ranks obey, and over TensorRT-LLM's own sleep.

    Where the KV memory is the engine's own, and it has a ``sleep_config``, a shadow gives that memory back while it stands by, and takes it again at
    its promotion: it has to be there when the engine starts, and when it serves, and not in between.
    """

    def __init__(self, engine: Any) -> None:
        """Prepare.

        Args:
            engine: TensorRT-LLM's ``LLM``, which is ready.
        """
        self._engine = engine
        self._sleeps = getattr(engine.args, "sleep_config", None) is not None
        self._is_parked = False
        self._sockets: list[Path] = []

    async def place_ranks(self) -> Sequence[Path]:
        """As `EngineCalls.place_ranks`. Each rank has joined as it loaded; later, where a server was restarted, it is told to join again."""
        if not self._sockets:
            self._sockets = await in_thread(_sockets_of_ranks, name="gms-find-ranks")
        else:
            await self._tell(lambda number: Order((str(self._sockets[number]),)))
        return self._sockets

    async def join(self, sockets: Sequence[Path], connect_timeout_s: float) -> None:
        """As `EngineCalls.join`: there are no other processes."""

    async def settle(self) -> None:
        """As `EngineCalls.settle`."""
        await self._tell(lambda _: Order(settle=True))

    async def rehearse(self, wanted: bool) -> None:
        """As `EngineCalls.rehearse`: nothing that is computed before the promotion reaches anybody."""

    async def forget(self) -> bool:
        """As `EngineCalls.forget`: ranks forget what their own warm-up has left when they stand by."""
        return True

    async def stand_by(self) -> Sequence[Stood]:
        """As `EngineCalls.stand_by`."""
        found = await self._tell(lambda _: Order(call="stand_by"))
        stood = [Stood(blocks, refusal) for blocks, refusal, _ in found]
        if self._sleeps and not all(is_placed for *_, is_placed in found) and not any(one.refusal for one in stood):
            self._is_parked = True
            await in_thread(lambda: self._engine._collective_rpc("sleep", ([KV_CACHE],)), name="gms-park")  # noqa: SLF001 - of the adapter's table
        return stood

    async def withhold(self, blocks: int) -> bool:  # noqa: ARG002 - of the protocol
        """As `EngineCalls.withhold`: there is no bridge."""
        return False

    async def promote(self, timeout_s: float, bridge: bool) -> Sequence[RankMemory]:  # noqa: ARG002 - there is no bridge
        """As `EngineCalls.promote`. No other engine is on the ranks' devices any more when memory of the engine's own is taken again."""
        memory = await self._tell(lambda _: Order(call="promote", arguments=(timeout_s,)), timeout_s + PATIENCE_S)
        if self._is_parked:
            await in_thread(lambda: self._engine._collective_rpc("wakeup", ([KV_CACHE],)), name="gms-unpark")  # noqa: SLF001 - as above
            self._is_parked = False
        return [RankMemory(*one) for one in memory]

    async def give_all(self) -> tuple[Step, str]:
        """As `EngineCalls.give_all`: nothing was withheld."""
        return "whole", ""

    async def beat(self) -> Sequence[bool]:
        """As `EngineCalls.beat`: that each rank's process answers."""
        await self._tell(lambda _: Order())
        return [True] * len(self._sockets)

    async def unfinished(self, place: ApiPlace, answering: int) -> int:  # noqa: ARG002 - there is one API server
        """As `EngineCalls.unfinished`."""
        return answering

    async def _tell(self, order: Callable[[int], Order], patience_s: float | None = None) -> list[Any]:
        """Tell all ranks something at once; returns what they answer, in their order."""

        def telling(number: int) -> Callable[[], Any]:
            return lambda: tell(process_name(number), 0, order(number), patience_s)

        return await asyncio.gather(*(in_thread(telling(number), name="gms-tell") for number in range(len(self._sockets))))


def _sockets_of_ranks() -> list[Path]:
    """Where each rank of this engine has joined, in their order, as they say themselves.

    Raises:
        ConnectionLost: One does not answer.
    """
    first, ranks = tell(process_name(0), 0, Order(call="place"))
    return [Path(first), *(Path(tell(process_name(number), 0, Order(call="place"))[0]) for number in range(1, ranks))]
