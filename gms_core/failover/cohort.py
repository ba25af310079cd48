"""The cohort of an engine: its name, which every process inherits, and each process's place in it."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gms_core.client import Membership
from gms_core.config import export_cohort, settings
from gms_core.engine_log import log
from gms_core.errors import GmsError
from gms_core.failover import huge_pages
from gms_core.failover.process import EngineProcess
from gms_core.failover.resource_tracker import start_apart

GRACE_S = 20.0
"""Seconds that an engine has to end in order, beside those that it gives running requests; then the servers end what is left of it."""


class ApiPlace(NamedTuple):
    """Which of its engine's API servers a process is.

    Attributes:
        rank: From 0; -1 for a process that only starts API servers.
        servers: How many there are.
    """

    rank: int = 0
    servers: int = 1

    @property
    def main_pid(self) -> int:
        """The process that the user has started: it starts the others, through `multiprocessing`, if there are several API servers."""
        parent = multiprocessing.parent_process()
        return parent.pid if self.servers > 1 and self.rank >= 0 and parent is not None and parent.pid is not None else os.getpid()


_begun_in = 0
"""The process that has begun a cohort; a forked child has this variable too."""


def begin_cohort(engine: str) -> None:
    """Name the cohort of the engine that this process begins. One that is in the environment already belongs to some outer engine.

    Args:
        engine: What the engine is called if nobody has given it a name: this, and the process's number.
    """
    global _begun_in
    _begun_in = os.getpid()
    export_cohort(secrets.token_hex(16), settings().engine or f"{engine}-{os.getpid()}")
    start_apart()


def began_here() -> bool:
    """Whether this process has begun its engine: nobody has started it for an engine, so it need not end with anybody."""
    return _begun_in == os.getpid()


def this_process(name: str, sockets: Iterable[Path] = (), **options: Any) -> EngineProcess:
    """This process, as one of the engine whose cohort is in the environment; options are further fields of `EngineProcess`."""
    told = settings()
    return EngineProcess(told.cohort, told.engine, name, tuple(sockets), **options)


class Places:
    """A process's places in its engine's cohort, one for each device server. They last as long as the process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._joined: dict[Path, Membership] = {}

    def take(self, process: EngineProcess) -> None:
        """Join the cohort on each of the process's servers where it has no place, or has lost it because the server was restarted.

        Raises:
            GmsError: A server is not there, or does not want this process.
        """
        with self._guard:
            for socket in process.sockets:
                if not self._has(socket):
                    self._joined[socket] = process.join(socket)

    def depart(self, grace_s: float) -> None:
        """Tell the servers that the whole engine ends within so many seconds. One that is not there need not know."""
        for membership in list(self._joined.values()):
            try:
                membership.depart(grace_s)
            except GmsError as error:
                log().debug("a server was not told of the end: %s", error)

    def _has(self, socket: Path) -> bool:
        membership = self._joined.get(socket)
        if membership is None:
            return False
        try:
            membership.beat()
        except GmsError:
            membership.close()
            return False
        return True


_places = Places()


def take_place(name: str, sockets: Iterable[Path], *, serves: bool, connect_timeout_s: float) -> None:
    """Join this process to its engine's cohort on each of these servers. Idempotent; a place that was lost is taken anew.

    Args:
        name: Which of the engine's processes this is.
        sockets: Of the servers.
        serves: Whether clients can reach this process.
        connect_timeout_s: Seconds to connect to each.

    Raises:
        GmsError: A server is not there, or does not want this process.
    """
    _places.take(this_process(name, sockets, serves=serves, connect_timeout_s=connect_timeout_s))


def depart(grace_s: float) -> None:
    """Tell the servers that this process has joined that the whole engine ends within so many seconds."""
    _places.depart(grace_s)


def settle(process: str) -> None:
    """Put this process's host memory into huge pages, so that it ends soon if it is killed."""
    done = huge_pages.collapse()
    log().info("%s: %.2f GiB of host memory are in huge pages, after %.1f s", process, done.bytes / 2**30, done.seconds)
