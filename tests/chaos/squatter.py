"""Somebody who asks for the KV memory before any shadow does, and so keeps an elected engine promoting for as long as is wanted.

    python squatter.py SOCKET NAME IDENTITY

It says ``asks``, then ``holds``; a line on standard input ends it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gms_core.client import Membership, RetainedPool, connect
from gms_core.layout import Identity
from gms_core.protocol.messages import RetainedStatus

LONG_S = 600.0


class Squatter:
    """The process, as the one that has started it sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def until_it(self, word: str) -> None:
        """Wait until it says so."""
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        assert said == word, f"the squatter says {said!r}, not {word!r}"

    def end(self) -> None:
        """Make it give the memory up and end. Idempotent."""
        if self._process.returncode is None:
            self._process.communicate("\n")


@contextlib.contextmanager
def squatting(socket: Path, name: str, pool: RetainedStatus) -> Iterator[Squatter]:
    """Run a squatter who has asked for a pool.

    Args:
        socket: Of the server.
        name: Its cohort, which no other ever had.
        pool: What it asks for.
    """
    command = [sys.executable, __file__, str(socket), name, pool.name, json.dumps(pool.identity)]
    squatter = Squatter(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        squatter.until_it("asks")
        yield squatter
    finally:
        squatter.end()


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


say_once = functools.cache(say)


def main(socket: str, name: str, pool_name: str, identity: str) -> None:
    session = connect(socket_path=Path(socket), client=name)
    membership = Membership.join(session, name, name, "rank 0")
    pool = RetainedPool(session, pool_name)
    pool.plan(Identity(json.loads(identity)), LONG_S)
    pool.hold(LONG_S, lambda _: say_once("asks"))  # the first news is that the server has it in its queue, before anybody who asks later
    say_once("asks")  # nobody has the memory: everything was lost before, and the primary serves on with what it has mapped
    say("holds")
    sys.stdin.readline()
    membership.depart(LONG_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
