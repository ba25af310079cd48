"""A process of an engine that outlives the one that started it holds memory for nobody: it ends with it.

`PR_SET_PDEATHSIG` cannot be used: it is the death of the starting *thread* that it tells, and engines start processes from threads that end.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

_guard = threading.Lock()
_armed_in = 0
"""The process that was armed; a forked child has this variable, but not its parent's threads."""
_forks_end_with = 0
"""The process with which those end that it forks; 0 for none."""


def end_with_parent() -> bool:
    """From now on, end this process with SIGKILL when the process that started it through `multiprocessing` has ended, in whatever way.

    Idempotent. If that process has ended already, this one ends at once.

    Returns:
        Whether there is such a process.
    """
    global _armed_in
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    with _guard:
        if _armed_in != os.getpid():
            _armed_in = os.getpid()
            threading.Thread(target=_end_after, args=(parent.sentinel,), name="gms-parent-death", daemon=True).start()
    return True


def end_forks_with_this() -> None:
    """From now on, end every process that this one forks, and those that they fork, with SIGKILL when the one that forked them has ended. Idempotent.

    What was forked keeps the connections of its parent open, so that clients of an engine that was killed would wait for ever.
    Programs that are executed (`subprocess`) are none of these.
    """
    global _forks_end_with
    _forks_end_with = os.getpid()


def _after_fork() -> None:
    global _forks_end_with
    if not _forks_end_with:
        return
    parent, _forks_end_with = _forks_end_with, os.getpid()
    try:
        ended = os.pidfd_open(parent)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    if os.getppid() != parent:  # it had ended before, and its number may be another's now
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_end_after, args=(ended,), name="gms-parent-death", daemon=True).start()


os.register_at_fork(after_in_child=_after_fork)


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
