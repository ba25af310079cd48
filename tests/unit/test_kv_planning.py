"""How the ranks of an engine that fails over come to their budgets: real processes, each with a pool of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gms_core.kv.plan import KvPlan
from tests.conftest import RunningServer
from tests.unit.engine_processes import EngineProcess

BUDGETS = (777, 700)
"""Of two ranks, on devices that had not the same room."""
RANK = """
import json, sys
from multiprocessing.connection import Connection
from pathlib import Path
from gms_core.client import connect
from gms_core.errors import GmsError
from gms_core.kv import planning
from gms_core.layout import Identity

class TwoRanks:
    def __init__(self, rank, other):
        self.rank_in_group, self._other = rank, other

    def broadcast_object(self, value, src=0):
        if self.rank_in_group != src:
            return self._other.recv()
        self._other.send(value)
        return value

    def all_gather_object(self, value):
        self._other.send(value)
        values = [value, self._other.recv()]
        return values if self.rank_in_group == 0 else values[::-1]

socket, rank, other = Path(sys.argv[1]), int(sys.argv[2]), Connection(int(sys.argv[3]))
try:
    begun = planning.begin(
        connect(socket_path=socket), f"kv.{rank}", Identity({"kind": "a"}), tag="kv", rank=rank, ranks=TwoRanks(rank, other), timeout_s=30.0
    )
    knew = begun.memory_bytes
    if knew is None:
        begun.share(100 + rank)
    print(json.dumps([begun.plan is not None, knew, begun.budgets]), flush=True)
except GmsError as error:
    print(json.dumps(error.code), flush=True)
sys.stdin.readline()
"""


def two_ranks(server: RunningServer) -> list[Any]:
    """What both ranks of an engine learn of their pools."""
    environment = {**os.environ, "GMS_COHORT": "two ranks", "GMS_ENGINE": "two ranks"}
    with contextlib.ExitStack() as stack:
        processes = []
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        for rank, end in enumerate(ends):
            command = [sys.executable, "-c", RANK, str(server.socket), str(rank), str(end.fileno())]
            processes.append(
                stack.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[end.fileno()], env=environment)
                )
            )
            stack.callback(processes[-1].communicate, "\n")
        return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]


@contextlib.contextmanager
def planned(server: RunningServer, pool: str, kind: str = "a", budgets: tuple[int, ...] = BUDGETS) -> Iterator[None]:
    """While it lasts, another engine uses a pool that it has planned."""
    other = EngineProcess(server.socket, f"who planned {pool}")
    try:
        assert other.ask("plan", pool, kind) is None
        other.ask("provide", KvPlan(budgets, 1, (4096,), "", "").encode().decode(), [4096])
        yield
    finally:
        other.end()


def test_all_ranks_measure_and_know_of_all_budgets_when_none_has_a_plan(server: RunningServer) -> None:
    assert two_ranks(server) == [[False, None, [100, 101]]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_its_own_budget_again_when_only_one_of_them_has_a_plan(server: RunningServer, rank: int) -> None:
    with planned(server, f"kv.{rank}"):
        assert two_ranks(server) == [[rank == 0, BUDGETS[0], list(BUDGETS)], [rank == 1, BUDGETS[1], list(BUDGETS)]]


def test_engine_is_refused_when_its_ranks_have_plans_of_different_engines(server: RunningServer) -> None:
    with planned(server, "kv.0"), planned(server, "kv.1", budgets=(1, 2)):
        assert two_ranks(server) == ["identity_mismatch"] * 2


@pytest.mark.parametrize("refused", [0, 1])
def test_no_rank_waits_for_ever_when_another_one_is_refused(server: RunningServer, refused: int) -> None:
    with planned(server, f"kv.{refused}", kind="b"):
        answers = two_ranks(server)
    assert (answers[refused], answers[1 - refused]) == ("identity_mismatch", "connection_lost")
