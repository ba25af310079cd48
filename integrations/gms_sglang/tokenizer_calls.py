"""The calls of SGLang's tokenizer workers to the rest of their engine. The first one asks for all; the others know of it, and of themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gms_core.errors import EngineFailed
from gms_core.failover.cohort import ApiPlace
from gms_core.failover.front_end.engine import Stood
from gms_core.failover.front_end.main_process import tell_main
from gms_core.failover.front_end.named import Order
from gms_core.failover.threads import in_thread
from gms_sglang.engine_calls import Ranks, SglangCalls


@dataclass(frozen=True)
class Mates:
    """What a tokenizer worker has of the others.

    Attributes:
        connections: Of the first worker: one to each of the others, in their order. Of another one: that to the first.
        answering: Requests that each of them is answering, in memory of theirs, as it has last said so; 1 before it was asked to finish them.
    """

    connections: tuple[Connection[Any, Any], ...]
    answering: MutableSequence[int]

    def tell_ready(self) -> None:
        """Tell the first worker that this one is ready to stand by."""
        with contextlib.suppress(OSError):  # the engine has lost its first worker, and ends
            self.connections[0].send("ready")

    def still(self, rank: int, answering: int) -> int:
        """Say how many requests a worker is answering; returns how many all of them are."""
        self.answering[rank] = answering
        return sum(self.answering)


class FirstCalls(SglangCalls):
    """Those of the first worker. What SGLang's main process does where there is one tokenizer, the first worker does."""

    def __init__(self, ranks: Ranks, mates: Mates, all_ready: Callable[[], None]) -> None:
        """Prepare.

        Args:
            ranks: All of the engine's.
            mates: The other workers.
            all_ready: Called once all workers have started their apps.
        """
        super().__init__(ranks)
        self._mates = mates
        self._all_ready = all_ready
        self._told = False

    async def place_ranks(self) -> Sequence[Path]:
        """As `EngineCalls.place_ranks`. The other workers, who cannot ask, are told when it is known for the first time."""
        sockets = await super().place_ranks()
        if not self._told:
            self._told = True
            for connection in self._mates.connections:
                connection.send([str(socket) for socket in sockets])
        return sockets

    async def settle(self) -> None:
        """As `EngineCalls.settle`; the main process has nothing to answer, but as much memory as others."""
        await in_thread(lambda: tell_main(Order(settle=True)), name="gms-tell")
        await super().settle()

    async def stand_by(self) -> Sequence[Stood]:
        """As `EngineCalls.stand_by`, once the other workers are ready too."""
        for connection in self._mates.connections:
            await _received(connection)
        self._all_ready()
        return await super().stand_by()

    async def beat(self) -> Sequence[bool]:
        """As `EngineCalls.beat`. All that the workers ask and answer goes through the main process."""
        await in_thread(lambda: tell_main(Order()), name="gms-tell")
        return await super().beat()

    async def unfinished(self, place: ApiPlace, answering: int) -> int:
        """As `EngineCalls.unfinished`."""
        return await super().unfinished(place, self._mates.still(place.rank, answering))


class FurtherCalls(SglangCalls):
    """Those of any other worker, which asks no rank: it is the first one's business to know whether they make progress."""

    def __init__(self, mates: Mates) -> None:
        """Prepare.

        Args:
            mates: The first worker, and what all of them are answering.
        """
        super().__init__(_Nobody())
        self._mates = mates

    async def place_ranks(self) -> Sequence[Path]:
        """As `EngineCalls.place_ranks`: what the first worker says."""
        return [Path(socket) for socket in await _received(self._mates.connections[0])]

    async def beat(self) -> Sequence[bool]:
        """As `EngineCalls.beat`, of no rank."""
        return ()

    async def unfinished(self, place: ApiPlace, answering: int) -> int:
        """As `EngineCalls.unfinished`, of all workers."""
        return self._mates.still(place.rank, answering)


class _Nobody:
    """Ranks of which nobody asks."""

    async def ask(self, method: str, *_: Any) -> list[Any]:
        raise EngineFailed(f"only the engine's first tokenizer worker asks its ranks ({method})")

    def close(self) -> None:
        pass


async def _received(connection: Connection[Any, Any]) -> Any:
    """The next thing that another worker says."""
    try:
        return await in_thread(connection.recv, name="gms-mate")
    except (EOFError, OSError) as error:
        raise EngineFailed("a tokenizer worker of this engine has ended before it was ready") from error
