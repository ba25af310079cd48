"""The calls of an API server to vLLM's engine core and its ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gms_core.failover.cohort import ApiPlace
from gms_core.failover.front_end.engine import RankMemory, Step, Stood


class VllmCalls:
    """`EngineCalls` over vLLM's ``AsyncLLM``: what the ranks do is in `shadow_worker`, what the engine core does in `engine_core`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def place_ranks(self) -> Sequence[Path]:
        """As `EngineCalls.place_ranks`. On other nodes it is the agents that are of the cohort for this process."""
        return [Path(place["socket"]) for place in await self._ranks("gms_place") if place["node"] == 0]

    async def join(self, sockets: Sequence[Path], connect_timeout_s: float) -> None:
        """As `EngineCalls.join`, for the engine core."""
        await self._engine_core("gms_join", [str(path) for path in sockets], connect_timeout_s)

    async def settle(self) -> None:
        """As `EngineCalls.settle`."""
        await asyncio.gather(self._engine_core("gms_settle"), self._ranks("gms_settle"))

    async def rehearse(self, wanted: bool) -> None:
        """As `EngineCalls.rehearse`."""
        await self._ranks("gms_rehearse", wanted)

    async def forget(self) -> bool:
        """As `EngineCalls.forget`. While the last request's blocks are still being given back, it cannot."""
        return bool(await self._client.reset_prefix_cache())

    async def stand_by(self) -> Sequence[Stood]:
        """As `EngineCalls.stand_by`."""
        return [Stood(*answer) for answer in await self._ranks("gms_stand_by")]

    async def withhold(self, blocks: int) -> bool:
        """As `EngineCalls.withhold`."""
        return bool(await self._engine_core("gms_withhold", blocks))

    async def promote(self, timeout_s: float, bridge: bool) -> Sequence[RankMemory]:
        """As `EngineCalls.promote`."""
        answers = await self._ranks("gms_promote", timeout_s, bridge)
        return [RankMemory(**{field: answer[field] for field in RankMemory._fields}) for answer in answers]

    async def give_all(self) -> tuple[Step, str]:
        """As `EngineCalls.give_all`."""
        step, reason = await self._engine_core("gms_give_all")
        return step, reason

    async def beat(self) -> Sequence[bool]:
        """As `EngineCalls.beat`."""
        return [bool(moves) for moves in await self._ranks("gms_beat")]

    async def unfinished(self, place: ApiPlace, answering: int) -> int:
        """As `EngineCalls.unfinished`: the engine core has the sum of what the API servers say."""
        return int(await self._engine_core("gms_unfinished", *place, answering))

    async def _ranks(self, method: str, *arguments: Any) -> Sequence[Any]:
        answers: Sequence[Any] = await self._client.collective_rpc(method, args=arguments)
        return answers

    async def _engine_core(self, method: str, *arguments: Any) -> Any:
        return await self._client.engine_core.call_utility_async(method, *arguments)
