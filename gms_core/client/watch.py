"""Notices that a server has gone while nobody asks it anything: a lease that is only held has to be resumed, too."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref
from typing import Protocol


class Watched(Protocol):
    """A session, as far as it is watched."""

    def revive(self) -> None:
        """The server has closed the connection: find the next one, if no request does so already."""


class Watch:
    """One daemon thread that waits for the ends of connections; each one is dealt with in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._watched: dict[int, weakref.ref[Watched]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.POLLIN)
        threading.Thread(target=self._run, name="gms-watch", daemon=True).start()

    def add(self, descriptor: int, session: Watched) -> None:
        """Watch a session's socket until `remove`."""
        with self._lock:
            self._watched[descriptor] = weakref.ref(session)
            self._poll.register(descriptor, select.POLLRDHUP)
        os.eventfd_write(self._wake, 1)

    def remove(self, descriptor: int) -> None:
        """Watch it no more; to be called before it is closed. Idempotent."""
        with self._lock:
            if self._watched.pop(descriptor, None) is not None:
                self._poll.unregister(descriptor)

    def forget(self) -> None:
        """In a forked child, which does not have the thread: close what is open."""
        os.close(self._wake)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    continue
                with self._lock:
                    reference = self._watched.pop(descriptor, None)
                    if reference is not None:
                        self._poll.unregister(descriptor)
                _revive(reference)


def _revive(reference: weakref.ref[Watched] | None) -> None:
    """Deal with a session that has lost its connection, if there still is one: this thread must not keep it alive."""
    if reference is not None and (session := reference()) is not None:
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            threading.Thread(target=session.revive, name="gms-revive", daemon=True).start()


_watch: Watch | None = None
_guard = threading.Lock()


def watch() -> Watch:
    """The one of this process."""
    global _watch
    with _guard:
        if _watch is None:
            _watch = Watch()
        return _watch


def _after_fork() -> None:
    """The child has no such thread, and none of its sessions."""
    global _watch, _guard
    if _watch is not None:
        _watch.forget()
    _watch, _guard = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
