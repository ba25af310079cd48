"""The calls of an API server to SGLang's schedulers and its detokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gms_core.failover.cohort import ApiPlace
from gms_core.failover.front_end.engine import RankMemory, Step, Stood
from gms_core.failover.front_end.named import Order, tell
from gms_core.failover.threads import in_thread
from gms_sglang.detokenizer import DETOKENIZER


class Ranks(Protocol):
    """Calls a method of every rank; see `gms_sglang.scheduler_rpc.SchedulerRpc`."""

    async def ask(self, method: str, arguments: Mapping[str, Any] | None = None) -> list[Any]:
        """What each rank answers."""

    def close(self) -> None:
        """Ask no more."""


class SglangCalls:
    """`EngineCalls` over SGLang's own remote calls: what the ranks do is in `scheduler_calls`, what the detokenizer does in `detokenizer`.

    A shadow of SGLang has no bridge, so `withhold` and `give_all` have nothing to do.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Prepare.

        Args:
            ranks: All of the engine's.
        """
        self._ranks = ranks

    async def place_ranks(self) -> Sequence[Path]:
        """As `EngineCalls.place_ranks`."""
        return [Path(place["socket"]) for place in await self._ranks.ask("place")]

    async def join(self, sockets: Sequence[Path], connect_timeout_s: float) -> None:
        """As `EngineCalls.join`, for the detokenizer."""
        await self._tell(Order(tuple(map(str, sockets)), connect_timeout_s))

    async def settle(self) -> None:
        """As `EngineCalls.settle`."""
        await self._tell(Order(settle=True))
        await self._ranks.ask("settle")

    async def rehearse(self, wanted: bool) -> None:
        """As `EngineCalls.rehearse`."""
        await self._ranks.ask("rehearse", {"wanted": wanted})

    async def forget(self) -> bool:
        """As `EngineCalls.forget`. While the last request is still being put away, a scheduler cannot."""
        return all(await self._ranks.ask("forget"))

    async def stand_by(self) -> Sequence[Stood]:
        """As `EngineCalls.stand_by`."""
        return [Stood(*answer) for answer in await self._ranks.ask("stand_by")]

    async def withhold(self, blocks: int) -> bool:  # noqa: ARG002 - of the protocol
        """As `EngineCalls.withhold`: no scheduler of SGLang can."""
        return False

    async def promote(self, timeout_s: float, bridge: bool) -> Sequence[RankMemory]:  # noqa: ARG002 - there is none
        """As `EngineCalls.promote`."""
        return [RankMemory(**answer) for answer in await self._ranks.ask("promote", {"timeout_s": timeout_s})]

    async def give_all(self) -> tuple[Step, str]:
        """As `EngineCalls.give_all`: nothing was withheld."""
        return "whole", ""

    async def beat(self) -> Sequence[bool]:
        """As `EngineCalls.beat`. A detokenizer has no device, but has to answer too."""
        await self._tell(Order())
        return [bool(moves) for moves in await self._ranks.ask("beat")]

    async def unfinished(self, place: ApiPlace, answering: int) -> int:  # noqa: ARG002 - there is one API server
        """As `EngineCalls.unfinished`. Ranks that compute together have the same requests."""
        return int(max(await self._ranks.ask("unfinished"))) + answering

    def close(self) -> None:
        """Ask no more."""
        self._ranks.close()

    async def _tell(self, order: Order) -> None:
        await in_thread(lambda: tell(DETOKENIZER, 0, order), name="gms-tell")
