"""Processes of a made-up engine: each joins a cohort for real, does as it is told over a pipe, and can be killed for real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = """
import json, os, sys, threading
from pathlib import Path
from gms_core.client import Membership, RetainedPool, connect
from gms_core.errors import GmsError
from gms_core.layout import Identity
from gms_core.vmm.driver import Access

socket, cohort, process, deadline_s = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
sessions, state = [], {}

def joined():
    session = connect(socket_path=socket, client=f"{cohort} {process}")
    sessions.append(session)
    return Membership.join(session, cohort, f"engine of {cohort}", process, deadline_s=deadline_s, serves=process.startswith("api"))

def mapped(pool, driver, front_only=False):
    # Maps what the holder may map: all of the pool, with the front whose turn it is; or that front alone.
    planned, turn = pool.planned, state.get("turn", 0)
    spared = {spare.offset for spare in planned.spares}
    chosen = [a for a in planned.allocations if turn == 0 or a.offset not in spared] + [a for a in planned.spares if turn == 1]
    if front_only:
        chosen = [a for a in chosen if a.offset in spared]
    size = max(a.offset + a.size for a in chosen)
    base = driver.reserve(size)
    offsets = {a.id: a.offset for a in chosen}
    def take(received):
        for item in received:
            if item.id in offsets:
                driver.map(base + offsets[item.id], item.size, driver.import_descriptor(item.descriptor, item.size))
    pool.receive(take)
    driver.set_access(base, size, Access.READ_WRITE)
    return base, size

def do(command):
    name, arguments = command[0], command[1:]
    membership = state["membership"]
    if name == "close":
        membership.close()
    elif name == "plan":
        pool = state["pool"] = RetainedPool(membership.session, arguments[0])
        planned = pool.plan(Identity({"kind": arguments[1]}), 30.0)
        return None if planned is None else [planned.plan.decode(), sum(a.size for a in planned.allocations), planned.epoch]
    elif name == "provide":
        state["pool"].provide(arguments[0].encode(), arguments[1], 5.0, front=arguments[2] if len(arguments) > 2 else ())
    elif name == "hold":
        held = state["pool"].hold(arguments[0], bridge=len(arguments) > 1)
        state["turn"] = held.turn
        return held.epoch if held.whole else [held.epoch, held.turn]
    elif name == "await whole":
        state["pool"].await_whole(arguments[0])
    elif name == "release":
        state["pool"].release()
    elif name == "write":
        base, size = mapped(state["pool"], membership.session.driver)
        membership.session.driver.write(base, bytes([arguments[0]]) * size)
    elif name == "write front":
        base, size = mapped(state["pool"], membership.session.driver, front_only=True)
        membership.session.driver.write(base, bytes([arguments[0]]) * size)
    elif name == "read":
        base, size = mapped(state["pool"], membership.session.driver, front_only=arguments == ["front"])
        return sorted(set(membership.session.driver.read(base, size)))
    elif name == "write for ever":
        # Like work on a device that nothing but the process's end can stop: every page, again and again, whatever becomes of the connection.
        base, size = mapped(state["pool"], membership.session.driver)
        def scribble():
            import ctypes
            while True:
                ctypes.memset(base, arguments[0], size)
        threading.Thread(target=scribble, daemon=True).start()
    elif name == "fatten":
        state["fat"] = bytearray(os.urandom(4096)) * (arguments[0] // 4096)
    elif name == "elect":
        return membership.elect(arguments[0], arguments[1])
    elif name == "await role":
        membership.await_role(arguments[0], arguments[1])
    elif name == "report":
        return membership.report(arguments[0])
    elif name == "beat":
        membership.beat()
    elif name == "depart":
        membership.depart(arguments[0])
    else:
        raise SystemExit(f"no such command: {name}")

try:
    state["membership"] = joined()
    print(json.dumps({"joined": os.getpid()}), flush=True)
except GmsError as error:
    print(json.dumps({"code": error.code, "message": str(error)}), flush=True)
for line in sys.stdin:
    try:
        print(json.dumps({"result": do(json.loads(line))}), flush=True)
    except GmsError as error:
        print(json.dumps({"code": error.code, "message": str(error)}), flush=True)
"""


class Refused(Exception):
    """The server refused what the process asked for."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class EngineProcess:
    """One process of a made-up engine."""

    def __init__(self, socket: Path, cohort: str, process: str = "rank 0", deadline_s: float = 0.0) -> None:
        command = [sys.executable, "-c", PROGRAM, os.fspath(socket), cohort, process, str(deadline_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        try:
            self.answer()
        except BaseException:
            self.end()
            raise

    def tell(self, *command: Any) -> None:
        """Send a command and do not wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The answer to a command that was sent before."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"process {self.pid} has ended")
        answer = json.loads(line)
        if "code" in answer:
            raise Refused(answer["code"], answer["message"])
        return answer.get("result")

    def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer."""
        self.tell(*command)
        return self.answer()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, without waiting."""
        self.signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self._process.wait(30)

    def end(self) -> None:
        """End the process, in whatever state it is."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def processes() -> Iterator[Any]:
    """Gives a function that starts an `EngineProcess`; all that were started are ended with the context."""
    started: list[EngineProcess] = []

    def start(*arguments: Any, **options: Any) -> EngineProcess:
        started.append(EngineProcess(*arguments, **options))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.end()
