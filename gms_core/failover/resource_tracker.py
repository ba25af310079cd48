"""Python's resource tracker of an engine, kept alive where its process group is killed.

The tracker is the process that removes names of shared memory and semaphores (/dev/shm) whose users have died. It sees their death as the end of a
pipe, removes the names and ends. As a member of the engine's process group it dies with the rest, and the names stay until the next boot.
"""

from __future__ import annotations

import multiprocessing.util
import threading
from collections.abc import Sequence
from multiprocessing import resource_tracker
from typing import Any

_guard = threading.Lock()
_CODE = "-c"


def start_apart() -> None:
    """Start the tracker of this process and of those that it will start, in a session of its own. One that runs already stays as it is."""
    with _guard:
        util: Any = multiprocessing.util
        spawn = util.spawnv_passfds

        def spawn_apart(path: Any, arguments: Sequence[Any], descriptors: Any) -> Any:
            return spawn(path, _in_own_session(arguments), descriptors)

        util.spawnv_passfds = spawn_apart
        try:
            resource_tracker.ensure_running()
        finally:
            util.spawnv_passfds = spawn


def _in_own_session(arguments: Sequence[Any]) -> list[Any]:
    """The tracker's command line, with a system call before its code. One that has no code is not known, and stays as it is."""
    found = list(arguments)
    if _CODE in found[:-1]:
        place = found.index(_CODE) + 1
        found[place] = f"import os; os.setsid(); {found[place]}"
    return found
