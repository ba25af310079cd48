"""What a process is ordered to measure or to check, what it answers, and how it is asked."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import msgspec

from gms_core.config import child_environment
from gms_core.errors import BackendUnavailable, GmsError
from tools.bench.machine import ROOT

COMMAND = (sys.executable, "-m", "tools.bench.child")
PATIENCE_S = 600.0
"""Seconds after which a process is ended: some libraries wait for ever for a driver that is not there."""


class Load(msgspec.Struct, tag="load", frozen=True):
    """Load a checkpoint with a peer, and compare it.

    Attributes:
        peer: By its name.
        folder: Of the checkpoint.
        device: As torch names it.
    """

    peer: str
    folder: str
    device: str


class Copy(msgspec.Struct, tag="copy", frozen=True):
    """Copy from host memory into a device's, as fast as that goes.

    Attributes:
        device: As GMS names it.
        bytes: At once.
    """

    device: str
    bytes: int


class Publish(msgspec.Struct, tag="publish", frozen=True):
    """Publish a checkpoint's bytes.

    Attributes:
        folder: Of the checkpoint.
        socket: Of the server.
        pool: Its name.
    """

    folder: str
    socket: str
    pool: str


class Check(msgspec.Struct, tag="check", frozen=True):
    """Compare what is published with a checkpoint, and free it.

    Attributes:
        folder: Of the checkpoint.
        socket: Of the server.
        pool: Its name.
        offset: Where in the arena the bytes begin.
    """

    folder: str
    socket: str
    pool: str
    offset: int


Order = Load | Copy | Publish | Check


class Answer(msgspec.Struct, tag="answer", frozen=True):
    """It is done.

    Attributes:
        seconds: That were measured.
        ended: When all bytes were there, as `time.monotonic` has it.
        rate: Bytes a second.
        version: Of what was measured.
        offset: Where in the arena the bytes begin.
        notes: What a user should know of how it went.
    """

    seconds: float = 0.0
    ended: float = 0.0
    rate: float = 0.0
    version: str = ""
    offset: int = 0
    notes: tuple[str, ...] = ()


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """It cannot be done.

    Attributes:
        code: Of the error.
        reason: In one sentence.
    """

    code: str
    reason: str


class Asked(msgspec.Struct, frozen=True):
    """An answer, and when the question was put.

    Attributes:
        answer: It is done.
        began: When its process was started, as `time.monotonic` has it.
    """

    answer: Answer
    began: float


def ask(order: Order, *, changes: Mapping[str, str] | None = None, command: Sequence[str] = COMMAND, patience_s: float = PATIENCE_S) -> Asked:
    """Have a process of its own carry out an order.

    Args:
        order: For it.
        changes: To its environment.
        command: That starts it.
        patience_s: Seconds after which it is ended.

    Raises:
        BackendUnavailable: What it needs is missing here: another try would find the same.
        GmsError: It has failed, or did not answer; the message is the reason.
    """
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(order),
            capture_output=True,
            timeout=patience_s,
            check=False,
            cwd=ROOT,
            env=child_environment(**(changes or {})),
        )
    except subprocess.TimeoutExpired as error:
        raise GmsError(f"it did not end within {patience_s:g} s") from error
    try:
        answer = msgspec.json.decode(done.stdout, type=Answer | Failed)
    except msgspec.MsgspecError as error:
        raise GmsError(f"its process {_end_of(done)}") from error
    if isinstance(answer, Failed):
        raise (BackendUnavailable if answer.code == BackendUnavailable.code else GmsError)(answer.reason)
    return Asked(answer, began)


def _end_of(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"was ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    return f"exited with code {done.returncode} and no answer: {last[0][:300]}"
