"""Requests about generations to a server that is too old for them: one that was so from the beginning, and one that follows a newer one."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import msgspec
import pytest

from gms_core.client import PoolGenerations, Session
from gms_core.client import session as sessions
from gms_core.errors import VersionMismatch
from gms_core.protocol.messages import Commit, ReadGranted
from tests.conftest import RunningServer
from tests.unit.publishing import MODEL, PAGE, publish, read_all, until


def test_old_server_is_asked_nothing_that_it_does_not_know(server: RunningServer) -> None:
    with server.connect() as session:
        lease = publish(session, b"first")
        session.welcome = msgspec.structs.replace(session.welcome, features=())
        for call in (lease.newer, lease.move, lambda: PoolGenerations(session, "weights")):
            with pytest.raises(VersionMismatch, match="too old"):
                call()
        assert session.status().pools[0].generation == 1
        lease.release()


@pytest.fixture
def next_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that follows one which was killed says of itself what one without generations does."""

    def resume(*arguments: Any) -> Any:
        channel, welcome = resumed(*arguments)
        return channel, msgspec.structs.replace(welcome, features=())

    resumed = sessions.resume
    monkeypatch.setattr(sessions, "resume", resume)


@pytest.mark.usefixtures("next_is_older")
def test_session_is_kept_when_an_older_server_follows(server: RunningServer) -> None:
    with server.connect() as session:
        pool = PoolGenerations(session, "weights")
        lease = publish(session, b"first")
        server.kill()
        session.status()
        for call in (
            lambda: pool.pin(1),
            lambda: pool.unpin(1),
            lambda: pool.drop(1),
            lambda: pool.newer(0),
            pool.all,
            lease.newer,
            lease.move,
        ):
            with pytest.raises(VersionMismatch, match="too old"):
                call()
        assert session.status().pools[0].generation == 1
        assert read_all(session, lease, 5) == b"first"
        lease.release()


@pytest.mark.usefixtures("next_is_older")
def test_watcher_is_told_and_keeps_its_session_when_an_older_server_follows_while_it_waits(server: RunningServer) -> None:
    refused: list[VersionMismatch] = []
    with server.connect() as session, server.connect() as other:

        def watch() -> None:
            try:
                PoolGenerations(session, "weights").await_newer(1, 60.0)
            except VersionMismatch as error:
                refused.append(error)

        lease = publish(session, b"first")
        watcher = threading.Thread(target=watch)
        watcher.start()
        until(lambda: any(one.waiting_for for one in other.status().sessions))
        server.kill()
        watcher.join(30)
        assert len(refused) == 1
        assert session.status().pools[0].readers
        lease.release()


@pytest.mark.usefixtures("next_is_older")
def test_draft_is_not_published_without_its_pin_when_an_older_server_follows(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(session: Session, request: Commit) -> ReadGranted:
        os.kill(server.supervisor_child, signal.SIGSTOP)  # so that it does not answer first
        killer = threading.Thread(target=server.kill)
        killer.start()
        try:
            return committed(session, request)
        finally:
            killer.join()

    committed = Session.commit
    with server.connect() as session:
        draft = session.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=PAGE)
        session.driver.write(draft.arena.address(draft.arena.allocate(5)), b"first")
        monkeypatch.setattr(Session, "commit", commit)
        with pytest.raises(VersionMismatch, match="too old"):
            draft.commit(b"", MODEL, pin=True)
        assert (session.status().pools[0].state, session.status().pools[0].generation) == ("writing", 0)
        monkeypatch.setattr(Session, "commit", committed)
        with draft.commit(b"", MODEL) as lease:
            assert read_all(session, lease, 5) == b"first"
