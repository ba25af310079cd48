"""A lock in a store that several nodes share, as an engine uses it: a process beside the engine has it; see `gms_core.failover.elector`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import xxhash

from gms_core.errors import ConfigurationError, ConnectionLost, SessionClosed, rebuild
from gms_core.failover.elector.address import EtcdAddress, StoreAddress, files, parse
from gms_core.failover.elector.protocol import RELEASE, Elected, Order, Over, Refused, Renewed, Told, Trouble, Waits, now
from gms_core.failover.elector.validity import LATE
from gms_core.failover.flock import FileLock
from gms_core.failover.process import EngineProcess
from gms_core.failover.server_lock import lock_file

log = logging.getLogger(__name__)

_TOLD: msgspec.json.Decoder[Told] = msgspec.json.Decoder(Told)
_LIBRARIES = {"etcd": "etcd3gw", "k8s": "kubernetes"}


def kind_of(address: StoreAddress) -> str:
    """``etcd`` or ``k8s``."""
    return "etcd" if isinstance(address, EtcdAddress) else "k8s"


def store_lock_file(socket: Path, text: str) -> Path:
    """The file behind a lock of a store: beside a server's socket. Locks of one name in two stores have different ones."""
    address = parse(text)
    where = xxhash.xxh3_64_hexdigest(text.partition("?")[0].encode())
    return lock_file(socket, f"{kind_of(address)}-{address.name}-{where}")


def check(text: str) -> None:
    """Check what can be checked of a lock without asking its store.

    Raises:
        ConfigurationError: It is none, its client is not installed, or a file that it names cannot be read.
    """
    try:
        address = parse(text)
    except ValueError as error:
        raise ConfigurationError(f"{text!r} is no lock: {error}") from error
    kind = kind_of(address)
    if importlib.util.find_spec(_LIBRARIES[kind]) is None:
        raise ConfigurationError(f"locks of {kind}: need the package {_LIBRARIES[kind]}", hint=f"pip install 'gms[{kind}]'")
    for option, path in files(address).items():
        if not os.access(path, os.R_OK):
            raise ConfigurationError(f"the file {path}, which the lock has as its {option}, cannot be read")


class StoreLock:
    """A lock in a store; see `gms_core.failover.locks.FailoverLock`. If it cannot be renewed, this process is killed before it runs out.

    A file beside the socket of the engine's first server tells the engine's other processes who was elected, and keeps another engine of this node
    from being elected before this one has ended, should the store have lost its data.
    """

    def __init__(self, text: str) -> None:
        """Name a lock.

        Args:
            text: As the configuration names it.
        """
        self._text = text
        self._guard = threading.Lock()
        self._elector: subprocess.Popen[bytes] | None = None
        self._file: FileLock | None = None
        self._closed = False

    def open(self) -> None:
        """Check what can be checked. Idempotent.

        Raises:
            ConfigurationError: See `check`.
        """
        check(self._text)

    def acquire(self, process: EngineProcess, on_wait: Callable[[str], None] | None = None) -> int:
        """Be elected, however long that takes; returns the term. From then on this process is killed if the lock is lost.

        Args:
            process: Who asks.
            on_wait: Called with the reason, each time that it changes.

        Raises:
            SessionClosed: The lock was closed meanwhile.
            PermissionRefused: The store does not let this client in.
            ConfigurationError: The store cannot have such a lock.
            ConnectionLost: The elector has ended.
        """
        elector = self._start(process)
        elected = self._await(elector, on_wait)
        file = FileLock(store_lock_file(process.sockets[0], self._text))
        with self._guard:
            if self._closed:
                raise SessionClosed(f"the lock {self._text} was closed")
            self._file = file
        threading.Thread(target=self._watch, args=(elector, elected.until), name="gms-elector", daemon=True).start()
        return file.acquire(process, on_wait, at_least=elected.term)

    def resume(self, process: EngineProcess, socket: Path) -> None:
        """Nothing: the store knows nothing of servers."""

    def close(self) -> None:
        """Give it back. Idempotent."""
        with self._guard:
            self._closed = True
            elector, file = self._elector, self._file
        if elector is not None and elector.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(elector.stdin.fileno(), RELEASE)
        if file is not None:
            file.close()

    def _start(self, process: EngineProcess) -> subprocess.Popen[bytes]:
        me = os.pidfd_open(os.getpid())
        try:
            with self._guard:
                if self._closed or self._elector is not None:
                    raise SessionClosed(f"the lock {self._text} was closed, or was asked for already")
                # A session of its own: whoever ends the engine's process group does not end what has to give the lock back.
                self._elector = elector = subprocess.Popen(
                    [sys.executable, "-P", "-m", "gms_core.failover.elector"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=(me,),
                    start_new_session=True,
                    bufsize=0,
                )
            order = Order(self._text, process.engine, process.cohort, os.getpid(), me, tuple(map(str, process.sockets)))
            assert elector.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its end is seen at its output
                elector.stdin.write(msgspec.json.encode(order) + b"\n")
        except OSError as error:
            raise ConnectionLost(f"the elector of {self._text} cannot be started: {error}") from error
        finally:
            os.close(me)
        return elector

    def _await(self, elector: subprocess.Popen[bytes], on_wait: Callable[[str], None] | None) -> Elected:
        while (told := _read(elector)) is not None:
            match told:
                case Elected():
                    return told
                case Waits(reason) if on_wait is not None:
                    on_wait(reason)
                case Refused(code, sentence, hint):
                    raise rebuild(code, sentence, hint, {})
                case _:
                    pass
        if self._closed:
            raise SessionClosed(f"the lock {self._text} was closed while it was waited for")
        raise ConnectionLost(f"the elector of {self._text} has ended; its last words are in this engine's log")

    def _watch(self, elector: subprocess.Popen[bytes], until: float) -> None:
        """While the engine serves: tell its log of trouble, and end it if nobody renews its lock any more."""
        late_s, trouble = LATE * parse(self._text).ttl_s, False
        try:
            while (told := _read(elector, until + late_s)) is not None:
                match told:
                    case Renewed(until):
                        if trouble:
                            log.info("the lock %s was renewed again", self._text)
                        trouble = False
                    case Trouble(reason):
                        log.warning("the lock %s could not be renewed: %s", self._text, reason)
                        trouble = True
                    case Over(reason):
                        log.critical("this engine ends: %s", reason)
            fault = "has ended"
        except TimeoutError:
            fault = "does not answer"
        if self._closed:
            elector.wait()
            return
        log.critical("this engine ends: its elector %s, and nobody would renew the lock %s", fault, self._text)
        os.kill(os.getpid(), signal.SIGKILL)


def _read(elector: subprocess.Popen[bytes], until: float = math.inf) -> Told | None:
    """What an elector says next; None if it has ended.

    Raises:
        TimeoutError: It has said nothing until this time of `now`.
    """
    assert elector.stdout is not None
    # In pieces: the time that a machine sleeps is none to a poll. What was said in time is read, however late.
    poll = select.poll()
    poll.register(elector.stdout, select.POLLIN)
    while not poll.poll(1000 * max(0.0, min(1.0, until - now()))):
        if now() >= until:
            raise TimeoutError
    line = elector.stdout.readline()  # the pipe is not buffered, and a line comes whole
    return _TOLD.decode(line) if line else None
