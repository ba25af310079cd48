"""A rank that begins with the first blocks of its KV memory while processes of the last engine may still write to theirs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gms_core.errors import AcquireTimeout, ConnectionLost, FenceFailed, GmsError
from gms_core.kv.front import Range
from gms_core.kv.proof import Proof
from gms_core.kv.retained import RetainedKv
from gms_core.pytorch.kv import tensors_of, views_of
from gms_core.vmm.driver import Address
from gms_core.vmm.host import HostDriver
from tests.conftest import RunningServer
from tests.unit.kv_pools import Pool, do_nothing

PAGE = 4096
BLOCKS, BRIDGE = 250, 16
PROCESS = f"""
import json, os, sys, threading
from pathlib import Path
from gms_core.client import Membership, RetainedPool, connect
from gms_core.errors import GmsError

BLOCKS, BRIDGE, PAGE = {BLOCKS}, {BRIDGE}, {PAGE}
session = connect(socket_path=Path(sys.argv[1]), client=sys.argv[2])
membership = Membership.join(session, sys.argv[2], sys.argv[2], sys.argv[3], serves=sys.argv[3].startswith("api"))
state = {{}}
if not sys.argv[3].startswith("api"):
    import torch
    from gms_core.kv.plan import KvPlan
    from gms_core.kv.proof import Proof
    from gms_core.kv.retained import RetainedKv
    from gms_core.layout import Identity
    from gms_core.pytorch import placed
    from gms_core.pytorch.kv import clearing, views_of

    CPU = torch.device("cpu")
    pool = RetainedPool(session, "kv")
    planned = pool.plan(Identity({{}}), 30.0)
    sizes = [2 * BLOCKS * PAGE]
    kv = RetainedKv(session.driver, clearing(CPU), sizes, 8 * PAGE)
    with placed(kv.place, CPU):
        cache = torch.zeros(sizes[0], dtype=torch.uint8).view(2, BLOCKS, PAGE)  # keys and values, each with all blocks
    front = kv.first_blocks(views_of([cache], kv.arena.base), BLOCKS, BRIDGE)
    if planned is None:
        plan = KvPlan((8,), BLOCKS, tuple(sizes), "", "the mark", BRIDGE)
        cut = kv.allocations(front)
        pool.provide(plan.encode(), cut.sizes, 30.0, front=cut.front)
    else:
        plan = KvPlan.decode(planned.plan)
    kv.adopt(pool, front)

def do(command, *values):
    if command == "take over":
        taken = kv.take_over(pool, b"the mark", values[0], bridge=values[1])
        if not taken.whole:
            state["proof"] = Proof(pool)
        return [taken.epoch, taken.whole]
    elif command == "write":
        cache[:, values[0]:values[1]].fill_(values[2])
    elif command == "read":
        return sorted(set(cache[:, values[0]:values[1]].flatten().tolist()))
    elif command == "write for ever":
        def scribble():
            while True:
                cache.fill_(values[0])
        threading.Thread(target=scribble, daemon=True).start()
    elif command == "fatten":
        state["fat"] = bytearray(os.urandom(4096)) * (values[0] // 4096)
    elif command == "proven":
        return state["proof"].state == "proven"
    elif command == "complete":
        kv.map_rest(b"the mark")
    elif command == "backing":
        return kv.arena.backing

print("joined", flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(do(*json.loads(line))), flush=True)
    except GmsError as error:
        print(json.dumps({{"code": error.code}}), flush=True)
"""


def until_waiting(server: RunningServer) -> None:
    """Wait until somebody waits for the pool."""
    with server.connect() as session:
        while not session.status().retained[0].waiting:
            time.sleep(0.01)


class Process:
    """A process of a made-up engine."""

    def __init__(self, server: RunningServer, cohort: str, name: str) -> None:
        command = [sys.executable, "-c", PROCESS, str(server.socket), cohort, name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "joined\n"

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(server: RunningServer) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def begin(cohort: str, name: str = "rank 0") -> Process:
        processes.append(Process(server, cohort, name))
        return processes[-1]

    yield begin
    for one in processes:
        one.kill()


def test_first_blocks_are_the_new_engine_s_alone_while_the_last_one_may_still_write_to_its_own(
    server: RunningServer, start: Callable[..., Process]
) -> None:
    last, front_end = start("one"), start("one", "api-server 0")
    assert last.ask("take over", 30.0, True) == [1, True]
    last.ask("write for ever", 1)
    last.ask("fatten", 2**29)  # the kernel takes its time to end a process with much memory, as it does with an engine
    following = start("two")
    following.ask("write", 0, BLOCKS, 9)  # on scratch
    following.tell("take over", 30.0, True)
    until_waiting(server)
    front_end.kill()
    epoch, whole = following.answer()
    assert epoch == 2
    if not whole:  # else the last one has ended before its front end was known to have
        assert following.ask("backing") == "front"
        following.ask("write", 0, BRIDGE, 2)
        while True:
            proven = following.ask("proven")
            assert following.ask("read", 0, BRIDGE) == [2], "the last engine has written to blocks of the next one"
            if proven:
                break
        following.ask("complete")
        assert following.ask("read", 0, BRIDGE) == [2], "blocks of the bridge were lost when the rest was mapped"
        assert following.ask("read", BRIDGE + 1, BLOCKS // 2) == [1]
    assert following.ask("backing") == "pool"
    assert last.process.wait(20) == -signal.SIGKILL


def test_bridges_take_turns_when_one_engine_follows_the_other(server: RunningServer, start: Callable[..., Process]) -> None:
    front_end, _ = start("engine 0", "api-server 0"), start("engine 0").ask("take over", 30.0, True)
    for number in range(1, 4):
        rank, next_front_end = start(f"engine {number}"), start(f"engine {number}", "api-server 0")
        rank.tell("take over", 30.0, True)
        until_waiting(server)
        front_end.kill()
        epoch, whole = rank.answer()
        assert epoch == 1 + number
        rank.ask("write", 0, BRIDGE, number)
        if not whole:
            while not rank.ask("proven"):
                pass
            rank.ask("complete")
        assert rank.ask("read", 0, BRIDGE) == [number]
        rank.ask("write", BRIDGE, BLOCKS, 100 + number)
        assert rank.ask("read", 0, BRIDGE) == [number]
        front_end = next_front_end


def test_engine_waits_for_the_whole_memory_when_it_does_not_want_a_bridge(server: RunningServer, start: Callable[..., Process]) -> None:
    front_end, last = start("one", "api-server 0"), start("one")
    assert last.ask("take over", 30.0, True) == [1, True]
    last.ask("write", 0, BLOCKS, 7)
    following = start("two")
    following.tell("take over", 30.0, False)
    until_waiting(server)
    front_end.kill()
    assert following.answer() == [2, True]
    assert last.process.wait(20) == -signal.SIGKILL
    assert following.ask("read", 0, BLOCKS) == [7]


@dataclass
class Cleared:
    """Remembers what was made zero."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, address: Address, size: int) -> None:
        self.ranges.append((address, address + size))

    def pages(self, kv: RetainedKv) -> list[Range]:
        """What it was since this was asked before, in pages."""
        found = [Range(*((one - kv.arena.base) // PAGE for one in ends)) for ends in self.ranges]
        self.ranges.clear()
        return found


@pytest.fixture
def cleared() -> Cleared:
    return Cleared()


@pytest.fixture
def bridged(cleared: Cleared) -> Iterator[tuple[RetainedKv, Pool]]:
    """KV memory of 100 pages, of which two times ten are there twice, and its pool."""
    driver = HostDriver(capacity=2**26)
    kv = RetainedKv(driver, cleared, [100 * PAGE], 4 * PAGE)
    front = [Range(0, 10 * PAGE), Range(50 * PAGE, 60 * PAGE)]
    cut = kv.allocations(front)
    pool = Pool(driver)
    pool.provide(b"", cut.sizes, 1.0, front=cut.front)
    kv.adopt(pool, front)  # type: ignore[arg-type]
    yield kv, pool
    kv.arena.close()
    pool.close()
    driver.close()


def take_over_once(pool: Pool) -> None:
    """Be an engine that takes the whole pool over, makes it zero and marks it, and ends."""
    other = RetainedKv(pool.driver, do_nothing, [100 * PAGE], 4 * PAGE)
    pool.whole = True
    other.adopt(pool)  # type: ignore[arg-type]
    other.take_over(pool, b"mark", 1.0)  # type: ignore[arg-type]
    other.arena.close()
    pool.whole = False


@pytest.mark.parametrize("marked", [False, True])
def test_memory_is_made_zero_once_and_never_beneath_blocks_in_use(bridged: tuple[RetainedKv, Pool], cleared: Cleared, marked: bool) -> None:
    kv, pool = bridged
    if marked:
        take_over_once(pool)
    cleared.pages(kv)
    assert not kv.take_over(pool, b"mark", 1.0, bridge=True).whole  # type: ignore[arg-type]
    assert cleared.pages(kv) == [Range(0, 10), Range(50, 60)]
    cleared.pages(kv)
    kv.map_rest(b"mark")
    assert cleared.pages(kv) == ([] if marked else [Range(10, 50), Range(60, 101)])
    cleared.pages(kv)
    kv.map_rest(b"mark")
    assert cleared.pages(kv) == []


@pytest.mark.parametrize("bridge", [False, True])
def test_front_is_made_zero_when_the_engine_that_was_granted_it_may_have_died_before_it_did_so(
    bridged: tuple[RetainedKv, Pool], cleared: Cleared, bridge: bool
) -> None:
    kv, pool = bridged
    take_over_once(pool)
    pool.whole = True
    cleared.pages(kv)
    assert kv.take_over(pool, b"mark", 1.0, bridge=bridge).whole  # type: ignore[arg-type]
    assert cleared.pages(kv) == [Range(0, 10), Range(50, 60)], "what is kept besides stays"


def test_what_lies_beneath_the_rest_is_made_zero_when_an_engine_wakes_up_with_its_bridge(bridged: tuple[RetainedKv, Pool], cleared: Cleared) -> None:
    kv, pool = bridged
    kv.suspend()
    cleared.pages(kv)
    kv.resume()
    assert (kv.arena.backing, cleared.pages(kv)) == ("scratch", [Range(0, 101)])
    taken = kv.take_over(pool, b"mark", 1.0, bridge=True)  # type: ignore[arg-type]
    assert (taken.whole, taken.bytes) == (False, 20 * PAGE)
    kv.suspend()
    cleared.pages(kv)
    kv.resume()
    assert (kv.arena.backing, cleared.pages(kv)) == ("front", [Range(10, 50), Range(60, 101)])
    kv.map_rest(b"mark")
    kv.suspend()
    cleared.pages(kv)
    kv.resume()
    assert (kv.arena.backing, cleared.pages(kv)) == ("pool", [])


class Slow:
    """A pool of which the rest is granted, or refused, after some waits were too long."""

    name = "kv"

    def __init__(self, *answers: GmsError | None) -> None:
        self.answers = list(answers)

    def await_whole(self, timeout_s: float) -> None:
        assert timeout_s > 0
        if (answer := self.answers.pop(0)) is not None:
            raise answer


@pytest.mark.parametrize(
    ("last", "state"), [(None, "proven"), (FenceFailed("it cannot be ended"), "failed"), (ConnectionLost("the server has ended"), "failed")]
)
def test_engine_goes_on_with_its_bridge_while_processes_are_slow_to_exit(last: GmsError | None, state: str) -> None:
    pool = Slow(AcquireTimeout("rank 3 is still there"), AcquireTimeout("rank 3 is still there"), last)
    proof = Proof(pool)  # type: ignore[arg-type]
    while proof.state == "waiting":
        time.sleep(0.001)
    assert (proof.state, proof.failure) == (state, "" if last is None else str(last))
    assert pool.answers == []


def test_there_is_no_front_when_a_part_of_the_cache_is_in_no_tensor() -> None:
    driver = HostDriver(capacity=2**26)
    kv = RetainedKv(driver, do_nothing, [64 * PAGE], 4 * PAGE)
    elsewhere = torch.zeros(8, PAGE, dtype=torch.uint8)
    assert kv.first_blocks(views_of([elsewhere], kv.arena.base), 8, 2) == []
    assert kv.first_blocks([], 8, 2) == []
    kv.arena.close()
    driver.close()


def test_tensors_of_layers_with_several_states_are_found() -> None:
    one, two, three = (torch.zeros(number) for number in (1, 2, 3))
    assert [len(tensor) for tensor in tensors_of([one, [two, (three,)]])] == [1, 2, 3]
