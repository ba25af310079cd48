"""Fencing in a service of this process, with processes that exit when the test says so: late, in any order, or not at all."""

import asyncio
import contextlib
import mmap
import os
import signal
import threading
import time

import pytest

from gms_core import death_notice
from gms_core.errors import CohortFenced, FenceFailed, PermissionRefused, QuotaExceeded
from gms_core.layout import Identity
from gms_core.protocol.messages import (
    AwaitWhole,
    Depart,
    Done,
    Elect,
    Elected,
    Held,
    Hello,
    Hold,
    Instruct,
    Join,
    Joined,
    Plan,
    PlanDue,
    Planned,
    Provide,
    Waiting,
    WillNotify,
)
from gms_core.protocol.peer import PeerCredentials
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm.host import HostDriver

PAGE = 4096
KIND = Identity({"kind": "a"})
WAITERS = 0x80000000


class Signals:
    """Stands in for `signal.pidfd_send_signal`: notes who is killed, and refuses for those that the test names."""

    def __init__(self):
        self.killed = set()
        self.refused = set()

    def __call__(self, pidfd, number, *_):
        if number == signal.SIGKILL and os.fstat(pidfd).st_ino in self.refused:
            raise PermissionError(1, "Operation not permitted")
        if number == signal.SIGKILL:
            self.killed.add(os.fstat(pidfd).st_ino)


class Process:
    """A process with one session. Its pidfd is the end of a pipe, which becomes readable as a pidfd does: when the test says that it has exited."""

    def __init__(self, service, signals):
        self.service, self.signals = service, signals
        self.pidfd, self.life = os.pipe()
        self.inode = os.fstat(self.pidfd).st_ino
        self.replies = []
        self.page = None
        self.ended = asyncio.Event()

    async def join(self, cohort, *, serves=False):
        self.session = await self.service.open(Hello((1,)), PeerCredentials(os.getpid(), os.getuid(), 0), self.send, lambda: os.dup(self.pidfd))
        await self.ask(Join(cohort, f"engine of {cohort}", "process", 0.0, serves))
        return self

    async def send(self, message, descriptors):
        self.replies.append(message)
        if isinstance(message, Joined) and descriptors:
            self.page = mmap.mmap(descriptors[0], mmap.PAGESIZE)

    async def ask(self, request):
        await self.service.handle(self.session, request, self.ended)
        return self.replies[-1]

    def waits(self, request):
        return asyncio.create_task(self.ask(request))

    def exit(self):
        os.close(self.life)
        self.life = -1

    def close_connection(self):
        self.service.close(self.session)

    @property
    def killed(self):
        return self.inode in self.signals.killed

    def close(self):
        os.close(self.pidfd)
        if self.life >= 0:
            os.close(self.life)
        if self.page is not None:
            self.page.close()


class Engines:
    """A service, and processes that join it."""

    def __init__(self, service, signals, stack):
        self.service, self.signals, self.stack = service, signals, stack

    def process(self):
        return self.stack.enter_context(contextlib.closing(Process(self.service, self.signals)))

    async def join(self, cohort, **options):
        return await self.process().join(cohort, **options)

    async def user(self, cohort, front=()):
        """A process that uses the pool; the first one plans it."""
        process = await self.join(cohort)
        if isinstance(await process.ask(Plan("kv", KIND, 1.0)), PlanDue):
            assert isinstance(await process.ask(Provide("kv", b"", (PAGE, PAGE), 1.0, front)), Planned)
        return process


async def soon():
    """Let the loop do what there is to do."""
    await asyncio.sleep(0.02)


def notices():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gms-notice")]


@pytest.fixture
def play(monkeypatch):
    """Runs a scenario with the engines of a service."""
    signals = Signals()
    monkeypatch.setattr(signal, "pidfd_send_signal", signals)

    def run(scenario, limits=None):
        async def main():
            with contextlib.closing(Memory(HostDriver(64 * PAGE), limits or Limits())) as memory, contextlib.ExitStack() as stack:
                service = Service("host", memory, limits or Limits())
                try:
                    await asyncio.wait_for(scenario(Engines(service, signals, stack)), 30)
                finally:
                    service.stop()

        before = len(os.listdir("/proc/self/fd"))
        asyncio.run(main())
        assert len(os.listdir("/proc/self/fd")) == before

    return run


def test_third_engine_is_next_when_the_second_dies_while_it_waits_and_its_connection_is_not_closed_yet(play):
    async def scenario(engines):
        first, second, third = [await engines.user(name) for name in ("one", "two", "three")]
        owner, heir, last = [await engines.join(name) for name in ("one", "two", "three")]
        await first.ask(Hold("kv", 0.0))
        await owner.ask(Elect("primary", 0.0))
        held, elected = [], []
        for user, elector in ((second, heir), (third, last)):
            held.append(user.waits(Hold("kv", 20.0)))
            elected.append(elector.waits(Elect("primary", 20.0)))
            await soon()
        for process in (second, heir, first, owner):  # all of it before the server can see that a connection has ended
            process.exit()
        assert await held[1] == Held("kv", 2)
        assert await elected[1] == Elected("primary", 2)
        for refused in (held[0], elected[0]):
            with pytest.raises(CohortFenced):
                await refused

    play(scenario)


def test_third_engine_is_next_when_the_second_departs_while_it_waits(play):
    async def scenario(engines):
        first, second, third = [await engines.join(name) for name in ("one", "two", "three")]
        other = await engines.join("two")
        await first.ask(Elect("primary", 0.0))
        waiting = []
        for process in (second, third):
            waiting.append(process.waits(Elect("primary", 20.0)))
            await soon()
        await other.ask(Depart(20.0))
        with pytest.raises(CohortFenced, match="orderly"):
            await waiting[0]
        with pytest.raises(CohortFenced, match="orderly"):
            await other.ask(Elect("primary", 20.0))
        first.exit()
        assert await waiting[1] == Elected("primary", 2)

    play(scenario)


def test_another_engine_plans_when_the_planner_departs(play):
    async def scenario(engines):
        first, second = await engines.join("one"), await engines.join("two")
        await first.ask(Plan("kv", KIND, 1.0))
        planning = second.waits(Plan("kv", KIND, 20.0))
        await soon()
        await first.ask(Depart(20.0))
        assert await planning == PlanDue("kv")

    play(scenario)


def test_planned_memory_is_freed_when_its_engine_began_to_end_before_it_was_there(play):
    async def scenario(engines):
        planner, other = await engines.join("one"), await engines.join("one")
        await planner.ask(Plan("kv", KIND, 1.0))
        providing = planner.waits(Provide("kv", b"", (PAGE,), 1.0))
        await asyncio.sleep(0)
        await other.ask(Depart(20.0))
        with pytest.raises(Exception, match="does not plan"):
            await providing
        assert len(engines.service.memory) == 0

    play(scenario)


def test_rest_of_the_memory_waits_for_the_proof_when_the_holder_of_a_bridge_dies_too(play):
    async def scenario(engines):
        rank, front = await engines.user("one", front=(0,)), await engines.join("one", serves=True)
        second, second_front = await engines.user("two"), await engines.join("two", serves=True)
        third = await engines.user("three")
        await rank.ask(Hold("kv", 0.0, bridge=True))
        waiting = []
        for process in (second, third):
            waiting.append(process.waits(Hold("kv", 20.0, bridge=True)))
            await soon()
        front.exit()
        assert await waiting[0] == Held("kv", 2, turn=1, whole=False)
        assert rank.killed
        whole = second.waits(AwaitWhole("kv", 20.0))
        await soon()
        second_front.exit()
        second.exit()
        await soon()
        with pytest.raises(CohortFenced):
            await whole
        assert not waiting[1].done(), "both fronts were given to engines that may have a process left"
        assert third.replies[-1] == Waiting("processes of engine of one are still ending")
        rank.exit()
        assert await waiting[1] == Held("kv", 3, turn=1, whole=True)

    play(scenario)


def test_grant_says_what_was_granted_when_the_rest_was_proven_before_it_was_sent(play):
    async def scenario(engines):
        rank, front = await engines.user("one", front=(0,)), await engines.join("one", serves=True)
        second = await engines.user("two")
        await rank.ask(Hold("kv", 0.0, bridge=True))
        waiting = second.waits(Hold("kv", 20.0, bridge=True))
        await soon()
        front.exit()
        rank.exit()
        assert await waiting == Held("kv", 2, turn=1, whole=False)

    play(scenario)


def test_preferred_engine_is_granted_the_memory_first_when_an_operator_says_so(play):
    async def scenario(engines):
        first, second, third = [await engines.user(name) for name in ("one", "two", "three")]
        await first.ask(Hold("kv", 0.0))
        waiting = []
        for process in (second, third):
            waiting.append(process.waits(Hold("kv", 20.0)))
            await soon()
        await first.ask(Instruct("three", "promote"))
        first.exit()
        assert await waiting[1] == Held("kv", 2)
        waiting[0].cancel()

    play(scenario)


def test_lock_is_granted_when_its_owner_exits_and_another_process_of_the_engine_cannot_be_ended(play):
    async def scenario(engines):
        owner, stuck = await engines.user("one"), await engines.join("one")
        elector, heir = await engines.join("two"), await engines.user("two")
        await owner.ask(Hold("kv", 0.0))
        await owner.ask(Elect("primary", 0.0))
        elected, held = elector.waits(Elect("primary", 20.0)), heir.waits(Hold("kv", 20.0))
        await soon()
        engines.signals.refused.add(stuck.inode)
        stuck.close_connection()
        with pytest.raises(FenceFailed, match="not permitted"):
            await held
        await soon()
        assert not elected.done()
        assert "cannot be ended" in elector.replies[-1].reason
        owner.exit()
        assert await elected == Elected("primary", 2)

    play(scenario)


def test_engine_waits_until_its_own_time_is_over_when_the_exit_of_another_is_late(play):
    async def scenario(engines):
        first, second, third = [await engines.user(name) for name in ("one", "two", "three")]
        await first.ask(Hold("kv", 0.0))
        first.close_connection()
        impatient, patient = second.waits(Hold("kv", 0.5)), third.waits(Hold("kv", 20.0))
        began = time.monotonic()
        with pytest.raises(FenceFailed, match="have not exited"):
            await impatient
        assert time.monotonic() - began > 0.4
        assert not patient.done()
        first.exit()
        assert await patient == Held("kv", 2)

    play(scenario, Limits(exit_s=0.1))


@pytest.mark.parametrize("missing", ["page", "watch"])
def test_cohort_is_joined_and_ended_as_any_other_when_a_process_could_not_join_it_half_way(play, monkeypatch, missing):
    def no_page():
        raise OSError(24, "Too many open files")

    async def scenario(engines):
        process, other = engines.process(), await engines.join("one")
        with monkeypatch.context() as patch:
            if missing == "page":
                patch.setattr(death_notice, "create", no_page)
            else:
                patch.setattr(asyncio.get_running_loop(), "add_reader", lambda *_: no_page())
            with pytest.raises(QuotaExceeded):
                await process.join("one")
        process.close_connection()
        await other.ask(Elect("primary", 0.0))
        assert [len(cohort.members) for cohort in engines.service.engines.status()] == [1]
        other.close_connection()
        assert other.killed
        other.exit()
        await soon()
        assert engines.service.engines.status() == ()

    play(scenario)


def test_process_is_refused_when_it_has_joined_already_and_is_watched_as_before(play):
    async def scenario(engines):
        process, waiting = await engines.join("one"), await engines.join("two")
        await process.ask(Elect("primary", 0.0))
        with pytest.raises(Exception, match="already"):
            await process.ask(Join("one", "engine", "process"))
        elected = waiting.waits(Elect("primary", 20.0))
        process.exit()
        assert await elected == Elected("primary", 2)

    play(scenario)


def test_use_of_a_pool_ends_with_the_session_when_its_engine_cannot_be_ended(play, monkeypatch):
    async def scenario(engines):
        process = await engines.user("one")

        def broken(_):
            raise PermissionRefused("the test says so")

        with monkeypatch.context() as patch:
            patch.setattr(engines.service.engines, "closed", broken)
            with pytest.raises(PermissionRefused):
                process.close_connection()
        assert engines.service.retained.status()[0].users == ()

    play(scenario)


def test_no_thread_waits_for_a_notice_when_the_process_has_exited_without_one(play):
    async def scenario(engines):
        process = await engines.join("one")
        process.page[:4] = (WAITERS | 7).to_bytes(4, "little")  # as an engine may leave it that is no engine of ours
        assert await process.ask(WillNotify()) == Done()
        await soon()
        assert notices()
        process.exit()
        while notices():
            await asyncio.sleep(0.005)

    play(scenario)


def test_exit_is_noticed_when_no_thread_can_be_started_for_the_notice(play, monkeypatch):
    def no_thread(_):
        raise RuntimeError("can't start new thread")

    async def scenario(engines):
        process = await engines.join("one")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert await process.ask(WillNotify()) == Done()
        process.exit()
        await soon()
        assert engines.service.engines.status() == ()

    play(scenario)
