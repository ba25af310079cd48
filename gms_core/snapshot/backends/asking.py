"""Questions to a library that may hang, crash or print, asked in a process of their own that has a deadline.

Whoever answers is a module that is run as ``python -m``, and calls `answer` with a function.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec

from gms_core.errors import GmsError
from gms_core.exit_words import how
from gms_core.snapshot.transfer import Probe

DEADLINE_S = 20.0
"""Seconds for an answer. A library that is read from a slow disk needs some."""
_KILLED_S = 2.0
_PR_SET_PDEATHSIG = 1


class _Answer(msgspec.Struct, frozen=True):
    usable: bool
    reason: str


def ask(module: str, *words: str, about: str, deadline_s: float | None = None) -> Probe:
    """Ask whether something can be used here.

    Args:
        module: Of the process that is asked.
        words: Its arguments.
        about: What is tried, for the reason.
        deadline_s: Seconds for an answer; None for `DEADLINE_S`.
    """
    patience = DEADLINE_S if deadline_s is None else deadline_s
    try:
        asked = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        return Probe(False, f"{about} cannot be tried: {error.strerror}")
    try:
        told, complaints = asked.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        _kill(asked)
        return Probe(False, f"{about} has not come back after {patience:g} seconds")
    except BaseException:
        _kill(asked)
        raise
    try:
        answered = msgspec.json.decode(told, type=_Answer)
    except msgspec.DecodeError:
        last = complaints.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        return Probe(False, f"{about} cannot be tried: the process that tried {how(asked.returncode)}{': ' if last else ''}{last}")
    return Probe(answered.usable, answered.reason)


def _kill(asked: subprocess.Popen[bytes]) -> None:
    """End a process, of which nothing is kept."""
    asked.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the kernel: then it is left to that
        asked.communicate(timeout=_KILLED_S)
    for pipe in (asked.stdout, asked.stderr):
        if pipe is not None:
            pipe.close()


def answer(find_out: Callable[[], Probe]) -> NoReturn:
    """Answer whoever has started this process, and end: at once, since libraries may crash or hang on the way through the interpreter's end.

    Args:
        find_out: Tries it. What it raises is a reason why it cannot be used.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # who has asked waits for the answer, in the thread that has started this
    telling = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        found = find_out()
    except GmsError as error:
        found = Probe(False, f"{error.message}{'. ' if error.hint else ''}{error.hint}")
    os.write(telling, msgspec.json.encode(_Answer(*found)))
    while True:
        os.kill(os.getpid(), signal.SIGKILL)
