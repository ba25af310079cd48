"""An engine that blocks: its main thread has no event loop and waits until it may serve, and its calls to its ranks have no coroutines.

    python blocking_engine.py OPTIONS

It has one rank, which does nothing but say what it was asked, and a thread in which another event loop serves HTTP, or would. On standard output it
says what happens, one JSON document a line. On standard input it is told to let go of what it holds on to (`holds`), or to let HTTP hang.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gms_core.config import export_cohort
from gms_core.engine_config import FailoverConfig
from gms_core.errors import GmsError
from gms_core.failover.cohort import ApiPlace, begin_cohort
from gms_core.failover.front_end.api_server import ApiServer, open_early
from gms_core.failover.front_end.engine import EngineCalls, RankMemory, Step, Stood
from gms_core.failover.threads import from_thread, in_thread

options = json.loads(sys.argv[1])
guard = threading.Lock()


def say(**facts: Any) -> None:
    with guard:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


released = threading.Event()


async def held(name: str) -> None:
    """Wait for the word of the test, if this is what it wants to hold."""
    if options.get("holds") == name:
        say(holds=name)
        await in_thread(released.wait, name="held")


async def asked(name: str, answer: Callable[[], Any] = lambda: None) -> Any:
    """What an engine does that answers by a function that blocks."""

    def block() -> Any:
        say(asked=name)
        if options.get("fails") == name:
            raise RuntimeError(f"{name} has failed")
        return answer()

    await held(name)

    return await in_thread(block, name="rank")


class Ranks:
    def __init__(self) -> None:
        self.steps: list[tuple[Step, str]] = [("waiting", ""), *map(tuple, options.get("gives", [["whole", ""]]))]
        self.running = options.get("running", 1)

    async def place_ranks(self) -> Sequence[Path]:
        return [Path(options["socket"])] * 2  # two ranks may have one server

    async def join(self, sockets: Sequence[Path], connect_timeout_s: float) -> None:
        assert sockets == (Path(options["socket"]),)
        assert connect_timeout_s > 0
        await asked("join")

    async def settle(self) -> None:
        await asked("settle")

    async def rehearse(self, wanted: bool) -> None:
        raise NotImplementedError

    async def forget(self) -> bool:
        raise NotImplementedError

    async def stand_by(self) -> Sequence[Stood]:
        return await asked("stand by", lambda: [Stood(options.get("blocks", 0), options.get("refusal", ""))])

    async def withhold(self, blocks: int) -> bool:
        return await asked(f"withhold {blocks}", lambda: True)

    async def promote(self, timeout_s: float, bridge: bool) -> Sequence[RankMemory]:
        return await asked(f"promote, bridge {bridge}", lambda: [RankMemory(0, 7, 4096, 0.25, 0.5)])

    async def give_all(self) -> tuple[Step, str]:
        return await asked("give all", lambda: self.steps.pop(0))

    async def beat(self) -> Sequence[bool]:
        return [not options.get("stalls", False)]

    async def unfinished(self, place: ApiPlace, answering: int) -> int:
        self.running -= 1
        return await asked("unfinished", lambda: self.running + answering)


class Http:
    address = "127.0.0.1:0"

    def __init__(self) -> None:
        self.serving = asyncio.new_event_loop()
        threading.Thread(target=self.serving.run_forever, name="http", daemon=True).start()

    async def prepared(self) -> None:
        say(http="prepared")
        if options.get("fails") == "prepared":
            raise RuntimeError("the app does not start")

    async def rehearse(self, engine: EngineCalls) -> None:
        say(http="rehearse")
        await held("rehearse")

    def check_alone(self) -> None:
        say(http="check alone")

    async def open(self) -> None:
        await held("open")
        say(http="open")

    def shut(self) -> None:
        say(http="shut")

    async def beat(self) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.serving))

    def answering(self) -> int:
        return 0

    def end(self) -> None:
        say(http="end")
        ended.set()


ended = threading.Event()


def main() -> None:
    """Start and serve as `ApiServer` has it."""
    failover = FailoverConfig(lock="gms:primary", **options.get("failover", {}))
    begin_cohort("blocking")
    if "cohort" in options:
        export_cohort(options["cohort"], "blocking")
    open_early(failover)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="gms-front-end", daemon=True).start()
    http = Http()

    async def make() -> ApiServer:
        return ApiServer(Ranks(), http, ApiPlace(*options.get("place", ())), failover, connect_timeout_s=10.0, grace_s=20.0)

    def obey() -> None:
        for line in sys.stdin:
            if line.strip() == "let go":
                released.set()
            else:
                http.serving.call_soon_threadsafe(threading.Event().wait)  # it hangs for ever

    server = from_thread(loop, make)()

    def end(*_: Any) -> None:
        ended.set()
        threading.Thread(target=server.depart, name="depart").start()  # the main thread may be waiting, with its signals

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=obey, name="obey", daemon=True).start()
    try:
        from_thread(loop, server.start)()
        if not from_thread(loop, server.come_to_serve)():
            raise server.state.over()
        say(serves=server.state.snapshot().term, kv=server.state.snapshot().kv)
        while not ended.wait(0.2):  # in turns, so that a signal's handler runs that came in the instant before a wait
            pass
        say(failure=str(server.failure or ""))
    finally:
        server.depart()
        server.close()


try:
    main()
except GmsError as error:
    say(error=type(error).__name__, message=str(error))
