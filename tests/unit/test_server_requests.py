"""Requests that cross each other, and clients that go away at a bad moment."""

import asyncio
import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from gms_core.client import WriteLease
from gms_core.errors import AcquireTimeout, InvalidArgument, QuotaExceeded
from gms_core.layout import Identity
from gms_core.protocol.channel import Channel
from gms_core.protocol.messages import Acquire, Allocate, Commit, Descriptors, Hello, Pin, Release, Waiting, WriteGranted
from gms_core.protocol.peer import PeerCredentials
from gms_core.server.limits import Limits
from gms_core.server.listener import Listener, bound_socket
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm.host import HostDriver
from tests.conftest import running_server

PAGE = 4096
MODEL = Identity({"content": "abc"})


class Client:
    """What a session of a service in this process has been told."""

    def __init__(self, service):
        self.service = service
        self.replies = []
        self.ended = asyncio.Event()

    async def open(self):
        peer = PeerCredentials(os.getpid(), os.getuid(), 0)
        self.session = await self.service.open(Hello((1,)), peer, self.send, lambda: os.pidfd_open(os.getpid()))
        return self

    async def send(self, message, _):
        self.replies.append(message)

    async def ask(self, request):
        await self.service.handle(self.session, request, self.ended)
        return self.replies[-1]


@contextlib.contextmanager
def service_in_this_process(limits=None):
    limits = limits or Limits()
    with contextlib.closing(Memory(HostDriver(64 * PAGE), limits)) as memory:
        yield Service("host", memory, limits)


async def turns_of_the_loop(number):
    for _ in range(number):
        await asyncio.sleep(0)


def test_session_is_forgotten_when_its_client_leaves_before_the_welcome(server):
    with server.connect() as observer:
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(server.socket))
                Channel(connection).send(Hello((1,)))
        while len(observer.status().sessions) > 1 and observer.status().uptime_s < 60:
            pass
        assert [session.id for session in observer.status().sessions] == [observer.welcome.session]


def test_new_pool_of_a_name_lives_when_a_waiter_that_is_gone_wakes_up_later():
    async def scenario():
        with service_in_this_process() as service:
            first, second = await Client(service).open(), await Client(service).open()
            waiting = asyncio.create_task(second.ask(Acquire("weights", "ro", MODEL, 60)))
            await turns_of_the_loop(10)
            assert isinstance(second.replies[-1], Waiting)
            service.close(second.session)  # the pool is forgotten before the waiter runs again
            assert service.published.pools == {}
            assert isinstance(await first.ask(Acquire("weights", "rw", MODEL, 0)), WriteGranted)
            second.ended.set()
            await asyncio.gather(waiting, return_exceptions=True)
            assert service.published.pools["weights"].lease_of(first.session.id) == "write"

    asyncio.run(scenario())


def test_waiter_is_answered_when_news_comes_as_its_time_ends():
    async def scenario():
        with service_in_this_process() as service:
            readers = [await Client(service).open() for _ in range(2)]
            await readers[0].ask(Acquire("weights", "rw", MODEL, 0))
            await readers[0].ask(Commit("weights", (), b"", MODEL))
            await readers[1].ask(Acquire("weights", "ro", MODEL, 0))
            writer = await Client(service).open()
            request = asyncio.create_task(writer.ask(Acquire("weights", "rw", MODEL, 0.1, replace=1)))
            await turns_of_the_loop(10)
            loop = asyncio.get_running_loop()
            loop.call_later(0.02, time.sleep, 0.3)  # so that a reader leaves in the very turn of the loop in which the wait is over
            loop.call_later(0.05, loop.call_soon, service.close, readers[1].session)
            with pytest.raises(AcquireTimeout):
                await asyncio.wait_for(request, 30)

    asyncio.run(scenario())


def test_status_is_told_when_memory_is_made_meanwhile():
    async def scenario():
        with service_in_this_process() as service:
            writer = await Client(service).open()
            await writer.ask(Acquire("weights", "rw", MODEL, 0))
            for _ in range(50):
                making = asyncio.create_task(writer.ask(Allocate("weights", (PAGE,))))
                while not making.done():
                    assert service.memory.bytes >= 0
                    await asyncio.sleep(0)
                await making

    asyncio.run(scenario())


ALLOCATE_AND_DIE = """
import sys, threading, time, os
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
session = connect(socket_path=Path(sys.argv[1]))
lease = session.acquire("weights", "rw", Identity({"content": "abc"}), timeout_s=1, slab_bytes=4096, memory_timeout_s=3600)
lease.arena.reserve_exact(40 * 4096)
print("writing", flush=True)
lease.arena.reserve_exact(80 * 4096)
"""


def test_next_waiter_writes_when_the_writer_is_killed_while_it_waits_for_memory(runtime_dir):
    with running_server(runtime_dir, host_memory=64 * PAGE) as server, server.connect() as session:
        command = [sys.executable, "-c", ALLOCATE_AND_DIE, str(server.socket)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "writing\n"
            while not session.status().waiting_for_memory:
                pass
            writer.kill()
        lease = session.acquire("weights", "rw", MODEL, timeout_s=20)
        assert isinstance(lease, WriteLease)
        assert session.status().allocated_bytes == 0
        lease.release()


@pytest.mark.parametrize("seconds", [math.nan, -1.0, math.inf])
def test_wait_for_memory_is_refused_when_it_has_no_end(seconds):
    async def scenario():
        with service_in_this_process() as service:
            writer = await Client(service).open()
            await writer.ask(Acquire("weights", "rw", MODEL, 0))
            with pytest.raises(InvalidArgument, match="a wait of"):
                await writer.ask(Allocate("weights", (PAGE,), seconds))

    asyncio.run(scenario())


def test_limit_of_allocations_holds_when_two_sessions_ask_at_once():
    async def scenario():
        with service_in_this_process(Limits(allocations=4)) as service:
            writers = [await Client(service).open() for _ in range(2)]
            for name, writer in zip("ab", writers, strict=True):
                await writer.ask(Acquire(name, "rw", MODEL, 0))
            asked = [writer.ask(Allocate(name, (PAGE,) * 3)) for name, writer in zip("ab", writers, strict=True)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(answer) for answer in answers] == [Descriptors, QuotaExceeded]
            assert len(service.memory) == 3

    asyncio.run(scenario())


def test_new_pool_is_made_when_others_are_only_remembered():
    async def scenario():
        with service_in_this_process(Limits(pools=2)) as service:
            client = await Client(service).open()
            for name in "abc":
                await client.ask(Acquire(name, "rw", MODEL, 0))
                committed = (await client.ask(Commit(name, (), b"", MODEL))).layout.generation
                await client.ask(Release(name))
                await client.ask(Acquire(name, "rw", MODEL, 0, replace=committed))
                await client.ask(Release(name))
            assert "c" in service.published.pools

    asyncio.run(scenario())


def test_draft_survives_when_its_metadata_are_over_the_limit():
    async def scenario():
        with service_in_this_process(Limits(metadata_bytes=100)) as service:
            writer = await Client(service).open()
            await writer.ask(Acquire("weights", "rw", MODEL, 0))
            with pytest.raises(QuotaExceeded, match="metadata"):
                await writer.ask(Commit("weights", (), b"x" * 100, MODEL))
            with pytest.raises(QuotaExceeded, match="metadata"):
                await writer.ask(Commit("weights", (), b"", Identity({"content": "x" * 100})))
            with pytest.raises(QuotaExceeded, match="metadata"):
                await writer.ask(Acquire("other", "rw", Identity({"content": "x" * 100}), 0))
            await writer.ask(Commit("weights", (), b"x" * 50, MODEL))

    asyncio.run(scenario())


def test_pins_are_refused_when_a_pool_has_as_many_as_it_may():
    async def scenario():
        with service_in_this_process(Limits(pins=1)) as service:
            writer = await Client(service).open()
            for number, pin in ((1, True), (2, False)):
                await writer.ask(Acquire("weights", "rw", MODEL, 0))
                await writer.ask(Commit("weights", (), b"", MODEL, pin=pin))
                if number == 1:
                    await writer.ask(Release("weights"))
            with pytest.raises(QuotaExceeded, match="pinned already"):
                await writer.ask(Pin("weights", 2))
            await writer.ask(Pin("weights", 1))
            await writer.ask(Release("weights"))
            await writer.ask(Acquire("weights", "rw", MODEL, 0))
            with pytest.raises(QuotaExceeded, match="pinned already"):
                await writer.ask(Commit("weights", (), b"", MODEL, pin=True))
            assert service.published.pools["weights"].lease_of(writer.session.id) == "write"

    asyncio.run(scenario())


class SlowToRelease(HostDriver):
    """Memory that is given up only when the test says so."""

    def __init__(self, capacity):
        super().__init__(capacity)
        self.may_release = threading.Event()

    def release(self, handle):
        assert self.may_release.wait(60)
        super().release(handle)


def test_others_are_served_when_giving_memory_up_takes_long():
    async def scenario():
        driver = SlowToRelease(64 * PAGE)
        with contextlib.closing(Memory(driver, Limits())) as memory:
            service = Service("host", memory, Limits())
            writer = await Client(service).open()
            await writer.ask(Acquire("weights", "rw", MODEL, 0))
            await writer.ask(Allocate("weights", (PAGE,) * 64))
            await writer.ask(Release("weights"))
            assert isinstance(await (await Client(service).open()).ask(Acquire("weights", "rw", MODEL, 0)), WriteGranted)
            driver.may_release.set()
            assert (await service.report()).memory_free == 64 * PAGE

    asyncio.run(scenario())


def test_server_ends_when_a_request_swallows_a_cancellation(runtime_dir):
    async def stubborn():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    async def test():
        with bound_socket(runtime_dir / "host.sock") as listening:
            memory = Memory(HostDriver(PAGE), Limits())
            with contextlib.closing(memory):
                listener = Listener(listening, Service("host", memory, Limits()), os.getuid())
                request = asyncio.create_task(stubborn())
                listener._tasks.add(request)
                request.add_done_callback(listener._tasks.discard)
                running = asyncio.create_task(listener.run())
                await asyncio.sleep(0)
                running.cancel()
                async with asyncio.timeout(30):
                    with contextlib.suppress(asyncio.CancelledError):
                        await running
                assert request.cancelled()

    asyncio.run(test())
