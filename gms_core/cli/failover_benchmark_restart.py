"""What a failover replaces: the same engine without GMS, started, asked for tokens, and killed."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gms_core.cli.failover_benchmark_client import Endpoint, Tokens, first_answer
from gms_core.cli.failover_benchmark_result import Restart
from gms_core.config import child_environment
from gms_core.errors import EngineFailed, InvalidArgument
from gms_core.exit_words import how
from gms_core.fleet.groups import Group, last_line
from gms_core.plugins.engines import USUAL_PORT, EngineAdapter
from gms_core.plugins.loading import load

PAUSE_S = 0.02
"""Seconds between two tries while it starts: seldom enough not to slow it down, and little beside its start."""
SETTLE_S = 0.02
GONE_S = 60.0


def default_port(command: Sequence[str]) -> int:
    """Where the engine of a command line answers if that has no ``--port``.

    Raises:
        ConfigurationError: An engine's adapter refuses the command.
    """
    adapters = load().collect("gms_engines", EngineAdapter)
    return next((adapter.port for adapter in adapters if adapter.command is not None and adapter.command(command) is not None), USUAL_PORT)


def command_without_gms(command: Sequence[str], instead: str | None) -> tuple[str, ...]:
    """The command of the engine without GMS.

    Args:
        command: Of the engine that is to fail over, as the user gave it.
        instead: What the user gave for the one without GMS.

    Raises:
        InvalidArgument: It cannot be told, or there is no such program.
        ConfigurationError: An engine's adapter refuses the command.
    """
    if instead is None:
        adapters = load().collect("gms_engines", EngineAdapter)
        prepared = [found for adapter in adapters if adapter.command is not None and (found := adapter.command(command)) is not None]
        if any(found == list(command) for found in prepared):
            raise InvalidArgument(
                "the command says itself that the engine uses GMS, so it cannot be started without",
                hint="Leave --load-format gms out, name the other command with --restart-command, or give --restarts none.",
            )
        words = tuple(command)
    else:
        try:
            words = tuple(shlex.split(instead))
        except ValueError as error:
            raise InvalidArgument(f"--restart-command cannot be read as a command: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise InvalidArgument(f"there is no command {words[0] if words else ''!r}", hint="Is the engine's environment active? A path works too.")
    return words


def restart(
    command: Sequence[str],
    log: Path,
    endpoint: Endpoint,
    model: Callable[[], str | None],
    words: Sequence[int],
    patience_s: float,
    ask: Callable[[], list[Tokens]],
) -> tuple[Restart, list[Tokens]]:
    """One life of the engine, from its start to the end of its last process.

    Args:
        command: That starts it.
        log: For its output.
        endpoint: Where it answers.
        model: Gives its model's name once it answers.
        words: Prompt of the first request.
        patience_s: Seconds that it gets to answer.
        ask: Asks it for the tokens that are right.

    Returns:
        How long it took, and the tokens, the first one included.

    Raises:
        EngineFailed: It has ended, or did so before it was killed.
        AcquireTimeout: It did not answer.
    """
    group = Group(command, child_environment(GMS_FAILOVER="", GMS_ENGINE="", GMS_COHORT=""), log, f"start without GMS: {shlex.join(command)}")

    def check() -> None:
        if group.first_has_exited:
            raise EngineFailed(f"the engine without GMS {_ending(group)} before it answered: {last_line(log)}", hint=f"Look at {log}.")

    try:
        first = first_answer(endpoint, model, words, patience_s=patience_s, pause_s=PAUSE_S, check=check)
        answers = [first.tokens, *ask()]
        check()
        gone_s = _kill(group)
    except BaseException:
        group.kill()
        raise
    finally:
        while not group.settle():
            time.sleep(SETTLE_S)
        ending = how(group.reap())
    if ending != how(-signal.SIGKILL):
        raise EngineFailed(f"the engine without GMS {ending} when it was to be killed", hint=f"Look at {log}.")
    return Restart(first.at - group.started_at, gone_s), answers


def _ending(group: Group) -> str:
    """How a first process has ended, which is left to be reaped."""
    ended = os.waitid(os.P_PIDFD, group.pidfd, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return how(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def _kill(group: Group) -> float:
    """Kill all processes; returns the seconds until the last one has exited."""
    waiting = set()
    for pid in group.living():
        with contextlib.suppress(ProcessLookupError):  # it has exited meanwhile
            waiting.add(os.pidfd_open(pid))
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    killed = time.monotonic()
    try:
        os.killpg(group.pid, signal.SIGKILL)
        group.kill()  # what has left the process group
        while waiting:
            ready = {descriptor for descriptor, _ in poll.poll(1000 * GONE_S)}
            if not ready:
                raise EngineFailed(f"processes of the engine without GMS are still there {GONE_S:g} s after they were killed")
            for descriptor in ready:
                poll.unregister(descriptor)
                os.close(descriptor)
            waiting -= ready
        return time.monotonic() - killed
    finally:
        for descriptor in waiting:
            os.close(descriptor)
