"""SGLang's tokenizer workers in an engine that fails over: processes of the engine, which its first process starts and ends.

SGLang has uvicorn start them, which puts another in the place of one that has died. An engine whose requests are lost in part would go on with that,
unseen by its servers. So they are started here: none is replaced, and the engine ends with the first of them that does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import uvicorn

from gms_core.engine_log import log, log_as
from gms_core.errors import EngineFailed, EngineUnsupported
from gms_core.failover.cohort import GRACE_S, ApiPlace
from gms_core.failover.front_end.main_process import take_part
from gms_core.failover.parent_death import end_forks_with_this, end_with_parent
from gms_sglang import LOG
from gms_sglang.failover import Begun
from gms_sglang.part import Part, part_of
from gms_sglang.tokenizer_calls import Mates

APP = "sglang.srt.entrypoints.http_server:app"
"""What SGLang has each worker serve."""
SCHEDULERS_S = 15.0
"""Seconds that the schedulers have to end, as SGLang has it."""
_AGAIN_S = 0.05
_LOGGERS = (LOG, "gms_core")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_spawn = multiprocessing.get_context("spawn")
_Work = Callable[[uvicorn.Config, socket.socket, Part, Mates], None]


@contextlib.contextmanager
def workers_held(engine: Begun, listener: socket.socket, port_args: Any, watchdog: Any) -> Iterator[None]:
    """While it lasts, tokenizer workers that SGLang wants started serve under the rules of failover.

    Args:
        engine: As this process has begun it.
        listener: Bound to its address. It is closed once the workers have it.
        port_args: SGLang's ``PortArgs``.
        watchdog: SGLang's own of schedulers and detokenizers; None if it has none.

    Raises:
        EngineUnsupported: SGLang has started them by other means.
        EngineFailed: A worker has ended although nobody has ended the engine.
    """
    original: Callable[..., None] = uvicorn.run
    begun: list[Workers] = []

    def run(app: Any, **options: Any) -> None:
        if app != APP:
            original(app, **options)
            return
        config = uvicorn.Config(app, **options)
        begun.append(Workers(_with_our_log(config), listener, part_of(engine, port_args)))
        begun[0].run()
        _end_schedulers(port_args, watchdog)

    uvicorn.run = run
    try:
        yield
    finally:
        uvicorn.run = original
    if not begun:
        raise EngineUnsupported(
            "failover: SGLang has not started tokenizer workers that could be held", hint="`gms patches check` shows what differs."
        )


class Workers:
    """The tokenizer workers of one engine, started and ended together. It belongs to the main thread of the process that the user has started."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, part: Part, work: _Work | None = None) -> None:
        """Prepare; `run` is next.

        Args:
            config: Of what they serve, and how many they are.
            listener: Bound to the engine's address. It is closed once they have it.
            part: What each of them serves.
            work: What each of them does; by default, it serves SGLang's app.
        """
        self._config, self._listener, self._part = config, listener, part
        self._work = work or _serve
        self._processes: list[SpawnProcess] = []
        self._ending = False

    def run(self) -> None:
        """Start them, and come back once all have ended, in order: after SIGTERM or SIGINT, or because one of them was ended so.

        Raises:
            EngineFailed: One has ended by itself. The others are killed, and the engine is to end.
        """
        before = [(number, signal.signal(number, self._on_signal)) for number in _SIGNALS]
        take_part(GRACE_S + self._part.failover.drain_timeout_s)
        try:
            self._start()
            ended = multiprocessing.connection.wait([process.sentinel for process in self._processes])
            for rank, process in enumerate(self._processes):
                if process.sentinel in ended:
                    process.join()
                    self._check(rank, process.exitcode or 0)
            self._end()
            for process in self._processes:
                process.join()
        finally:
            self._kill()
            for number, handler in before:
                signal.signal(number, handler)

    def _start(self) -> None:
        servers = self._config.workers
        answering = _spawn.RawArray("q", [1] * servers)
        pairs = [_spawn.Pipe() for _ in range(servers - 1)]
        ours, theirs = tuple(pair[0] for pair in pairs), [pair[1] for pair in pairs]
        try:
            for rank in range(servers):
                mates = Mates((theirs[rank - 1],) if rank else ours, answering)
                part = self._part.at(ApiPlace(rank, servers))
                process = _spawn.Process(target=_be_worker, args=(self._work, self._config, self._listener, part, mates), name=f"tokenizer-{rank}")
                process.start()
                self._processes.append(process)
        finally:
            self._listener.close()  # nobody is to connect to this process
            for connection in (*ours, *theirs):
                connection.close()
        if self._ending:  # it came while they were being started
            self._end()

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        self._end()

    def _end(self) -> None:
        """Have all of them end in order."""
        self._ending = True
        for process in self._processes:
            process.terminate()

    def _check(self, rank: int, code: int) -> None:
        """Make sure that one which has ended was told to."""
        if code and not self._ending:
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
            raise EngineFailed(f"tokenizer worker {rank} {reason}: an engine does not go on without one", hint="Its log says why, if it could.")

    def _kill(self) -> None:
        """End what is left of them at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _be_worker(work: _Work, config: uvicorn.Config, listener: socket.socket, part: Part, mates: Mates) -> None:
    """The life of a worker's process."""
    log_as(LOG)
    end_with_parent()
    end_forks_with_this()  # those that prepare images: they are in no cohort, and have the connections of clients
    config.configure_logging()
    work(config, listener, part, mates)


def _serve(config: uvicorn.Config, listener: socket.socket, part: Part, mates: Mates) -> None:
    from gms_sglang.tokenizer_worker import serve

    serve(config, listener, part, mates)


def _with_our_log(config: uvicorn.Config) -> uvicorn.Config:
    """Let workers log what GMS has to say: SGLang leaves their logging to uvicorn, which knows its own loggers alone."""
    described = config.log_config
    if isinstance(described, dict) and "default" in described.get("handlers", {}):
        level = config.log_level.upper() if isinstance(config.log_level, str) else config.log_level or "INFO"
        ours = {name: {"handlers": ["default"], "level": level, "propagate": False} for name in _LOGGERS}
        config.log_config = {**described, "loggers": {**described.get("loggers", {}), **ours}}
    return config


def _end_schedulers(port_args: Any, watchdog: Any) -> None:
    """Have the schedulers end by themselves, as SGLang does where one tokenizer ends its engine."""
    import zmq
    from sglang.srt.managers.io_struct import ShutdownReq, sock_send
    from sglang.srt.utils.cudacore_pyspy_dump_utils import collect_scheduler_processes
    from sglang.srt.utils.network import get_zmq_socket

    if watchdog is not None:
        watchdog.stop()  # it would take their end for a crash
    with zmq.Context(1) as context, get_zmq_socket(context, zmq.PUSH, port_args.tokenizer_worker_ipc_name, False) as connection:
        connection.setsockopt(zmq.LINGER, int(SCHEDULERS_S * 1e3))
        sock_send(connection, ShutdownReq())
    deadline = time.monotonic() + SCHEDULERS_S
    while collect_scheduler_processes():
        if time.monotonic() > deadline:
            log().warning("the engine's schedulers have not ended within %g s, and are killed", SCHEDULERS_S)
            return
        time.sleep(_AGAIN_S)
