"""Processes that stand for engines in the tests of failover: real ones, that lock, serve and die for real. Each says what happens to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0

LOCKER = """
import json, os, sys
from pathlib import Path
from gms_core.failover.flock import FileLock
from gms_core.failover.process import EngineProcess

def say(**facts):
    print(json.dumps(facts), flush=True)

lock = FileLock(Path(sys.argv[1]))
lock.open()
me = EngineProcess("cohort of " + sys.argv[2], sys.argv[2], "api-server 0", ())
say(term=lock.acquire(me, lambda reason: say(waits=reason)))
for line in sys.stdin:
    if line.strip() == "fork":
        child = os.fork()
        if child == 0:
            sys.stdin.readline()  # nothing comes: it lives until its pipe ends
            os._exit(0)
        say(child=child)
    elif line.strip() == "spawn":
        import subprocess
        say(child=subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], close_fds=False).pid)
"""

ENGINE = """
import asyncio, json, os, signal, sys, threading
from pathlib import Path
from gms_core.failover.control import Control
from gms_core.failover.follower import Follower
from gms_core.failover.locks import open_lock
from gms_core.failover.process import EngineProcess
from gms_core.failover.promotion import Promotion
from gms_core.failover.status import EngineState, Promoted
from gms_core.failover.threads import from_thread

options = json.loads(sys.argv[1])
engine = options["engine"]
hung = threading.Event()
guard = threading.Lock()

def say(**facts):
    with guard:
        print(json.dumps(facts), flush=True)

async def promote():
    say(promoting=True)
    if options.get("promotion") == "fails":
        raise RuntimeError("no memory")
    if options.get("promotion") == "hangs":
        await asyncio.sleep(3600)
    await asyncio.sleep(options.get("promotion_s", 0))
    return Promoted({"0": 1}, {"bytes": 4096})

async def answer():
    # Every process of this engine answers at once, unless the test lets one of them hang.
    while hung.is_set():
        await asyncio.sleep(0.01)

async def main():
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    name, sockets = options.get("process", "api-server 0"), tuple(map(Path, options["sockets"]))
    process = EngineProcess(options["cohort"], engine, name, sockets, deadline_s=options.get("deadline_s", 0.0))
    state = EngineState(engine, options["cohort"], options["lock"])
    state.listen(lambda change: say(role=change.role, term=change.term, detail=change.detail))

    def lost(error):
        say(lost=error.code)
        loop.call_soon_threadsafe(end.set)

    def demoted():
        say(demoted=True)
        loop.call_soon_threadsafe(end.set)

    def obey():
        for line in sys.stdin:
            if line.strip() == "hang":
                hung.set()
            elif line.strip() == "stop":
                loop.call_soon_threadsafe(end.set)
            elif line.strip() == "status":
                status = state.snapshot()
                say(status=status.role, detail=status.detail, term=status.term)

    threading.Thread(target=obey, daemon=True).start()
    check = from_thread(loop, answer)
    if options.get("follows"):
        control = Follower(process, state, check=check)
        control.start(on_demote=demoted, on_lost=lost)
        way = control.follow
    else:
        lock = open_lock(options["lock"])
        control = Control(process, state, lock, check=check, on_found=lambda socket: say(found=True))
        promotion = Promotion(
            process, state, lock, promote, control.depart, autonomous=options.get("autonomous", True), timeout_s=options.get("timeout_s", 30.0)
        )
        control.start(on_promote=promotion.go, on_demote=demoted, on_lost=lost)
        way = promotion.run
    state.ready()
    running = asyncio.ensure_future(way())
    ending = asyncio.ensure_future(end.wait())
    await asyncio.wait((running, ending), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        try:
            await running
        except Exception as error:
            say(error=type(error).__name__, message=str(error))
            return
        say(serves=True)
        await ending
    if options.get("cancels_first"):
        running.cancel()
        await asyncio.sleep(0.1)
    state.end("stopped")
    await asyncio.to_thread(control.depart, 20.0)
    say(departed=True)
    await asyncio.sleep(options.get("linger_s", 0))
    running.cancel()

asyncio.run(main())
"""


class Told:
    """A process and what it has said. Facts are read in order; those that a test does not ask for are passed over."""

    def __init__(self, program: str, *arguments: str) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.pid = self._process.pid
        self.heard: list[dict[str, Any]] = []

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next thing said that has these facts."""
        while (facts := self._said.get(timeout=PATIENCE_S)) is not None:
            self.heard.append(facts)
            if facts.items() >= wanted.items():
                return facts
        raise EOFError(f"process {self.pid} ended before it said {wanted}; it said {self.heard}")

    def until_key(self, key: str) -> Any:
        """The value of the next fact of this name."""
        while (facts := self._said.get(timeout=PATIENCE_S)) is not None:
            self.heard.append(facts)
            if key in facts:
                return facts[key]
        raise EOFError(f"process {self.pid} ended before it said {key}; it said {self.heard}")

    def rest(self) -> list[dict[str, Any]]:
        """All that it has said and will say until its end."""
        said = []
        while (facts := self._said.get(timeout=PATIENCE_S)) is not None:
            said.append(facts)
        self.heard += said
        return said

    def quiet(self) -> bool:
        """Whether it has said nothing that was not read yet."""
        return self._said.empty()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self) -> int:
        return self._process.wait(PATIENCE_S)

    def end(self) -> None:
        """End it, in whatever state it is."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join(PATIENCE_S)
        self._process.stdout.close()


@contextlib.contextmanager
def told_processes() -> Iterator[Callable[..., Told]]:
    """Gives a function that starts a process from a program; all that were started are ended with the context."""
    started: list[Told] = []

    def start(program: str, *arguments: str | os.PathLike[str]) -> Told:
        started.append(Told(program, *map(os.fspath, arguments)))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.end()


def engine_options(engine: str, sockets: list[Path], lock: str, **options: Any) -> str:
    """The argument of `ENGINE`."""
    return json.dumps({"engine": engine, "cohort": f"cohort of {engine}", "sockets": [str(path) for path in sockets], "lock": lock, **options})
