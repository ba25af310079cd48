"""What an API server of an engine that fails over needs of its engine and of its HTTP server; adapters answer over the engine's own calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from gms_core.failover.cohort import ApiPlace

Step = Literal["waiting", "asleep", "failed", "whole"]
"""What an engine that serves from its bridge has come to: it waits for the proof, it could have the rest but sleeps, it never will, it has all."""


class Stood(NamedTuple):
    """A rank that was told to stand by.

    Attributes:
        blocks: With how many blocks of its KV memory, from the first one on, it may begin before it has all of it; 0 if it waits for that.
        refusal: Why it can never be promoted; empty if it can.
    """

    blocks: int
    refusal: str


class RankMemory(NamedTuple):
    """The KV memory that a promoted rank has.

    Attributes:
        rank: Whose it is.
        epoch: Of the pool.
        bytes: What is mapped.
        hold_s: Seconds until it was granted.
        map_s: Seconds to map it after that.
    """

    rank: int
    epoch: int
    bytes: int
    hold_s: float
    map_s: float


class EngineCalls(Protocol):
    """The processes of the engine beside its API servers: the ranks, and whatever stands between them and the API servers.

    An answer of the ranks has one item for each of them, in their order. What a call raises on the way to the service ends the engine. Later it is
    logged: an engine that serves goes on where its processes cannot be asked, or cannot join a server that is back. Where the engine's own calls
    block, `gms_core.failover.threads.in_thread` makes coroutines of them; two of them may then run at once. A coroutine is cancelled where the engine
    is ended while it waits.
    """

    async def place_ranks(self) -> Sequence[Path]:
        """Have every rank take its place in the cohort, anew if its server was restarted; returns the sockets of their servers.

        Of an engine over several nodes those of this node: the others' ranks are of the cohorts of theirs, and their agents with them.
        """

    async def join(self, sockets: Sequence[Path], connect_timeout_s: float) -> None:
        """Have all other processes that compute or answer join the cohort on these servers; no API server, and not the main process.

        These are schedulers and detokenizers. Whatever else the engine has started must end with its parent.
        """

    async def settle(self) -> None:
        """Have all of them put their host memory into huge pages, as `gms_core.failover.cohort.settle` does."""

    async def rehearse(self, wanted: bool) -> None:
        """Let the ranks compute on scratch memory, or end that. It says nothing to a rank that is promoted."""

    async def forget(self) -> bool:
        """Forget what requests have left in the engine, such as its prefix cache; returns whether that is done, or has to be tried again."""

    async def stand_by(self) -> Sequence[Stood]:
        """Make sure that every rank can be promoted. From here on the loss of its server is for the first API server to notice."""

    async def withhold(self, blocks: int) -> bool:
        """Let the scheduler give out no block but the first ones; returns whether it does. Asked only if every rank has a bridge."""

    async def promote(self, timeout_s: float, bridge: bool) -> Sequence[RankMemory]:
        """Have every rank wait until no other engine can touch the KV memory, and map it in the place of the scratch memory.

        Args:
            timeout_s: Seconds to wait at most.
            bridge: Whether ranks may begin with their first blocks: the scheduler gives out no others.
        """

    async def give_all(self) -> tuple[Step, str]:
        """Have all ranks map all of their memory, and let the scheduler give out all blocks, once every rank may. Asked again until that is done.

        Returns:
            What it has come to, and the reason in words if it has failed. Only asked where `withhold` was done.
        """

    async def beat(self) -> Sequence[bool]:
        """Ask every rank whether its device makes progress. What is raised is logged, and counts as no progress."""

    async def unfinished(self, place: ApiPlace, answering: int) -> int:
        """Requests that are still running in the engine or in any of its API servers.

        Args:
            place: Who asks.
            answering: Requests that this API server is answering.
        """


class HttpServer(Protocol):
    """The HTTP server of this process, from its start to its end.

    All of it is asked in the event loop of `ApiServer`. Where another loop serves, it is the implementation that goes there. An engine ends in order,
    and at once, on SIGTERM of its main process: that is how one is ended that an operator has demoted.
    """

    @property
    def address(self) -> str:
        """Where it serves, or will serve, for people and notifications."""

    async def prepared(self) -> None:
        """Come back once everything is ready to serve but the listening. The rehearsal comes next."""

    async def rehearse(self, engine: EngineCalls) -> None:
        """Put requests through the whole engine, as `gms_core.failover.front_end.rehearsal` does. Nobody else can reach it.

        Raises:
            GmsError: The engine does not get through them.
        """

    def check_alone(self) -> None:
        """Make sure that nobody else listens at the address. Called before `open`, where engines have an address in common.

        Raises:
            ConfigurationError: Somebody does.
        """

    async def open(self) -> None:
        """Listen; comes back once clients can connect, and only then: it is told to the world next. Somebody may accept them later."""

    def shut(self) -> None:
        """Listen no more, and never again. What is connected stays. Idempotent, and it may never have listened."""

    async def beat(self) -> None:
        """Come back once the event loop that serves has been there: while it hangs, nobody may think that the engine makes progress."""

    def answering(self) -> int:
        """Requests that are being answered."""

    def end(self) -> None:
        """End this process by an error, in the engine's orderly way and soon; returns at once. Called in the event loop."""
