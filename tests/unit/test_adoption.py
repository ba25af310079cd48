"""What a server takes over from the one before, in one process: the grace, requests that are asked again, and journals that cannot be written."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gms_core.errors import ConnectionLost, GmsError, JournalUnavailable, LeaseConflict, QuotaExceeded
from gms_core.layout import Allocation
from gms_core.protocol.messages import (
    Acquire,
    Allocate,
    Beat,
    Commit,
    Descriptors,
    Discard,
    Done,
    Drop,
    Elect,
    Elected,
    Held,
    Hello,
    Hold,
    Join,
    Joined,
    Plan,
    PlanDue,
    Planned,
    Provide,
    ReadGranted,
    Release,
    Report,
    Status,
    WriteGranted,
)
from gms_core.protocol.peer import PeerCredentials
from gms_core.quotas import Quota
from gms_core.server import journal as journal_module
from gms_core.server.limits import Limits
from gms_core.server.records import About
from gms_core.server.state import decode, encode
from tests.unit.servers_in_turn import MODEL, PAGE, Client, Host, run_in_turn, used


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a scenario with a `Host`."""
    return functools.partial(run_in_turn, tmp_path)


def test_session_that_does_not_come_back_loses_what_it_had_but_no_engine_is_ended(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        reader, engine = await Client(service).open(), await Client(service).open()
        await reader.ask(Acquire("weights", "rw", MODEL, 0))
        await reader.ask(Commit("weights", (), b"", MODEL))
        await engine.ask(Join("cohort", "engine", "rank 0"))
        service = host.next(Limits(grace_s=0.2))
        assert set(service.sessions) == {reader.session.id, engine.session.id}
        await asyncio.sleep(0.7)
        assert set(service.sessions) == {engine.session.id}
        assert service.engines.cohorts.by_name["cohort"].state == "alive"
        with pytest.raises(ConnectionLost):
            await reader.come_back(service)
        await engine.come_back(service)
        assert not service.sessions[engine.session.id].detached

    run(work)


def test_token_is_good_once_and_for_its_own_session(run: Any) -> None:
    async def work(host: Host) -> None:
        first, other = [await Client(service).open() for service in [host.next()] for _ in range(2)]
        service = host.next()
        for token, number in ((first.welcome.token, other.welcome.session), ("", first.welcome.session), ("x" * 32, first.welcome.session)):
            if token:
                with pytest.raises(ConnectionLost):
                    await Client(service).open(Hello((2,), resume=token, session=number))
        await first.come_back(service)
        with pytest.raises(ConnectionLost):
            await Client(service).open(Hello((2,), resume=first.welcome.token, session=first.welcome.session))

    run(work)


def test_every_request_that_was_carried_out_is_answered_as_before_when_it_is_asked_again(run: Any) -> None:
    """The server was killed after it had written what it did, and before its answer left."""

    async def work(host: Host) -> None:
        service = host.next()
        client = await Client(service).open()

        async def again(request: Any, *kinds: type) -> Any:
            nonlocal service
            told = await client.ask(request)
            assert isinstance(told, kinds)
            service = host.next()
            await client.come_back(service, repeats=True)
            repeated = await client.ask(request)
            assert isinstance(repeated, kinds)
            return told, repeated

        told, repeated = await again(Acquire("weights", "auto", MODEL, 0), WriteGranted)
        assert told == repeated
        told, repeated = await again(Allocate("weights", (PAGE, PAGE, 2 * PAGE), batch=1), Descriptors)
        assert told == repeated
        assert len(service.memory) == 3
        one, two, three = told.ids
        await again(Discard("weights", (one,)), Done)
        commit = Commit("weights", (Allocation(two, 0, PAGE), Allocation(three, PAGE, 2 * PAGE)), b"manifest", MODEL)
        told, repeated = await again(commit, ReadGranted)
        assert told == repeated
        await again(Release("weights"), Done)
        told, repeated = await again(Acquire("weights", "auto", MODEL, 0), ReadGranted)
        assert told == repeated
        await again(Join("cohort", "engine", "rank 0"), Joined)
        told, repeated = await again(Elect("primary", 1.0), Elected)
        assert told == repeated
        await again(Plan("kv", MODEL, 1.0), PlanDue)
        told, repeated = await again(Provide("kv", b"plan", (PAGE,), 1.0), Planned)
        assert told == repeated
        told, repeated = await again(Hold("kv", 1.0), Held)
        assert told == repeated
        assert repeated.epoch == 1
        await again(Release("kv"), Done)
        other = await Client(service).open()
        await other.ask(Drop("kv"))
        assert {name for name in service.retained.pools if service.retained.pools[name].identity} == set()

    run(work)


def test_request_that_was_not_asked_before_is_not_taken_for_one(run: Any) -> None:
    async def work(host: Host) -> None:
        client = await Client(host.next()).open()
        await client.ask(Acquire("weights", "rw", MODEL, 0))
        service = host.next()
        await client.come_back(service, repeats=False)
        with pytest.raises(LeaseConflict, match="already has"):
            await client.ask(Acquire("weights", "rw", MODEL, 0))

    run(work)


def test_disk_that_is_full_refuses_what_it_cannot_write_down_and_nothing_else(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work(host: Host) -> None:
        service = host.next()
        client, reader = await Client(service).open(), await Client(service).open()
        await client.ask(Acquire("weights", "rw", MODEL, 0))
        made = await client.ask(Allocate("weights", (PAGE,), batch=1))
        with monkeypatch.context() as broken:
            broken.setattr(journal_module.os, "posix_fallocate", full)
            commit = Commit("weights", (Allocation(made.ids[0], 0, PAGE),), os.urandom(2**20), MODEL)
            with pytest.raises(JournalUnavailable, match="No space left"):
                await client.ask(commit)
            assert service.published.pools["weights"].committed is None
            service.close(reader.session)  # nobody can refuse that
            service.durable.write()
        assert isinstance(await client.ask(commit), ReadGranted)
        service = host.next()
        assert set(service.sessions) == {client.session.id}
        committed = service.published.pools["weights"].committed
        assert committed is not None
        assert committed.manifest == commit.manifest

    run(work)


def test_connection_ends_when_what_it_was_granted_cannot_be_written_down(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def work(host: Host) -> None:
        service = host.next()
        client = await Client(service).open()
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "pwrite", broken)
            with pytest.raises(ConnectionAbortedError):
                await client.ask(Acquire("weights", "rw", MODEL, 0))
            service.close(client.session)  # as the listener does
            with pytest.raises((GmsError, OSError)):
                await Client(service).open()
        again = await Client(service).open()
        assert isinstance(await again.ask(Acquire("weights", "rw", MODEL, 0)), WriteGranted)
        service = host.next()
        assert set(service.sessions) == {again.session.id}

    run(work)


def test_engine_that_joins_anew_leaves_no_stale_member_behind_and_is_not_ended_by_an_old_deadline(run: Any) -> None:
    """Its client had given up; the watch of the old session would end it, as nobody beats for that any more."""

    async def work(host: Host) -> None:
        service = host.next()
        watch = await Client(service).open()
        await watch.ask(Join("cohort", "engine", "rank 0", 0.3))
        service = host.next(Limits(grace_s=0.2))
        await asyncio.sleep(0.6)
        assert service.engines.cohorts.by_name["cohort"].state == "alive", "a deadline begins when its session is back"
        anew = await Client(service).open()
        await anew.ask(Join("cohort", "engine", "rank 0", 0.0))
        assert set(service.engines.cohorts.by_name["cohort"].members) == {anew.session.id}
        assert set(service.sessions) == {anew.session.id}
        await asyncio.sleep(0.6)
        assert service.engines.cohorts.by_name["cohort"].state == "alive"

    run(work)


@pytest.mark.parametrize("grace_s", [0.2, 30.0], ids=["after the grace", "within the grace"])
def test_primary_that_joins_anew_keeps_its_lock_which_the_next_gets_when_it_has_exited(run: Any, grace_s: float) -> None:
    """Its client had given up, so nobody comes back to the session that was elected."""

    async def work(host: Host) -> None:
        service = host.next()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as engine:
            primary = await Client(service, engine.pid).open()
            await primary.ask(Join("cohort", "engine", "election"))
            first = await primary.ask(Elect("primary", 1.0))
            service = host.next(Limits(grace_s=grace_s))
            await asyncio.sleep(0.4)
            main, election = await Client(service, engine.pid).open(), await Client(service, engine.pid).open()
            await main.ask(Join("cohort", "engine", "rank 0"))
            await election.ask(Join("cohort", "engine", "election"))
            assert await election.ask(Elect("primary", 0.0)) == first
            shadow = await Client(service).open()
            await shadow.ask(Join("shadow", "shadow", "rank 0"))
            waiting = asyncio.ensure_future(shadow.ask(Elect("primary", 30.0)))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            engine.kill()
            assert (await waiting).term == first.term + 1

    run(work)


def test_primary_that_joins_anew_alone_leaves_its_lock_to_the_next_when_it_has_exited(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as engine:
            primary = await Client(service, engine.pid).open()
            await primary.ask(Join("cohort", "engine", "election"))
            await primary.ask(Elect("primary", 1.0))
            service = host.next(Limits(grace_s=0.2))
            await asyncio.sleep(0.4)
            await (await Client(service, engine.pid).open()).ask(Join("cohort", "engine", "rank 0"))
            shadow = await Client(service).open()
            await shadow.ask(Join("shadow", "shadow", "rank 0"))
            waiting = asyncio.ensure_future(shadow.ask(Elect("primary", 30.0)))
            engine.kill()
            assert (await waiting).term == 2

    run(work)


def test_try_to_come_back_that_was_given_up_takes_nothing_away(run: Any) -> None:
    async def work(host: Host) -> None:
        client = await Client(host.next()).open()
        await client.ask(Acquire("weights", "rw", MODEL, 0))
        service = host.next()
        hello = Hello((2,), resume=client.welcome.token, session=client.welcome.session)

        async def broken(*_: Any) -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            await service.open(hello, PeerCredentials(os.getpid(), os.getuid(), 0), broken, lambda: os.pidfd_open(os.getpid()))
        await client.come_back(service)
        assert service.published.pools["weights"].lease_of(client.session.id) == "write"

    run(work)


def test_journal_that_cannot_be_written_ends_nobody_who_asks_for_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def work(host: Host) -> None:
        service = host.next()
        engine = await Client(service).open()
        await engine.ask(Join("cohort", "engine", "rank 0"))
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "pwrite", broken)
            for request in (Beat(), Report("standby"), Status()):
                await engine.ask(request)
            with pytest.raises((JournalUnavailable, ConnectionAbortedError)):
                await engine.ask(Elect("primary", 1.0))

    run(work)


def test_commit_is_never_refused_after_it_was_carried_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would write to memory that others read already."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work(host: Host) -> None:
        client = await Client(host.next()).open()
        await client.ask(Acquire("weights", "rw", MODEL, 0))
        made = await client.ask(Allocate("weights", (PAGE,), batch=1))
        commit = Commit("weights", (Allocation(made.ids[0], 0, PAGE),), os.urandom(2**20), MODEL)
        await client.ask(commit)
        service = host.next()
        monkeypatch.setattr(journal_module.os, "posix_fallocate", full)
        await client.come_back(service, repeats=True)
        assert isinstance(await client.ask(commit), ReadGranted)

    run(work)


def test_processes_that_have_died_together_are_buried_together(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        members = [await Client(service).open() for _ in range(3)]
        for number, member in enumerate(members):
            await member.ask(Join("cohort", "engine", f"rank {number}"))
        await members[0].ask(Elect("primary", 1.0))
        for cohort in service.engines.cohorts.by_name.values():
            for one in cohort.members.values():
                one.pid, one.started = 2**22 - 1, 1  # a process that is no more
        service.durable.touch("cohort")
        service.durable.write()
        service = host.next()
        assert service.engines.cohorts.by_name == {}
        assert service.engines.locks["primary"].holder is None

    run(work)


def test_restarts_are_counted_from_server_to_server_and_from_a_journal_of_a_version_that_did_not_count(run: Any) -> None:
    async def work(host: Host) -> None:
        assert host.next().observer.restarts == {}
        service = host.next()
        assert service.observer.restarts == {"adopted": 1}
        assert host.next().observer.restarts == {"adopted": 2}
        assert [event.kind for event in host.next().observer.log.after(0, 1)[0]] == ["server_adopted"]

    run(work)
    older = {name: value for name, value in msgspec.to_builtins(About(1, "host", "label", "boot")).items() if name != "restarts"}
    assert decode(encode(older), About).restarts == {}


def test_users_have_what_they_had_when_the_next_server_counts(run: Any) -> None:
    quotas = [Quota("user", "*", "bytes", 2**30), Quota("user", "*", "allocations", 99), Quota("user", "*", "metadata", 2**20)]
    quotas += [Quota("user", "*", "sessions", 3), Quota("pool", "*", "bytes", 6 * PAGE)]
    alice_uid, bob_uid = 23456, 23457

    async def work(host: Host) -> None:
        service = host.next(quotas=quotas)
        alice, bob, writer = [await Client(service, uid=uid).open() for uid in (alice_uid, bob_uid, alice_uid)]
        await alice.ask(Acquire("a", "rw", MODEL, 0))
        made = await alice.ask(Allocate("a", (PAGE, PAGE, PAGE)))
        await alice.ask(Commit("a", tuple(Allocation(number, at * PAGE, PAGE) for at, number in enumerate(made.ids)), b"manifest", MODEL))
        await bob.ask(Join("cohort", "engine", "rank 0"))
        await bob.ask(Plan("kv", MODEL, 0))
        await bob.ask(Provide("kv", b"plan", (5 * PAGE,), 0.0))
        await writer.ask(Acquire("b", "rw", MODEL, 0))
        await writer.ask(Allocate("b", (PAGE,)))
        before = await used(service)
        assert (before[str(alice_uid), "bytes"], before[str(bob_uid), "bytes"], before[str(alice_uid), "sessions"]) == (4 * PAGE, 5 * PAGE, 2)
        service = host.next(quotas=quotas)
        assert await used(service) == before
        await bob.come_back(service)
        await writer.come_back(service)
        with pytest.raises(QuotaExceeded, match="pool b has 4096 bytes"):
            await writer.ask(Allocate("b", (6 * PAGE,)))
        service.close(service.sessions[alice.session.id])
        service.durable.write()
        service = host.next(quotas=quotas)
        after = await used(service)
        assert {name: after[name] for name in after if name[1] != "sessions"} == {name: before[name] for name in before if name[1] != "sessions"}
        assert after[str(alice_uid), "sessions"] == 1

    run(work)
