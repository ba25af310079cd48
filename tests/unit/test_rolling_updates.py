"""Generations over a real server that is killed between the steps: pins, rollbacks, and readers in processes of their own that move."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gms_core.client import PoolGenerations
from gms_core.errors import (
    AcquireTimeout,
    ArenaTooSmall,
    GenerationConflict,
    GenerationNotFound,
    IdentityMismatch,
    LeaseConflict,
    SessionClosed,
)
from gms_core.layout import Identity
from tests.conftest import RunningServer
from tests.unit.publishing import MODEL, PAGE, generations, publish, read_all, until

NEXT = Identity({"content": "def", "dtype": "bf16"})

READER = """
import json, sys
from pathlib import Path
from gms_core.client import PoolGenerations, connect
from gms_core.errors import GmsError
from gms_core.layout import Identity
session = connect(socket_path=Path(sys.argv[1]), client=sys.argv[2])
pool = PoolGenerations(session, "weights")
lease = session.acquire("weights", "ro", Identity({"content": "abc", "dtype": "bf16"}), timeout_s=10)
base = lease.map(2**20).base
def answer(words):
    if words[0] == "await":
        return pool.await_newer(lease.layout.generation, 60.0).generation
    if words[0] == "move":
        new = lease.newer()
        lease.move(new.identity if new else None)
    if words[0] == "see":
        return [lease.layout.generation, session.driver.read(lease.arena.base, 5).decode(), lease.arena.base == base]
    return lease.layout.generation
print(json.dumps(lease.layout.generation), flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(answer(line.split())), flush=True)
    except GmsError as error:
        print(json.dumps(repr(error)), flush=True)
"""


class Reader:
    """A process that reads, and does as it is told."""

    def __init__(self, server: RunningServer, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(server.socket), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.generation = self.answer()

    def tell(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, words: str) -> Any:
        self.tell(words)
        return self.answer()


@pytest.fixture
def readers(server: RunningServer) -> Iterator[Any]:
    """Starts readers."""
    started: list[Reader] = []

    def start(*names: str) -> list[Reader]:
        started.extend(Reader(server, name) for name in names)
        return started[-len(names) :]

    yield start
    for reader in started:
        reader.process.kill()
        reader.process.communicate()


def test_readers_move_one_after_the_other_and_the_old_generation_goes_with_the_last(server: RunningServer, readers: Any) -> None:
    with server.connect() as trainer:
        publish(trainer, b"first").release()
        first, second = readers("one", "two")
        first.tell("await")
        until(lambda: any(session.waiting_for for session in trainer.status().sessions))
        server.kill()
        until(lambda: any(session.waiting_for for session in trainer.status().sessions))
        publish(trainer, b"other", identity=NEXT).release()
        assert first.answer() == 2
        server.kill()
        assert [first.ask("see"), second.ask("see")] == [[1, "first", True]] * 2
        assert first.ask("move") == 2
        server.kill()
        assert [first.ask("see"), second.ask("see")] == [[2, "other", True], [1, "first", True]]
        assert generations(trainer) == [(1, False, False, 1), (2, True, False, 1)]
        assert second.ask("move") == 2
        assert second.ask("see") == [2, "other", True]
        assert generations(trainer) == [(2, True, False, 2)]
        assert trainer.status().allocated_bytes == PAGE
        server.kill()
        assert trainer.status().allocated_bytes == PAGE
        assert first.ask("see") == [2, "other", True]


def test_pinned_generation_is_there_for_a_rollback_when_the_server_was_killed(server: RunningServer, readers: Any) -> None:
    with server.connect() as operator:
        pool = PoolGenerations(operator, "weights")
        lease = operator.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=PAGE)
        operator.driver.write(lease.arena.address(lease.arena.allocate(5)), b"first")
        lease.commit(b"manifest", MODEL, pin=True).release()
        server.kill()
        publish(operator, b"other").release()
        (reader,) = readers("one")
        assert generations(operator) == [(1, False, True, 0), (2, True, False, 1)]
        reader.tell("await")
        with pytest.raises(GenerationConflict, match="the committed one is 2"):
            pool.rollback(1, expected=1)
        assert pool.rollback(1, expected=2) == 3
        server.kill()
        assert reader.answer() == 3
        assert generations(operator) == [(1, False, True, 0), (2, False, False, 1), (3, True, False, 0)]
        assert operator.status().allocated_bytes == 2 * PAGE
        assert operator.status().pools[0].retired_bytes == PAGE
        assert reader.ask("move") == 3
        assert reader.ask("see") == [3, "first", True]
        pool.unpin(1)
        server.kill()
        assert generations(operator) == [(3, True, False, 1)]
        assert operator.status().allocated_bytes == PAGE
        with operator.acquire("weights", "ro", MODEL, timeout_s=1) as late:
            assert read_all(operator, late, 5) == b"first"
        publish(operator, b"third").release()
        assert reader.ask("move") == 4
        until(lambda: operator.status().allocated_bytes == PAGE)


def test_reader_of_the_old_generation_moves_to_its_rollback_without_a_copy_or_a_mapping(server: RunningServer) -> None:
    with server.connect() as trainer, server.connect() as reader:
        publish(trainer, b"first").release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        lease.map()
        publish(trainer, b"other").release()
        PoolGenerations(trainer, "weights").rollback(1, expected=2)
        mapped = lease.arena.allocations
        assert lease.move()
        assert (lease.layout.generation, lease.arena.allocations) == (3, mapped)
        assert read_all(reader, lease, 5) == b"first"
        assert generations(trainer) == [(3, True, False, 1)]
        assert not lease.move()
        assert lease.newer() is None
        lease.release()


def test_reader_stays_where_it_is_when_what_is_new_is_not_what_it_wants(server: RunningServer) -> None:
    def refuse(_: object) -> None:
        raise LookupError("another layout")

    with server.connect() as trainer, server.connect() as reader:
        publish(trainer, b"first").release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        lease.map()
        publish(trainer, b"other", identity=NEXT).release()
        new = lease.newer()
        assert (new.generation, new.identity, new.size) == (2, NEXT, PAGE)
        with pytest.raises(IdentityMismatch, match="content"):
            lease.move()
        with pytest.raises(GenerationConflict):
            lease.move(NEXT, generation=1)
        with pytest.raises(LookupError):
            lease.move(NEXT, check=refuse)
        assert generations(trainer) == [(1, False, False, 1), (2, True, False, 0)]
        assert (lease.layout.generation, read_all(reader, lease, 5)) == (1, b"first")
        assert lease.move(new.identity, generation=new.generation)
        assert read_all(reader, lease, 5) == b"other"
        lease.release()


def test_reader_moves_when_the_server_is_killed_between_the_steps_of_it(server: RunningServer) -> None:
    with server.connect() as trainer, server.connect() as reader:
        publish(trainer, b"first").release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        lease.map()
        publish(trainer, b"other").release()

        def kill_and_publish(_: object) -> None:
            assert generations(trainer) == [(1, False, False, 1), (2, True, False, 1)]
            server.kill()
            assert generations(trainer) == [(1, False, False, 1), (2, True, False, 1)]
            publish(trainer, b"third").release()

        assert lease.move(check=kill_and_publish)
        assert (lease.layout.generation, read_all(reader, lease, 5)) == (2, b"other")
        assert generations(trainer) == [(2, False, False, 1), (3, True, False, 0)]
        lease.release()


def test_neither_generation_is_kept_for_a_reader_that_is_gone_before_it_has_moved(server: RunningServer) -> None:
    with server.connect() as trainer:
        reader = server.connect()
        publish(trainer, b"first").release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        lease.map()
        driver = reader.driver
        publish(trainer, b"other").release()
        with pytest.raises(SessionClosed):
            lease.move(check=lambda _: reader.close())
        until(lambda: generations(trainer) == [(2, True, False, 0)])
        assert (lease.layout.generation, driver.read(lease.arena.base, 5)) == (1, b"first")
        lease.release()


def test_reader_stays_where_it_is_when_the_new_generation_is_longer_than_its_addresses(server: RunningServer) -> None:
    with server.connect() as trainer, server.connect() as reader, server.connect() as roomy:
        publish(trainer, b"first").release()
        lease, other = (session.acquire("weights", "ro", MODEL, timeout_s=1) for session in (reader, roomy))
        assert lease.map().capacity == PAGE
        other.map(capacity=20 * PAGE)
        publish(trainer, bytes(10 * PAGE)).release()
        with pytest.raises(ArenaTooSmall, match="40960 bytes do not fit into the 4096"):
            lease.move()
        assert (lease.layout.generation, read_all(reader, lease, 5)) == (1, b"first")
        assert other.move()
        assert read_all(roomy, other, 10 * PAGE) == bytes(10 * PAGE)
        assert generations(trainer) == [(1, False, False, 1), (2, True, False, 1)]
        lease.release()
        other.release()


def test_sleeping_reader_moves_and_wakes_up_in_the_new_generation(server: RunningServer) -> None:
    with server.connect() as trainer, server.connect() as reader:
        lease = publish(reader, b"first")
        publish(trainer, bytes(PAGE) + b"other").release()
        lease.unmap()
        assert lease.move()
        assert not lease.arena.mapped
        assert generations(trainer) == [(2, True, False, 1)]
        lease.remap()
        assert reader.driver.read(lease.arena.address(PAGE), 5) == b"other"
        lease.release()


def test_lease_that_was_never_mapped_moves(server: RunningServer) -> None:
    with server.connect() as trainer, server.connect() as reader:
        publish(trainer, b"first").release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        publish(trainer, b"other").release()
        assert lease.move()
        assert read_all(reader, lease, 5) == b"other"
        lease.release()


def test_writer_is_given_a_later_number_when_somebody_rolls_back_while_it_writes(server: RunningServer) -> None:
    with server.connect() as operator, server.connect() as writer:
        publish(operator, b"first").release()
        PoolGenerations(operator, "weights").pin(1)
        publish(operator, b"other").release()
        draft = writer.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=PAGE)
        assert draft.generation == 3
        assert PoolGenerations(operator, "weights").rollback(1, expected=2) == 3
        server.kill()
        draft.arena.allocate(PAGE)
        lease = draft.commit(b"", MODEL)
        assert lease.layout.generation == 4
        lease.release()


def test_nobody_is_told_of_a_later_generation_when_there_is_none_in_time(server: RunningServer) -> None:
    with server.connect() as session:
        pool = PoolGenerations(session, "weights")
        assert pool.newer(0) is None
        with pytest.raises(AcquireTimeout, match="later than 0"):
            pool.await_newer(0, 0.1)
        assert session.status().pools == ()
        publish(session, b"first").release()
        assert pool.newer(0).generation == 1
        assert pool.newer(1) is None


def test_generation_is_dropped_when_nobody_reads_it_and_no_sooner(server: RunningServer) -> None:
    with server.connect() as session:
        pool = PoolGenerations(session, "weights")
        lease = publish(session, b"first")
        with pytest.raises(LeaseConflict, match="read by sessions"):
            pool.drop(1)
        lease.release()
        pool.drop(1)
        until(lambda: session.status().allocated_bytes == 0)
        for call in (pool.drop, pool.pin, pool.unpin):
            with pytest.raises(GenerationNotFound):
                call(1)
        lease = publish(session, b"other")
        assert lease.layout.generation == 2
        lease.release()


def test_nothing_is_lost_when_readers_move_while_generations_are_published_pinned_and_rolled_back(server: RunningServer, readers: Any) -> None:
    """What a reader sees is always the content of the generation that its lease names."""
    with server.connect() as trainer:
        contents = {1: "v0001"}
        publish(trainer, b"v0001").release()
        pool = PoolGenerations(trainer, "weights")
        pool.pin(1)
        many = readers("one", "two", "three")
        stop, kills, since_turn = threading.Event(), [0], [0]

        def kill_now_and_then() -> None:
            # Less often the longer a turn takes: on a busy machine no request would ever come between two kills.
            while not stop.wait(0.02 * 1.2 ** since_turn[0]):
                server.kill()
                kills[0] += 1
                since_turn[0] += 1

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        try:
            turn = 0
            while turn < 12 or kills[0] < 5:
                turn += 1
                since_turn[0] = 0
                number = max(contents) + 1
                if turn % 3 == 2:
                    assert pool.rollback(1, expected=max(contents)) == number
                    contents[number] = contents[1]
                else:
                    contents[number] = f"v{number:04}"
                    publish(trainer, contents[number].encode()).release()
                for reader in many[: 1 + turn % 3]:
                    assert reader.ask("move") == number
                for reader in many:
                    generation, found, same_place = reader.ask("see")
                    assert (found, same_place) == (contents[generation], True)
        finally:
            stop.set()
            killer.join()
        for reader in many:
            assert reader.ask("move") == max(contents)
        assert [one[0] for one in generations(trainer)] == [1, max(contents)]
        until(lambda: trainer.status().allocated_bytes == PAGE * len({contents[1], contents[max(contents)]}))
