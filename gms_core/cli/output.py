"""Output that cannot be written, because the disk is full or the reader has gone."""

from __future__ import annotations

import os
import sys
import traceback

WRITERS = ("click", "rich")
"""Packages that write the output, and nothing else."""


def is_of_the_output(error: OSError) -> bool:
    """Whether an error that was caught comes from writing output: it has neither a file's name nor a number that would tell."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in WRITERS


def drop_what_cannot_be_written() -> None:
    """Drop what standard output holds if it cannot be written: Python tries again when it ends, and makes an exit code of its own of a failure."""
    if sys.stdout is None:  # it was closed before this process began
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
