"""Fencing by proof: ends the processes of a cohort, and knows that they are gone when the kernel says so.

The rules are in `gms_core.server.cohorts`; here are the pidfds, the signals and the clocks. A pidfd names one process for ever, so no signal can hit
another one that got its number; it becomes readable when all threads of the process have exited, which is later than the last thing that it can do,
on a device too (measured: a file lock is released before that, and proves nothing).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gms_core import death_notice
from gms_core.errors import FenceFailed, GmsError, PermissionRefused, QuotaExceeded
from gms_core.events import Kind
from gms_core.protocol.messages import Join
from gms_core.protocol.peer import open_process
from gms_core.server.cohorts import CohortEffect, Cohorts, Gone, Kill, Member
from gms_core.server.effects import SessionId
from gms_core.server.limits import Limits
from gms_core.server.observer import Tell
from gms_core.server.sessions import Session

log = logging.getLogger(__name__)

SECOND_LOOK_S = 0.05
"""A deadline that has passed is looked at once more after so long: this server may have been what was late, and a beat may be waiting to be read."""


@dataclass
class Watched:
    """What is held of a member: the pidfd, the page for the notice of its death, that notice, and the clock of its deadline."""

    cohort: str
    pidfd: int
    page: int | None
    deadline_s: float
    beat: float
    notice: death_notice.Notice | None = None
    clock: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Let all of it go."""
        asyncio.get_running_loop().remove_reader(self.pidfd)
        os.close(self.pidfd)
        if self.page is not None:
            os.close(self.page)
        if self.notice is not None:
            self.notice.end()
        if self.clock is not None:
            self.clock.cancel()


class Fencer:
    """Carries out what the cohorts decide.

    Args:
        cohorts: The rules.
        limits: How long an exit may take.
        apply: Carries out the other effects, `Gone` among them.
        ending: Called with a cohort, its engine and the reason as soon as it is being ended.
        exited: Called with a session as soon as its process has exited.
        failed: Called with a cohort and the error when it could not be ended, and whether that is final: it is not while its processes are only late.
        tell: Is told of what happens.
    """

    def __init__(
        self,
        cohorts: Cohorts,
        limits: Limits,
        *,
        apply: Callable[[list[CohortEffect]], None],
        ending: Callable[[str, str, str], None],
        exited: Callable[[SessionId], None],
        failed: Callable[[str, GmsError, bool], None],
        tell: Tell,
    ) -> None:
        self._cohorts = cohorts
        self._limits = limits
        self._apply_rest = apply
        self._ending = ending
        self._exited = exited
        self._failed = failed
        self._tell = tell
        self._watched: dict[SessionId, Watched] = {}
        self._clocks: dict[str, asyncio.TimerHandle] = {}

    def join(self, session: Session, request: Join) -> int | None:
        """Watch a process that joins; returns the descriptor, which stays the fencer's, of a page for the notice of its death.

        Raises:
            PermissionRefused: The process cannot be watched or ended from here.
            QuotaExceeded: The server can open no more files.
            CohortFenced, LeaseConflict: As `Cohorts.join` says.
        """
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            try:
                pidfd = _open(session)
                undo.callback(os.close, pidfd)
                page = death_notice.create()
                if page is not None:
                    undo.callback(os.close, page)
                loop.add_reader(pidfd, self._has_exited, session.id)
                undo.callback(loop.remove_reader, pidfd)
            except OSError as error:
                raise QuotaExceeded(f"the server cannot watch one more process: {error.strerror}", hint=_MORE_FILES) from error
            member = Member(
                session.id,
                session.peer.pid,
                request.process,
                time.monotonic(),
                request.serves,
                deadline_s=request.deadline_s,
                started=session.started,
            )
            self._cohorts.join(request.cohort, request.engine, member)  # last: a member that nobody watches could never be gone
            undo.pop_all()
        self._watched[session.id] = Watched(request.cohort, pidfd, page, request.deadline_s, time.monotonic())
        self._wind(session.id)
        self._tell(Kind.ENGINE_JOINED, request.engine, cohort=request.cohort, process=request.process, pid=session.peer.pid)
        return page

    def resume(self) -> None:
        """Watch the members of the cohorts that were taken over from the server before, and go on with what it had begun.

        A deadline runs from the moment at which its session is back, see `came_back`: before that nobody can give a sign of progress.
        """
        loop = asyncio.get_running_loop()
        exited: list[tuple[str, Member]] = []
        for cohort in list(self._cohorts.by_name.values()):
            for member in cohort.members.values():
                if member.exited:
                    continue
                try:
                    pidfd = open_process(member.pid, member.started)
                except ProcessLookupError:
                    exited.append((cohort.name, member))
                    continue
                watched = self._watched[member.session] = Watched(cohort.name, pidfd, None, member.deadline_s, time.monotonic())
                loop.add_reader(watched.pidfd, self._has_exited, member.session)
            if cohort.state == "departing":
                self._await_departure(cohort.name, max(0.0, cohort.ends_by - time.monotonic()))
            elif cohort.state == "fencing":
                living = tuple(member.session for member in cohort.members.values() if member.session in self._watched)
                self._kill(Kill(cohort.name, cohort.engine, living, cohort.reason))
        for name, member in exited:
            self._tell_exit(name, member)
            effects = self._cohorts.exited(name, member.session)
            self._exited(member.session)
            self.apply(effects)

    def came_back(self, session: SessionId) -> None:
        """A session that was taken over is there again: if it has a deadline, that runs from now on."""
        self.beat(session)
        self._wind(session)

    def forget(self, session: SessionId) -> None:
        """Watch a session no more whose process is watched through another one."""
        if (watched := self._watched.pop(session, None)) is not None:
            watched.close()

    def expect_notice(self, session: SessionId) -> None:
        """The kernel will give notice of a member's death in its page: wait for that, if there can be a thread for it. Idempotent."""
        watched = self._watched.get(session)
        if watched is None or watched.page is None:
            return
        loop, page = asyncio.get_running_loop(), watched.page
        watched.page = None
        try:
            notice = watched.notice = death_notice.Notice(page)

            def watch() -> None:
                if notice.wait():
                    with contextlib.suppress(RuntimeError):  # the server has stopped
                        loop.call_soon_threadsafe(self._noticed, session)

            threading.Thread(target=watch, name=f"gms-notice-{session}", daemon=True).start()
        except (OSError, RuntimeError) as error:
            log.warning("cohort %s: no notice of a death is awaited, its exit is: %s", watched.cohort, str(error))
        finally:
            os.close(page)

    def _noticed(self, session: SessionId) -> None:
        if (watched := self._watched.get(session)) is not None:
            self.apply(self._cohorts.dying(watched.cohort, session))

    def beat(self, session: SessionId) -> None:
        """The session's process makes progress."""
        if session in self._watched:
            self._watched[session].beat = time.monotonic()

    def silent_s(self, session: SessionId) -> float:
        """Seconds since the last beat of a session with a deadline; -1 without one."""
        watched = self._watched.get(session)
        return time.monotonic() - watched.beat if watched is not None and watched.deadline_s else -1.0

    def depart(self, session: SessionId, grace_s: float) -> None:
        """The session's cohort ends by itself, within so many seconds."""
        before = self._cohorts.joined(session)
        if before is not None and before.state == "departing":
            return  # said before
        cohort = self._cohorts.depart(session)
        cohort.ends_by = time.monotonic() + grace_s
        self._tell(Kind.ENGINE_DEPARTING, cohort.engine, cohort=cohort.name, seconds=grace_s)
        self._ending(cohort.name, cohort.engine, f"{cohort.engine} is ending in an orderly way")
        self._await_departure(cohort.name, grace_s)

    def _await_departure(self, cohort: str, grace_s: float) -> None:
        self._after(cohort, grace_s, lambda: self.apply(self._cohorts.fence(cohort, f"its orderly end took longer than {grace_s:g} s")))

    def lost(self, session: SessionId) -> None:
        """A session's connection has ended."""
        self.apply(self._cohorts.lost(session))

    def apply(self, effects: list[CohortEffect]) -> None:
        """Carry out effects of the cohorts."""
        for effect in effects:
            if isinstance(effect, Kill):
                self._kill(effect)
            elif isinstance(effect, Gone):
                if (clock := self._clocks.pop(effect.cohort, None)) is not None:
                    clock.cancel()
                self._apply_rest([effect])
            else:
                self._apply_rest([effect])

    def _kill(self, kill: Kill) -> None:
        self._tell(Kind.ENGINE_FENCED, kill.engine, cohort=kill.cohort, reason=kill.reason)
        refused = []
        for session in kill.members:
            if session not in self._watched:
                continue  # it has exited while there was no server: that is told next
            try:
                signal.pidfd_send_signal(self._watched[session].pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # its exit is about to be reported
            except OSError as error:
                refused.append(f"{self._process(kill.cohort, session)}: {error.strerror}")
        self._ending(kill.cohort, kill.engine, f"{kill.engine} is being ended ({kill.reason})")
        if refused:
            self._refused(kill.cohort, f"processes of {kill.engine} cannot be ended: {'; '.join(refused)}")
        else:
            self._after(kill.cohort, self._limits.exit_s, lambda: self._overdue(kill.cohort))

    def _refused(self, cohort: str, message: str) -> None:
        self._fail(cohort, message, final=True)
        self._after(cohort, self._limits.exit_s, lambda: self._refused(cohort, message))  # whoever asks meanwhile is told as well

    def _overdue(self, cohort: str) -> None:
        left = [self._process(cohort, member.session) for member in self._cohorts.by_name[cohort].members.values() if not member.exited]
        self._fail(cohort, f"killed processes have not exited after {self._limits.exit_s:g} s: {', '.join(left)}", final=False)
        self._after(cohort, self._limits.exit_s, lambda: self._overdue(cohort))

    def _fail(self, cohort: str, message: str, *, final: bool) -> None:
        error = FenceFailed(message, hint="The memory is granted once they have exited. A process that waits for a driver may need a reboot.")
        self._tell(Kind.ENGINE_FENCE_FAILED, self._cohorts.by_name[cohort].engine, cohort=cohort, reason=message[:LONGEST_REASON])
        self._failed(cohort, error, final)

    def _process(self, cohort: str, session: SessionId) -> str:
        member = self._cohorts.by_name[cohort].members[session]
        return f"{member.process} (pid {member.pid})"

    def _has_exited(self, session: SessionId) -> None:
        watched = self._watched.pop(session)
        watched.close()
        self._tell_exit(watched.cohort, self._cohorts.by_name[watched.cohort].members[session])
        effects = self._cohorts.exited(watched.cohort, session)
        self._exited(session)
        self.apply(effects)

    def _tell_exit(self, cohort: str, member: Member) -> None:
        self._tell(Kind.ENGINE_PROCESS_EXITED, self._cohorts.by_name[cohort].engine, cohort=cohort, process=member.process, pid=member.pid)

    def _after(self, cohort: str, seconds: float, then: Callable[[], None]) -> None:
        if (clock := self._clocks.pop(cohort, None)) is not None:
            clock.cancel()
        self._clocks[cohort] = asyncio.get_running_loop().call_later(seconds, then)

    def _wind(self, session: SessionId) -> None:
        """Start the clock of a session's deadline anew, from its last beat."""
        watched = self._watched.get(session)
        if watched is None or not watched.deadline_s:
            return
        rest = watched.beat + watched.deadline_s - time.monotonic()
        loop = asyncio.get_running_loop()
        if rest > 0:
            watched.clock = loop.call_later(rest, self._wind, session)
        else:
            watched.clock = loop.call_later(SECOND_LOOK_S, self._look_again, session)

    def _look_again(self, session: SessionId) -> None:
        watched = self._watched.get(session)
        if watched is None:
            return
        if time.monotonic() - watched.beat < watched.deadline_s:
            self._wind(session)
            return
        if self._cohorts.by_name[watched.cohort].state == "departing":
            return  # its orderly end has a time limit of its own, and what ends gives no signs of progress
        process = self._process(watched.cohort, session)
        self.apply(self._cohorts.fence(watched.cohort, f"its {process} gave no sign of progress for {watched.deadline_s:g} s"))

    def close(self) -> None:
        """Watch nothing any more. Nobody is killed."""
        for clock in self._clocks.values():
            clock.cancel()
        for watched in self._watched.values():
            watched.close()
        self._watched.clear()


def _open(session: Session) -> int:
    try:
        pidfd = session.open_pidfd()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise PermissionRefused(f"the process behind this connection cannot be watched: {error.strerror}", hint=_SAME_PIDS) from error
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        os.close(pidfd)
        raise PermissionRefused(f"the process behind this connection could not be ended from here: {error.strerror}", hint=_SAME_PIDS) from error
    return pidfd


LONGEST_REASON = 1024
"""Characters of an event that says why a cohort could not be ended: it names its processes, of which there can be many."""
_SAME_PIDS = "Server and engines have to share a PID namespace, and the server has to run as the engines' user or as root."
_MORE_FILES = "Raise the server's limit of open files (ulimit -n)."
