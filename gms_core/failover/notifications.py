"""Tells plugins of changes of role, a command and a webhook among them. A failure is logged, and never keeps an engine from serving."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import msgspec

from gms_core import __version__
from gms_core.config import child_environment
from gms_core.failover.deliveries import Deliveries
from gms_core.failover.status import EngineState, RoleChange
from gms_core.plugins.hookspecs import hookimpl
from gms_core.plugins.loading import Plugins, load_installed, without_plugins

log = logging.getLogger(__name__)

COMMAND_S = 60.0
"""Seconds that a command may take."""
KILL_S = 5.0
"""Seconds that a killed command may take to be gone."""
POST_S = 5.0
"""Seconds that one attempt to post may take."""
PAUSES_S = (0.5, 2.0, 5.0)
"""Seconds between the attempts to post."""
SHOWN = 500
"""Bytes of a failed command's output that are logged."""


class Command:
    """The ready-made user of `gms_role_changed` that runs a command once its engine serves."""

    def __init__(self, command: tuple[str, ...], timeout_s: float = COMMAND_S) -> None:
        """Prepare.

        Args:
            command: Program and arguments; no shell is involved.
            timeout_s: Seconds after which it is killed, and whatever it has started in its process group.
        """
        self._command = command
        self._timeout_s = timeout_s
        self.deliveries = Deliveries("gms-command", self._run)

    @hookimpl
    def gms_role_changed(self, change: RoleChange) -> None:
        """Run the command if the engine is the primary now."""
        if change.role == "primary":
            self.deliveries.put(change)

    def _run(self, change: RoleChange) -> None:
        program, environment = self._command[0], child_environment(**facts(change))
        # A file takes its output, not a pipe: something that the command leaves running may keep it open.
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
                )
            except OSError as error:
                log.error("the command %s cannot be run: %s", program, error.strerror)
                return
            try:
                process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                _kill_group(process)
                log.error("the command %s did not end within %g s and was killed", program, self._timeout_s)
                return
            output.seek(max(0, output.seek(0, os.SEEK_END) - SHOWN))
            said = output.read().decode(errors="replace").strip()
        if process.returncode:
            log.error("the command %s ended with %d: %s", program, process.returncode, said)
        else:
            log.info("the command %s was told that %s serves", program, change.engine)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):  # one that has become another user cannot be killed, and is left alone
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_S)


class Webhook:
    """The ready-made user of `gms_role_changed` that posts each change as JSON."""

    def __init__(self, url: str, timeout_s: float = POST_S, pauses_s: tuple[float, ...] = PAUSES_S) -> None:
        """Prepare.

        Args:
            url: Where to post; ``http`` or ``https``.
            timeout_s: Seconds that one attempt may take.
            pauses_s: Seconds between the attempts; there is one more than these.
        """
        self._url, self._shown = url, _without_secrets(url)
        self._timeout_s = timeout_s
        self._pauses_s = pauses_s
        self.deliveries = Deliveries("gms-webhook", self._post)

    @hookimpl
    def gms_role_changed(self, change: RoleChange) -> None:
        """Post the change."""
        self.deliveries.put(change)

    def _post(self, change: RoleChange) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": f"gms/{__version__}"}
        request = urllib.request.Request(self._url, msgspec.json.encode(change), headers, method="POST")  # noqa: S310 - the configuration lets http(s) only
        for pause_s in (*self._pauses_s, None):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s):  # noqa: S310 - as above
                    return
            except (OSError, http.client.HTTPException) as error:
                log.warning("%s was not told that %s is %s: %s", self._shown, change.engine, change.role, _reason(error))
            if pause_s is not None:
                time.sleep(pause_s)
        log.error("%s was not told that %s is %s; it is not tried again", self._shown, change.engine, change.role)


def _without_secrets(url: str) -> str:
    """Scheme and host of a URL: its path or its query is often all that one needs to post there."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split(r'[/?#]', rest, maxsplit=1)[0].rpartition('@')[2]}"


def _reason(error: OSError | http.client.HTTPException) -> object:
    """What went wrong, without the URL, which errors of its form and of redirections quote."""
    if isinstance(error, urllib.error.HTTPError):
        return f"it answered {error.code}"
    if isinstance(error, http.client.InvalidURL):
        return "its URL is invalid"
    return getattr(error, "reason", None) or error


def facts(change: RoleChange) -> dict[str, str]:
    """A change of role as variables of a command's environment. ``GMS_EPOCH`` is the highest of all retained pools."""
    return {
        "GMS_ROLE": change.role,
        "GMS_ENGINE": change.engine,
        "GMS_COHORT": change.cohort,
        "GMS_TERM": str(change.term),
        "GMS_EPOCH": str(max(change.epochs.values(), default=0)),
        "GMS_ADDRESS": change.address,
    }


class Notifier:
    """Delivers the changes of an engine's role, in order, in daemon threads.

    That the engine is the primary is told only once its gate is open; all else at once.
    """

    def __init__(self, state: EngineState, *, on_promoted: tuple[str, ...] | None = None, webhook: str | None = None) -> None:
        """Listen to a state from now on.

        Args:
            state: The engine's.
            on_promoted: Command that is run, without a shell, once the engine serves. Its environment has ``GMS_ROLE``, ``GMS_ENGINE``,
                ``GMS_COHORT``, ``GMS_TERM``, ``GMS_EPOCH`` and ``GMS_ADDRESS``.
            webhook: URL to which each change of role is posted as JSON.
        """
        self._state = state
        self._held: RoleChange | None = None
        self._plugins: Plugins | None = None
        self._own: list[Command | Webhook] = [
            *([Command(on_promoted)] if on_promoted else []),
            *([Webhook(webhook)] if webhook else []),
        ]
        self._deliveries = Deliveries("gms-notify", self._tell)
        state.listen(self._changed)

    def gate_opened(self) -> None:
        """The engine can be reached now: tell that it is the primary. Nothing if it is not, or if that was told already."""
        held, self._held = self._held, None
        if held is not None and self._state.role == "primary":
            self._deliveries.put(held)

    def close(self, timeout_s: float) -> None:
        """Wait until what happened so far is delivered, for so many seconds at most; what happens from now on is not."""
        until = time.monotonic() + timeout_s
        for deliveries in (self._deliveries, *(own.deliveries for own in self._own)):
            deliveries.close(max(0.0, until - time.monotonic()))

    def _changed(self, change: RoleChange) -> None:
        if change.role == "primary":
            self._held = change
        else:
            self._deliveries.put(change)

    def _tell(self, change: RoleChange) -> None:
        plugins = self._loaded()
        broken = len(plugins.broken)
        plugins.notify("gms_role_changed", change=change)
        for error in plugins.broken[broken:]:
            log.error("a plugin was not told that %s is %s: %s", change.engine, change.role, error)

    def _loaded(self) -> Plugins:
        """Installed plugins and the ready-made ones; loaded in the thread that calls them, which keeps an engine's start free of them."""
        if self._plugins is None:
            self._plugins = without_plugins()
            for own in self._own:
                self._plugins.manager.register(own, type(own).__name__.lower())
            load_installed(self._plugins)
            for error in self._plugins.broken:
                log.error("%s", error)
        return self._plugins
