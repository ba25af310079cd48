"""How long servers that follow one another wait for the sessions of the first: with real timers, journals and memory, in one process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from gms_core.errors import ConnectionLost
from gms_core.protocol.messages import Acquire, Hello, Join, WriteGranted
from gms_core.protocol.peer import PeerCredentials
from gms_core.server.limits import Limits
from gms_core.server.service import Service
from tests.unit.servers_in_turn import MODEL, Client, Host, run_in_turn

GRACE_S = 0.8
LIMITS = Limits(grace_s=GRACE_S)


async def open_until(service: Service, client: Client, *, is_open: bool) -> None:
    """Wait until a session is there, or is not."""
    async with asyncio.timeout(30):
        while (client.session.id in service.sessions) != is_open:
            await asyncio.sleep(0.01)


def test_time_of_a_session_does_not_begin_anew_when_its_servers_are_killed_one_after_the_other(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        writer = await Client(host.next()).open()
        await writer.ask(Acquire("weights", "rw", MODEL, 0))
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 2 * GRACE_S:
            service = host.next(LIMITS)
            await asyncio.sleep(GRACE_S / 4)
        assert writer.session.id not in service.sessions
        assert isinstance(await (await Client(service).open()).ask(Acquire("weights", "rw", MODEL, 0)), WriteGranted)

    run_in_turn(tmp_path, work)


def test_client_has_a_moment_to_find_a_server_that_comes_late(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        reader = await Client(host.next()).open()
        service = host.next(LIMITS)
        service.sessions[reader.session.id].away_since -= 2 * GRACE_S  # no server was there meanwhile
        service.durable.touch(f"session/{reader.session.id}")
        service.durable.write()
        service = host.next(LIMITS)
        await reader.come_back(service)
        assert not service.sessions[reader.session.id].detached

    run_in_turn(tmp_path, work)


def test_session_has_all_its_time_again_when_its_client_was_back(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        reader = await Client(host.next()).open()
        service = host.next(LIMITS)
        service.sessions[reader.session.id].away_since -= 2 * GRACE_S
        await reader.come_back(service)
        service = host.next(LIMITS)
        assert asyncio.get_running_loop().time() - service.sessions[reader.session.id].away_since < GRACE_S
        await open_until(service, reader, is_open=False)
        with pytest.raises(ConnectionLost):
            await reader.come_back(service)

    run_in_turn(tmp_path, work)


def test_time_goes_on_when_a_try_to_come_back_fails(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        reader = await Client(host.next()).open()
        service = host.next(LIMITS)
        hello = Hello((2,), resume=reader.welcome.token, session=reader.welcome.session)

        async def broken(*_: object) -> None:
            raise BrokenPipeError

        before = service.sessions[reader.session.id].away_since
        with pytest.raises(BrokenPipeError):
            await service.open(hello, PeerCredentials(os.getpid(), os.getuid(), 0), broken, lambda: os.pidfd_open(os.getpid()))
        assert service.sessions[reader.session.id].away_since == before
        await open_until(service, reader, is_open=False)

    run_in_turn(tmp_path, work)


def test_engine_that_is_away_is_asked_about_again_and_never_ended_while_it_lives(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        engine = await Client(host.next()).open()
        await engine.ask(Join("cohort", "engine", "rank 0"))
        service = host.next(Limits(grace_s=0.1))
        await asyncio.sleep(0.5)
        assert service.sessions[engine.session.id].overdue
        await engine.come_back(service)
        assert not service.sessions[engine.session.id].overdue

    run_in_turn(tmp_path, work)
