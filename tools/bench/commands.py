"""The commands of gms, as processes, and what they answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from gms_core.cli import attach_benchmark, server_benchmark, snapshot_benchmark
from gms_core.errors import BackendUnavailable, GmsError
from tools.bench.document import COMMANDS
from tools.bench.machine import ROOT

SCHEMAS = dict(zip(COMMANDS, (attach_benchmark.SCHEMA, server_benchmark.SCHEMA, snapshot_benchmark.SCHEMA), strict=True))
"""Of the sections that commands give."""
COMMAND = (sys.executable, "-m", "gms_core.cli")
PATIENCE_S = 3600.0


def gms(*words: str, command: Sequence[str] = COMMAND, patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """What a command of gms answers with ``-o json``.

    Args:
        words: Of the command, without that option.
        command: That starts gms.
        patience_s: Seconds after which it is ended.

    Raises:
        BackendUnavailable: A transfer backend cannot be used here.
        GmsError: It has failed; the message is what it said.
    """
    name = f"gms {' '.join(words[:2])}"
    try:
        done = subprocess.run(
            [*command, *words, "-o", "json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience_s, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired as error:
        raise GmsError(f"{name} did not end within {patience_s:g} s") from error
    if done.returncode:
        raise _failure(name, done)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise GmsError(f"{name} has answered with something else than JSON: {done.stdout[:100]!r}") from error
    return answer


def section(name: str, *words: str, command: Sequence[str] = COMMAND, patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """A section of the document: what a command answers, or its schema and why there is none.

    Args:
        name: Of the section.
        words: See `gms`.
        command: See `gms`.
        patience_s: See `gms`.
    """
    try:
        return gms(*words, command=command, patience_s=patience_s)
    except GmsError as error:
        return {"schema": SCHEMAS[name], "error": error.message}


def _failure(name: str, done: subprocess.CompletedProcess[str]) -> GmsError:
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and it said nothing"])[-1]
    try:
        told = json.loads(last)["error"]
        kind = BackendUnavailable if told["code"] == BackendUnavailable.code else GmsError
        return kind(str(told["message"]))
    except (ValueError, KeyError, TypeError):
        return GmsError(f"{name} failed: {last[:300]}")
