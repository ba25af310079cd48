"""The KV memory of a rank that fails over: its addresses, and the way from scratch to the pool's memory, with real processes and a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gms_core.client import RetainedPool
from gms_core.errors import InvalidArgument, OutOfMemory
from gms_core.kv.retained import RetainedKv
from gms_core.layout import Allocation
from gms_core.protocol.messages import Planned
from gms_core.pytorch.kv import clearing
from gms_core.vmm.driver import Address
from gms_core.vmm.host import HostDriver
from tests.conftest import RunningServer

NOTHING = clearing(torch.device("cpu"))
"""What has to be done to make fresh memory of this device zero."""
MIB = 2**20


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    opened = HostDriver(capacity=256 * MIB)
    yield opened
    opened.close()


def test_buffers_lie_side_by_side_at_the_granularity_when_they_are_placed(driver: HostDriver) -> None:
    page = driver.granularity
    kv = RetainedKv(driver, NOTHING, [5 * page + 1, 3 * page], alias_bytes=2 * page)
    assert [kv.place(5 * page + 1) - kv.arena.base, kv.place(3 * page) - kv.arena.base] == [0, 6 * page]
    assert (kv.size, kv.arena.size, kv.arena.backing) == (9 * page, 10 * page, "scratch")
    assert kv.scratch_bytes == 2 * page
    with pytest.raises(InvalidArgument, match="too many"):
        kv.place(1)
    kv.arena.close()


def test_one_granule_is_all_the_memory_when_there_is_no_kv_cache(driver: HostDriver) -> None:
    kv = RetainedKv(driver, NOTHING, [], alias_bytes=MIB)
    assert kv.allocations().sizes == [driver.granularity]
    kv.arena.close()


def test_no_addresses_are_left_when_there_is_no_room_for_scratch() -> None:
    driver = HostDriver(capacity=MIB)
    with pytest.raises(OutOfMemory):
        RetainedKv(driver, NOTHING, [8 * MIB], alias_bytes=2 * MIB)
    assert driver.memory_info().free == MIB
    driver.close()


def test_memory_is_refused_when_it_is_not_of_the_size_of_the_addresses(driver: HostDriver) -> None:
    kv, pool = RetainedKv(driver, NOTHING, [MIB], alias_bytes=MIB), RetainedPool(SimpleNamespace(), "kv")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="no plan"):
        kv.adopt(pool)
    pool.planned = Planned("kv", b"", (Allocation(1, 0, 2 * MIB),), 0)
    with pytest.raises(InvalidArgument, match=r"size|bytes"):
        kv.adopt(pool)
    assert driver.read(Address(kv.arena.base), 1) == b"\0"
    kv.arena.close()


RANK = """
import json, sys
from pathlib import Path
import torch
from gms_core.client import Membership, RetainedPool, connect
from gms_core.errors import GmsError
from gms_core.layout import Identity
from gms_core.kv.plan import KvPlan
from gms_core.kv.retained import RetainedKv
from gms_core.pytorch import placed
from gms_core.pytorch.kv import clearing

SIZES, CPU = [3 * 2**20, 5 * 2**20 + 100], torch.device("cpu")
session = connect(socket_path=Path(sys.argv[1]), client="a rank")
membership = Membership.join(session, sys.argv[2], sys.argv[2], "rank 0")
pool = RetainedPool(session, "kv")
planned = pool.plan(Identity({}), 30.0)
kv = RetainedKv(session.driver, clearing(CPU), SIZES, 2**20)
with placed(kv.place, CPU):
    first, second = (torch.zeros(size, dtype=torch.int8) for size in SIZES)
plan = here = KvPlan((8,), 1, tuple(SIZES), "", f"the mark of {sys.argv[2]}")
if planned is None:
    pool.provide(here.encode(), kv.allocations().sizes, 30.0)
else:
    plan = KvPlan.decode(planned.plan)
    plan.check_adopted(here, "kv")
kv.adopt(pool)

def do(command, value):
    if command == "fill":
        first.fill_(value)
    elif command == "sums":
        return [int(first.sum(dtype=torch.int64)), int(second.sum(dtype=torch.int64))]
    elif command == "take over":
        taken = kv.take_over(pool, plan.mark.encode(), value)
        return [taken.epoch, taken.bytes, kv.arena.backing]
    elif command == "mark":
        return session.driver.read(kv.arena.base + kv.size, 15).decode()
    elif command == "write over the mark":
        session.driver.write(kv.arena.base + kv.size, b"something else!")

print(json.dumps(planned is None), flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(do(*json.loads(line))), flush=True)
    except GmsError as error:
        print(json.dumps({"code": error.code}), flush=True)
"""
FIRST, TOTAL = 3 * MIB, 3 * MIB + 5 * MIB + 4096


class Rank:
    """A process with KV memory of its own kind: two buffers, written and read as tensors."""

    def __init__(self, server: RunningServer, cohort: str) -> None:
        command = [sys.executable, "-c", RANK, str(server.socket), cohort]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.planned = self.answer()

    def ask(self, command: str, value: float = 0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, value]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(server: RunningServer) -> Iterator[Callable[[str], Rank]]:
    ranks: list[Rank] = []

    def begin(cohort: str) -> Rank:
        ranks.append(Rank(server, cohort))
        return ranks[-1]

    yield begin
    for rank in ranks:
        if rank.process.poll() is None:
            rank.kill()


def test_next_engine_has_the_memory_beneath_its_own_tensors_when_the_last_one_is_killed(start: Callable[[str], Rank]) -> None:
    one_engine, another = start("one"), start("another")
    assert (one_engine.planned, another.planned) == (True, False)
    another.ask("fill", 9)  # on scratch, where addresses share memory
    assert another.ask("sums")[1] > 0
    assert one_engine.ask("take over", 30.0) == [1, TOTAL, "pool"]
    assert one_engine.ask("sums") == [0, 0]
    one_engine.ask("fill", 1)
    assert one_engine.ask("sums") == [FIRST, 0]
    assert another.ask("take over", 0.2) == {"code": "acquire_timeout"}
    one_engine.kill()
    assert another.ask("take over", 30.0) == [2, TOTAL, "pool"]
    assert another.ask("sums") == [FIRST, 0]


def test_next_engine_adopts_the_plan_when_all_others_are_gone(start: Callable[[str], Rank]) -> None:
    first = start("one")
    first.ask("take over", 30.0)
    first.ask("fill", 2)
    first.kill()
    later = start("later")
    assert later.planned is False
    assert later.ask("take over", 30.0) == [2, TOTAL, "pool"]
    assert later.ask("sums") == [2 * FIRST, 0]


def test_mark_is_written_again_when_whoever_cleared_the_memory_did_not_finish(start: Callable[[str], Rank]) -> None:
    first = start("one")
    first.ask("take over", 30.0)
    assert first.ask("mark") == "the mark of one"
    first.ask("write over the mark")
    first.kill()
    second = start("another")
    second.ask("take over", 30.0)
    assert second.ask("mark") == "the mark of one"
