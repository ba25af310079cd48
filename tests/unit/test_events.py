"""Events of a real server: over its socket, across its restarts, and what its log says of the same."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time

import msgspec
import pytest

from gms_core.client import PoolGenerations, connect
from gms_core.errors import GmsError, InvalidArgument, OutOfMemory, VersionMismatch
from gms_core.fleet import event_reader
from gms_core.fleet.event_reader import Cursor, EventReader, read_past
from gms_core.protocol.framing import decode_reply, decode_request
from gms_core.protocol.messages import Acquire, EventBatch, Events, Hold, Plan, Provide, Release, Status, StatusReport
from gms_core.server.observer import REQUESTS, Observer
from tests.conftest import running_server
from tests.unit.engine_processes import processes
from tests.unit.publishing import MODEL, PAGE, publish
from tests.unit.test_server_requests import Client, service_in_this_process, turns_of_the_loop


def events_of(server):
    """Kind, subject and facts of all events so far."""
    return [(told.event.kind, told.event.subject, told.event.facts) for told in read_past(server.socket, "test")[0]]


def kinds_of(server):
    return [kind for kind, _, _ in events_of(server)]


def ask(session, cursor=Cursor(), wait_s=0.0):  # noqa: B008 - immutable
    return session.ask(Events(cursor.log, cursor.last, wait_s), EventBatch, wait_s)


def next_of(reader, kind, patience_s=30.0):
    """The next event of a kind; all before it are skipped."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if (told := reader.next(1.0)) is not None and told.event.kind == kind:
            return told
    raise AssertionError(f"no {kind}")


def test_publication_is_told_from_the_draft_to_the_end_of_its_last_reader(server):
    with server.connect() as writer, server.connect() as reader:
        lease = publish(writer, b"bytes")
        second = reader.acquire("weights", "ro", MODEL, timeout_s=5)
        second.release()
        lease.release()
        publish(writer, b"other bytes").release()
        pid = {"pid": reader.status().sessions[0].pid}
        one, two = writer.welcome.session, reader.welcome.session
    assert events_of(server)[1:] == [
        ("pool_draft_begun", "weights", {"session": one, "generation": 1, **pid}),
        ("pool_committed", "weights", {"session": one, "generation": 1, "bytes": PAGE, "allocations": 1, **pid}),
        ("pool_lease_granted", "weights", {"session": two, "generation": 1, **pid}),
        ("pool_lease_released", "weights", {"session": two}),
        ("pool_lease_released", "weights", {"session": one}),
        ("pool_draft_begun", "weights", {"session": one, "generation": 2, **pid}),
        ("pool_committed", "weights", {"session": one, "generation": 2, "bytes": PAGE, "allocations": 1, **pid}),
        ("pool_generation_freed", "weights", {"generation": 1, "bytes": PAGE}),
        ("pool_lease_released", "weights", {"session": one}),
    ]


def test_pins_rollbacks_moves_and_drops_are_told_with_who_asked_for_them(server):
    with server.connect() as writer, server.connect() as operator, server.connect() as reader:
        lease = publish(writer, b"first")
        pool = PoolGenerations(operator, "weights")
        pool.pin(1)
        pool.pin(1)
        lease.release()
        publish(writer, b"other").release()
        moving = reader.acquire("weights", "ro", MODEL, timeout_s=5)
        before = len(events_of(server))
        assert pool.rollback(1, expected=2) == 3
        assert moving.move()
        pool.unpin(1)
        moving.release()
        pool.drop(3)
        pid = {"pid": writer.status().sessions[0].pid}
        by, moved = {"session": operator.welcome.session, **pid}, reader.welcome.session
    told = events_of(server)
    assert [one for one in told[:before] if one[0] == "pool_pinned"] == [("pool_pinned", "weights", {**by, "generation": 1})]
    assert told[before:] == [
        ("pool_rolled_back", "weights", {**by, "to": 1, "generation": 3, "bytes": PAGE}),
        ("pool_lease_moved", "weights", {"session": moved, "generation": 3, "before": 2, **pid}),
        ("pool_generation_freed", "weights", {"generation": 2, "bytes": PAGE}),
        ("pool_unpinned", "weights", {**by, "generation": 1}),
        ("pool_generation_freed", "weights", {"generation": 1, "bytes": 0}),
        ("pool_lease_released", "weights", {"session": moved}),
        ("pool_generation_dropped", "weights", {**by, "generation": 3}),
        ("pool_generation_freed", "weights", {"generation": 3, "bytes": PAGE}),
    ]


def test_draft_is_told_to_be_dropped_when_its_writer_leaves(server):
    with server.connect() as watching:
        with server.connect() as writer:
            writer.acquire("weights", "rw", MODEL, timeout_s=5)
        batch = ask(watching)
        while "pool_draft_dropped" not in [event.kind for event in batch.events]:
            batch = ask(watching, Cursor(batch.log, batch.last), 30.0)


def test_request_waits_for_the_next_event_and_is_empty_when_none_comes(server):
    with server.connect() as reader, server.connect() as writer:
        first = ask(reader)
        assert [event.kind for event in first.events] == ["server_started"]
        cursor = Cursor(first.log, first.last)
        assert ask(reader, cursor, 0.1) == EventBatch(first.log, (), first.last)
        told = []
        waiting = threading.Thread(target=lambda: told.append(ask(reader, cursor, 30.0)))
        waiting.start()
        while not any(session.id == reader.welcome.session for session in writer.status().sessions):
            pass
        writer.acquire("weights", "rw", MODEL, timeout_s=5)
        waiting.join(30)
        assert [event.kind for event in told[0].events] == ["pool_draft_begun"]
        assert told[0].events[0].number == told[0].last == first.last + 1
        with pytest.raises(InvalidArgument):
            ask(reader, Cursor(first.log, -1))
        with pytest.raises(InvalidArgument):
            reader.ask(Events(timeout_s=1e9), EventBatch)
        assert reader.status().observation.last == first.last + 1


def test_all_is_told_of_an_engine_that_holds_memory_dies_and_is_followed(server):
    with processes() as start, EventReader(server.directory, (), "test", {}) as reader:
        first = start(server.socket, "one")
        first.ask("plan", "kv", "a")
        first.ask("provide", "plan", [4 * PAGE])
        assert (first.ask("hold", 5.0), first.ask("elect", "primary", 1.0)) == (1, 1)
        first.ask("report", "primary")
        second = start(server.socket, "two")
        second.ask("plan", "kv", "a")
        second.tell("hold", 20.0)
        first.kill()
        assert second.answer() == 2
        second.ask("depart", 10.0)
        second.ask("close")
        second.kill()
        gone = [next_of(reader, "engine_gone") for _ in range(2)]
        assert [(told.event.subject, told.event.facts["fenced"]) for told in gone] == [("engine of one", True), ("engine of two", False)]
        with server.connect() as session:
            seen = session.ask(Status(brief=True), StatusReport)
    told = events_of(server)
    of = {kind: (subject, facts) for kind, subject, facts in reversed(told)}
    assert of["engine_joined"] == ("engine of one", {"cohort": "one", "process": "rank 0", "pid": first.pid})
    assert of["pool_planning"] == ("kv", {"engine": "engine of one", "cohort": "one"})
    assert of["pool_planned"] == ("kv", {"engine": "engine of one", "bytes": 4 * PAGE, "allocations": 1})
    assert of["lock_granted"] == ("primary", {"engine": "engine of one", "cohort": "one", "term": 1})
    assert of["engine_role_changed"] == ("engine of one", {"cohort": "one", "before": "init", "role": "primary", "detail": ""})
    assert of["engine_process_exited"] == ("engine of one", {"cohort": "one", "process": "rank 0", "pid": first.pid})
    assert of["engine_departing"] == ("engine of two", {"cohort": "two", "seconds": 10.0})
    epochs = [(facts["engine"], facts["epoch"]) for kind, _, facts in told if kind == "pool_epoch_granted"]
    assert epochs == [("engine of one", 1), ("engine of two", 2)]
    kinds = [kind for kind, _, _ in told]
    either_first = kinds.index("engine_fenced"), kinds.index("engine_process_exited")  # its session ends, and its process
    assert max(either_first) < kinds.index("engine_gone")
    assert seen.sessions == ()
    assert (sum(seen.observation.fences.counts), seen.observation.events["engine_fenced"]) == (1, 1)
    assert seen.observation.fences.sum_s > 0


def test_wait_for_memory_is_told_when_it_begins_and_how_it_ends(runtime_dir):
    with running_server(runtime_dir, host_memory=4 * PAGE) as server, server.connect() as first, server.connect() as second:
        holder = first.acquire("a", "rw", MODEL, timeout_s=5, slab_bytes=PAGE)
        holder.arena.allocate(4 * PAGE)
        waiting = second.acquire("b", "rw", MODEL, timeout_s=5, slab_bytes=PAGE, memory_timeout_s=0.2)
        with pytest.raises(OutOfMemory):
            waiting.arena.allocate(PAGE)
        facts = {kind: facts for kind, subject, facts in events_of(server) if subject == "b"}
        assert facts["pool_memory_wait_begun"] == {"bytes": PAGE}
        assert facts["pool_memory_wait_ended"]["outcome"] == "there was no room in time"
        assert facts["pool_memory_wait_ended"]["seconds"] >= 0.2
        assert first.status().waiting_for_memory == 0
        holder.release()
        waiting.arena.allocate(PAGE)
        assert kinds_of(server).count("pool_memory_wait_begun") == 1
        waiting.release()


def test_wait_for_memory_is_told_to_have_ended_when_its_client_has_gone(runtime_dir):
    with running_server(runtime_dir, host_memory=PAGE) as server, server.connect() as first, EventReader(runtime_dir, (), "test", {}) as reader:
        holder = first.acquire("a", "rw", MODEL, timeout_s=5, slab_bytes=PAGE)
        holder.arena.allocate(PAGE)
        second = server.connect()
        waiting = second.acquire("b", "rw", MODEL, timeout_s=5, slab_bytes=PAGE, memory_timeout_s=60.0)

        def ask_for_memory():
            with contextlib.suppress(GmsError):
                waiting.arena.allocate(PAGE)

        asking = threading.Thread(target=ask_for_memory)
        asking.start()
        next_of(reader, "pool_memory_wait_begun")
        assert first.status().waiting_for_memory == 1
        second.close()
        asking.join(30)
        assert next_of(reader, "pool_memory_wait_ended").event.facts["outcome"] == "nobody wants them any more"
        holder.release()


def test_reader_goes_on_in_the_log_of_the_next_server_when_one_is_killed(server):
    with EventReader(server.directory, (), "test", {}) as reader:
        assert next_of(reader, "server_started").event.number == 1
        with server.connect() as session:
            lease = publish(session, b"bytes")
            before = next_of(reader, "pool_committed")
            server.kill()
            adopted = next_of(reader, "server_adopted")
            assert (adopted.event.number, adopted.event.facts["allocations"], adopted.log != before.log) == (1, 1, True)
            lease.release()
            assert next_of(reader, "pool_lease_released").log == adopted.log
            server.kill()
            next_of(reader, "server_adopted")
            assert session.status().observation.restarts == {"adopted": 2}
            server.lose_everything()
            assert next_of(reader, "server_began_anew").event.facts["version"]
    with server.connect() as session:
        assert session.status().observation.restarts == {"adopted": 2, "lost": 1}


def test_reader_is_told_how_many_events_it_has_missed_when_it_was_too_slow():
    class Slow:
        device = "host"

        def ask(self, request, *_):
            return EventBatch("log", (first, last), 9, 7)

    observer = Observer()
    for _ in range(9):
        observer.tell(event_reader.Kind.SERVER_HANDED_OVER, "host", pid=1)
    (first, *_, last), _, _ = observer.log.after(0, 9)
    told, cursor = event_reader._read(Slow(), Cursor("log", 1), 0.0)
    assert [(one.event.kind, one.event.facts) for one in told[:1]] == [("events_lost", {"count": 7})]
    assert len(told) == 3
    assert cursor == Cursor("log", 9)
    assert len(event_reader._read(Slow(), Cursor(), 0.0)[0]) == 2, "to begin late is no loss"


def test_reader_says_what_to_do_when_the_server_is_of_a_version_without_events(server, monkeypatch):
    with server.connect() as session:
        old = msgspec.structs.replace(session.status(), observation=None)
    monkeypatch.setattr(event_reader.Session, "ask", lambda *_: old)
    with pytest.raises(VersionMismatch, match="has no events") as caught:
        read_past(server.socket, "test")
    assert "gms serve --replace" in caught.value.hint


def test_thousands_of_events_arrive_whole_when_they_need_several_answers(server):
    with server.connect() as session:
        lease = publish(session, b"bytes")
        for _ in range(300):
            session.acquire("other", "rw", MODEL, timeout_s=5).release()
        told, cursor = read_past(server.socket, "test")
        numbers = [one.event.number for one in told]
        assert numbers == list(range(1, 604))
        assert cursor.last == 603
        lease.release()


def test_reader_ends_at_once_when_its_server_hangs(server):
    pid = server.supervisor_child
    with EventReader(server.directory, (), "test", {}) as reader:
        next_of(reader, "server_started")
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            reader.close()
            assert time.monotonic() - began < 20
        finally:
            os.kill(pid, signal.SIGCONT)


def test_line_in_the_log_and_event_say_the_same_when_something_happens(caplog):
    observer = Observer()
    with caplog.at_level(logging.INFO, logger="gms_core"):
        observer.tell(event_reader.Kind.LOCK_GRANTED, "primary", engine="engine-0", cohort="c", term=3)
        observer.tell(event_reader.Kind.ENGINE_FENCED, "engine-0", cohort="c", reason="it died")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "lock primary: engine-0 has it, term 3, cohort c"),
        ("WARNING", "engine engine-0: cohort c is ended: it died"),
    ]
    events, _, _ = observer.log.after(0, 9)
    assert [record.gms_event for record in caplog.records] == events


def test_every_request_is_counted_by_its_name_and_how_it_ended(server):
    with server.connect() as session:
        publish(session, b"bytes").release()
        with pytest.raises(Exception, match="cohort"):
            session.ask(Hold("kv", 0.0), StatusReport)
        seen = session.status().observation
    counted = {(one.request, one.outcome): one.count for one in seen.requests}
    assert counted["acquire", "ok"] == counted["commit", "ok"] == 1
    assert counted["hold", "lease_conflict"] == 1
    assert {Plan, Provide, Events, Status} <= REQUESTS.keys()


def test_session_that_comes_back_is_told_and_so_is_one_that_does_not(server):
    with connect(socket_path=server.socket, client="comes back") as session:
        session.status()
        server.kill()
        session.status()
        assert ("session_resumed", "comes back") in [(kind, facts.get("client")) for kind, _, facts in events_of(server)]


def test_messages_are_understood_when_the_other_side_does_not_know_of_events(server):
    assert decode_request(msgspec.msgpack.encode({"type": "status"})) == Status()
    assert decode_request(msgspec.msgpack.encode({"type": "status", "unheard_of": 1})) == Status()
    with server.connect() as session:
        report = msgspec.to_builtins(session.status())
    del report["observation"]
    assert decode_reply(msgspec.msgpack.encode(report)).observation is None


def test_forgotten_pool_tells_nothing_of_the_next_one_of_its_name():
    async def scenario():
        with service_in_this_process() as service:
            one, two = await Client(service).open(), await Client(service).open()
            for _ in range(3):
                await one.ask(Acquire("weights", "rw", MODEL, 0))
                waiting = asyncio.create_task(two.ask(Acquire("weights", "rw", MODEL, 60, replace=5)))
                await turns_of_the_loop(10)
                await one.ask(Release("weights"))
                await asyncio.gather(waiting, return_exceptions=True)
            assert service.published.pools == {}
            assert service.observer.log.counts == {"pool_draft_begun": 3, "pool_draft_dropped": 3}

    asyncio.run(scenario())
