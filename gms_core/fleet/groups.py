"""A command and all that it starts, in a session of its own: started with a log, watched, and ended to the last process."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import select
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gms_core.errors import EngineFailed

TAIL_BYTES = 4096
_SECRETS = re.compile(r"(?<![\w-])(--(?:(?:admin[-_])?api[-_]k|hf[-_]t|ssl[-_]keyfile[-_]p)[\w-]*)(?:(=)\S*|(\s+)[^-\s]\S*(?:\s+[^-\s]\S*)*)")
"""Engines' options for keys, tokens and passwords, abbreviated or not, and their values: several keys may follow one option."""


class _Stat(NamedTuple):
    state: str
    session: int
    threads: int


class Group:
    """A running command. Whatever it starts stays in its session, unless it leaves it on purpose.

    The first process is not reaped before the others are gone: until then the kernel gives its number to nobody else, so no signal can ever reach a
    stranger.

    Attributes:
        pid: Of the first process, and the number of its process group and session.
        pidfd: Readable once the first process has exited.
        log: File that has the output of all of them.
        started_at: On the monotonic clock.
        asked: Whether it was told to end.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, heading: str) -> None:
        """Start a command.

        Args:
            command: Program and arguments.
            environment: All of it.
            log: Its output is appended there. If it has to be made, it is the user's alone.
            heading: Line that is written to the log first, less the values of options that are secret.

        Raises:
            EngineFailed: The log cannot be written, or the command cannot be started.
        """
        self.log = log
        self.started_at = time.monotonic()
        self._deadline = 0.0
        self.asked = False
        self._told_rest = False
        self._killed_at = math.inf
        with contextlib.ExitStack() as stack:
            try:
                output = stack.enter_context(open(log, "ab", buffering=0, opener=_for_the_owner))  # without a buffer, closing it cannot fail
                output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {_without_secrets(heading)}\n".encode())
            except OSError as error:
                hint = "Make room there, or name another directory with --log-dir."
                raise EngineFailed(f"the log {log} cannot be written: {error.strerror}", hint=hint) from error
            try:
                self._process = subprocess.Popen(
                    list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
                )
                self.pid = self._process.pid
                self.pidfd = _descriptor_of(self._process)
            except OSError as error:
                raise EngineFailed(f"{command[0]} cannot be started: {error.strerror}", hint=f"The log is {log}.") from error

    @property
    def first_has_exited(self) -> bool:
        """Whether the first process has ended."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    @property
    def killed_for_s(self) -> float:
        """Seconds since it was first killed; 0 or less if it was not."""
        return time.monotonic() - self._killed_at

    def living(self) -> list[int]:
        """Processes of the session that have not exited."""
        numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [number for number in numbers if self._is_living(number)]

    def _is_living(self, pid: int) -> bool:
        if pid == self.pid:
            return not self.first_has_exited
        found = _stat(pid)
        # A process whose first thread has ended is shown as a zombie while its other threads still run.
        return found is not None and found.session == self.pid and (found.state not in "ZX" or found.threads > 1)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every process of the session."""
        if number is signal.SIGKILL:
            self._killed_at = min(self._killed_at, time.monotonic())
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):  # it has exited meanwhile
                target = os.pidfd_open(pid)
                try:
                    if self._is_living(pid):  # still the same process, now that the descriptor pins it
                        signal.pidfd_send_signal(target, number)
                finally:
                    os.close(target)

    def ask_to_end(self, patience_s: float) -> None:
        """Begin to end it politely: its first process is asked, as it knows best in which order to end the others; see `settle`."""
        self.asked, self._deadline = True, time.monotonic() + patience_s
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def end(self, patience_s: float) -> int:
        """End it politely, and come back when every process is gone; returns the first one's exit code."""
        self.ask_to_end(patience_s)
        while not self.settle():
            time.sleep(0.02)
        return self.reap()

    def kill(self) -> None:
        """End all of it at once; see `settle`."""
        self.asked, self._deadline = True, time.monotonic()
        self.send(signal.SIGKILL)

    def settle(self) -> bool:
        """Take the next step towards its end, once its first process has exited or was asked to; call it again and again.

        What a first process leaves behind is asked to end too if that one had been asked, and is killed if it died by itself. Whatever outlasts the
        patience is killed.

        Returns:
            Whether every process is gone.
        """
        living = self.living()
        if not living:
            return True
        if time.monotonic() >= self._deadline and (self.asked or self.first_has_exited):
            self.send(signal.SIGKILL)
        elif self.first_has_exited and not self._told_rest:
            self._told_rest = True
            self.send(signal.SIGTERM)
        return False

    def reap(self) -> int:
        """Forget it, once every process is gone; returns the first one's exit code, as `subprocess` counts."""
        code = self._process.wait()
        os.close(self.pidfd)
        return code


def session_of(pid: int) -> int | None:
    """The session of a process; None if there is no such process here."""
    found = _stat(pid)
    return None if found is None else found.session


def last_line(log: Path, begin: str = "", after: int = 0) -> str:
    """The last line at the end of a log that says anything; empty if there is none.

    Args:
        log: The file.
        begin: Only of lines that begin so.
        after: Only of what is behind so many bytes.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(after, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line and line.startswith(begin)), "")


def _without_secrets(heading: str) -> str:
    return _SECRETS.sub(r"\1\2\3***", heading)


def _for_the_owner(path: str, flags: int) -> int:
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)  # in a directory of others a name may be a trap
    if stat.S_ISFIFO(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is a pipe")
    return file


def _descriptor_of(process: subprocess.Popen[bytes]) -> int:
    """A descriptor of a process that was just started; without one it is ended again."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[3]), int(fields[17]))
