"""Keeps one device server per device alive. A crash of one is restarted alone and touches no other."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_core.allowed import allowed
from gms_core.config import child_environment
from gms_core.devices import HOST, DeviceId
from gms_core.errors import GmsError, ServerUnavailable, VersionMismatch, rebuild
from gms_core.exit_words import how
from gms_core.quotas import Quota, encode_quotas
from gms_core.runtime_dir import prepare, socket_path
from gms_core.server.exit_codes import HANDED_OVER
from gms_core.server.own_keepers import OwnKeepers, discard_store
from gms_core.server.ownership import give_up
from gms_core.service_manager import ServiceManager
from gms_core.stop_signals import stop_signals

log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
KEEP_S = 120.0
"""Seconds for which memory is kept without a server, unless something else is wanted."""
READY_AGAIN_S = 1.0
"""Seconds between two tries to tell the service manager of readiness."""
STOP_S = 5.0
"""Seconds that a device server gets to end by itself."""


@dataclass
class Child:
    """One device server.

    Attributes:
        process: Its process; None between a crash and the restart.
        lifeline: Write end of a pipe that the process watches: it ends when this process does.
        ready: Read end of the pipe on which it reports; None once it has.
        message: What has come on it so far.
        started_at: When it was started last, on the monotonic clock.
        restart_at: When to start it again, on the monotonic clock.
        delay_s: Seconds before the next restart.
        was_ready: Whether clients could ever connect to it.
        failed: Whether it has ended, or could not be started, since the supervisor began.
        not_ours: Whether another supervisor has its device now, or should: a later version has left there what this one cannot take over.
    """

    device: DeviceId
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    lifeline: int = -1
    ready: int | None = None
    message: bytes = b""
    started_at: float = 0.0
    restart_at: float = 0.0
    delay_s: float = FIRST_DELAY_S
    was_ready: bool = False
    failed: bool = False
    not_ours: bool = False


def serve(
    devices: Sequence[DeviceId],
    runtime_dir: Path,
    host_memory: int | None,
    on_ready: Callable[[DeviceId, Path], None],
    *,
    keep_s: float = KEEP_S,
    allow: Sequence[str] = (),
    quotas: Sequence[Quota] = (),
    manager: ServiceManager | None = None,
    stored: bool = False,
) -> int:
    """Run device servers until SIGTERM or SIGINT, or until others have taken over all of their devices.

    Args:
        devices: One server each.
        runtime_dir: Where the sockets are; made if it is not there.
        host_memory: Bytes that the ``host`` device offers.
        on_ready: Called each time that clients can connect to a device's socket.
        keep_s: Seconds for which memory is kept while a device has no server.
        allow: Who may use the servers besides this user and root; see `gms_core.allowed`.
        quotas: What users and pools may have on each device.
        manager: The service manager; it is told when the first of the servers is ready, and when they end.
        stored: Whether this process is the keeper, and the service manager has what it keeps, instead of a process for each device.

    Returns:
        0 once all have ended because they were told to, or were taken over.

    Raises:
        GmsError: The runtime directory is not safe, no device could be served at all, or the service manager was to keep something and does not.
    """
    admitted = allowed(allow)
    directory = prepare(runtime_dir, admitted.files)
    options = [word for one in admitted.words for word in ("--allow", one)] + (["--quotas", encode_quotas(quotas)] if quotas else [])
    manager = manager or ServiceManager()
    keepers = None
    if stored:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one descriptor an allocation, of all devices
        keepers = OwnKeepers(devices, directory, manager)
        options.append("--stored")
    else:
        discard_store(manager)
    with stop_signals((signal.SIGTERM, signal.SIGINT)) as told, contextlib.ExitStack() as children_end:
        children = [Child(device) for device in devices]
        children_end.callback(_stop, children, directory, stored=stored)
        children_end.callback(manager.tell, "STOPPING=1")
        supervisor = _Supervisor(children, directory, host_memory, keep_s, options, on_ready, told, manager, keepers)
        supervisor.run()
    return 0


class _Supervisor:
    def __init__(
        self,
        children: list[Child],
        directory: Path,
        host_memory: int | None,
        keep_s: float,
        options: Sequence[str],
        on_ready: Callable[[DeviceId, Path], None],
        told: socket.socket,
        manager: ServiceManager,
        keepers: OwnKeepers | None,
    ) -> None:
        self._children = children
        self._directory = directory
        self._host_memory = host_memory
        self._keep_s = keep_s
        self._options = options
        self._on_ready = on_ready
        self._told = told
        self._manager = manager
        self._keepers = keepers
        self._has_told = False

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._told, selectors.EVENT_READ)
            for child in self._children:
                self._start(child, selector)
            while True:
                events = selector.select(self._until_next_try())
                for key, _ in events:
                    if key.fileobj is self._told:
                        return
                    child, kind = key.data
                    if kind == "ready":
                        self._read_ready(child, selector)
                    else:
                        self._ended(child, selector)
                self._tell_when_ready()
                if all(child.not_ours for child in self._children):
                    return
                for child in self._children:
                    if child.process is None and not child.not_ours and child.restart_at <= time.monotonic():
                        self._start(child, selector)

    def _tell_when_ready(self) -> None:
        """Tell the service manager, until it could be told, that a device can be served: another one that hangs must not take that down."""
        if self._is_ready and not self._has_told:
            self._has_told = self._manager.tell("READY=1")

    @property
    def _is_ready(self) -> bool:
        return any(child.was_ready for child in self._children)

    def _until_next_try(self) -> float | None:
        waits = [child.restart_at - time.monotonic() for child in self._children if child.process is None and not child.not_ours]
        waits += [READY_AGAIN_S] if self._is_ready and not self._has_told else []
        return max(0.0, min(waits)) if waits else None

    def _start(self, child: Child, selector: selectors.BaseSelector) -> None:
        try:
            if self._keepers is not None:
                self._keepers.begin(child.device)
        except GmsError as error:  # another server still ends, or there is no room: the other devices must be served
            child.started_at = time.monotonic()
            self._try_later(child, error)
            return
        child.started_at = time.monotonic()
        lifeline, child.lifeline = os.pipe()
        child.ready, ready = os.pipe()
        command = [sys.executable, "-P", "-m", "gms_core.server", "--device", child.device, "--runtime-dir", os.fspath(self._directory)]
        command += ["--lifeline", str(lifeline), "--ready", str(ready), "--keep", str(self._keep_s), *self._options]
        if self._host_memory is not None:
            command += ["--host-memory", str(self._host_memory)]
        try:
            child.process = subprocess.Popen(
                command, pass_fds=(lifeline, ready), stdin=subprocess.DEVNULL, start_new_session=True, env=_environment(child.device)
            )
        except OSError as error:  # no more processes, or Python is being replaced: the other servers must live
            os.close(child.lifeline)
            os.close(child.ready)
            child.ready = None
            self._try_later(child, ServerUnavailable(f"the device server of {child.device} cannot be started: {error}"))
            return
        finally:
            os.close(lifeline)
            os.close(ready)
        child.pidfd = os.pidfd_open(child.process.pid)
        child.message = b""
        selector.register(child.ready, selectors.EVENT_READ, (child, "ready"))
        selector.register(child.pidfd, selectors.EVENT_READ, (child, "ended"))

    def _read_ready(self, child: Child, selector: selectors.BaseSelector) -> None:
        if child.ready is None:
            return
        piece = os.read(child.ready, 4096)
        child.message += piece
        if piece:
            return
        selector.unregister(child.ready)
        os.close(child.ready)
        child.ready = None
        if child.message == b"ready\n":
            child.was_ready = True
            self._on_ready(child.device, socket_path(child.device, self._directory))

    def _ended(self, child: Child, selector: selectors.BaseSelector) -> None:
        while child.ready is not None:
            self._read_ready(child, selector)
        selector.unregister(child.pidfd)
        code = _reap(child)
        if code == HANDED_OVER:
            log.info("another server has taken %s over", child.device)
            child.not_ours = True
            return
        error = _failure(child, code)
        child.not_ours = isinstance(error, VersionMismatch)
        self._try_later(child, error)

    def _try_later(self, child: Child, error: GmsError) -> None:
        child.failed = True
        if time.monotonic() - child.started_at > LONGEST_DELAY_S:  # one that dies as soon as it is ready is not started again at full speed
            child.delay_s = FIRST_DELAY_S
        if all(other.failed and not other.was_ready for other in self._children):
            raise error
        if child.not_ours:
            log.error("%s", error)
            return
        log.error("%s; starting it again in %.1f s", error, child.delay_s)
        child.restart_at = time.monotonic() + child.delay_s
        child.delay_s = min(2 * child.delay_s, LONGEST_DELAY_S)


def _environment(device: DeviceId) -> dict[str, str]:
    """A device server sees its own device alone: CUDA starts faster, and a MIG instance can be seen in no other way."""
    return child_environment() if device == HOST else child_environment(CUDA_VISIBLE_DEVICES=device)


def _failure(child: Child, code: int) -> GmsError:
    if child.message.startswith(b"["):
        code_of_error, message, hint = json.loads(child.message)
        return rebuild(code_of_error, message, hint, {})
    return ServerUnavailable(f"the device server of {child.device} {how(code)}")


def _reap(child: Child) -> int:
    code = child.process.wait() if child.process is not None else 0
    child.process = None
    os.close(child.pidfd)
    os.close(child.lifeline)
    return code


def _stop(children: Sequence[Child], directory: Path, *, stored: bool) -> None:
    """End all device servers: politely, then by SIGKILL. What is left by those that could not end so is given up, unless systemd decides that."""
    running = [child for child in children if child.process is not None]
    for child in running:
        if child.process is not None:
            child.process.terminate()
    deadline = time.monotonic() + STOP_S
    for child in running:
        if child.process is not None:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
        child.not_ours = _reap(child) == HANDED_OVER
        if child.ready is not None:
            os.close(child.ready)
            child.ready = None
    for child in children:
        if not child.not_ours and not stored:
            give_up(socket_path(child.device, directory))
