"""An engine's main process with tokenizer workers, without SGLang: `Workers` for real, whose workers say what they come to. Run with ``-c``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import GmsError
from gms_core.failover.cohort import ApiPlace, begin_cohort
from gms_core.failover.front_end.gate import bind_port
from gms_core.failover.front_end.named import be_told
from gms_sglang.detokenizer import DETOKENIZER
from gms_sglang.part import Part
from gms_sglang.tokenizer_calls import FirstCalls, FurtherCalls, Mates
from gms_sglang.tokenizer_workers import Workers

FAILS = 3
"""The exit code of a worker that is told to fail, by SIGUSR1."""


class Ranks:
    """Two of them, which know what a test wants to see."""

    answers: dict[str, list[Any]] = {  # noqa: RUF012 - nobody changes it
        "place": [{"socket": "/one"}, {"socket": "/two"}],
        "stand_by": [(0, ""), (0, "")],
        "beat": [True, True],
        "unfinished": [5, 5],
    }

    async def ask(self, method: str, *_: Any) -> list[Any]:
        say(asked=method)
        return self.answers[method]

    def close(self) -> None:
        pass


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def work(_: Any, listener: Any, part: Part, mates: Mates) -> None:
    """What a worker of an engine that fails over does, in this order."""
    rank = part.place.rank

    def end(number: int, _: Any) -> None:
        say(ended=rank)
        sys.exit(0 if number == signal.SIGTERM else FAILS)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, end)
    say(worker=rank, servers=part.place.servers, port=listener.getsockname()[1], pid=os.getpid())
    if os.fork() == 0:  # as SGLang's workers do for images: it has the listener, and the pipe on which all of them tell
        while True:
            signal.pause()
    asyncio.run(_first(part.place, mates) if rank == 0 else _further(part.place, mates))
    say(done=rank)
    while True:
        signal.pause()


async def _first(place: ApiPlace, mates: Mates) -> None:
    calls = FirstCalls(Ranks(), mates, lambda: say(all_ready=True))
    say(sockets=[str(socket) for socket in await calls.place_ranks()])
    await calls.stand_by()
    say(beats=len(await calls.beat()))
    say(unfinished=await calls.unfinished(place, 2))


async def _further(place: ApiPlace, mates: Mates) -> None:
    calls = FurtherCalls(mates)
    say(told=[str(socket) for socket in await calls.place_ranks()], beats=len(await calls.beat()))
    say(answering=await calls.unfinished(place, 7))
    mates.tell_ready()


def main() -> None:
    import uvicorn

    begin_cohort("stand-in")
    be_told(DETOKENIZER, serves=False)
    part = Part(ApiPlace(), GmsConfig(), FailoverConfig(), None, (), ())
    listener = bind_port("127.0.0.1", 0, shared=True)
    try:
        Workers(uvicorn.Config("nowhere:app", workers=2), listener, part, work).run()
    except GmsError as error:
        say(error=error.code, message=error.message)
        sys.exit(1)
    say(over=True, closed=listener.fileno() == -1)
