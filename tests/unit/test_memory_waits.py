"""Waiting for memory at a real server: in order, bounded, visible, and in nobody else's way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

import pytest

from gms_core.errors import OutOfMemory, QuotaExceeded
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.observer import Observer
from gms_core.vmm.driver import Handle
from gms_core.vmm.host import HostDriver

PAGE = 4096


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


class SlowDriver(HostDriver):
    """Makes nothing before it is told to."""

    def __init__(self) -> None:
        super().__init__(64 * PAGE)
        self.asked, self.go = threading.Event(), threading.Event()

    def create(self, size: int) -> Handle:
        self.asked.set()
        assert self.go.wait(30)
        return super().create(size)


def test_status_is_told_at_once_when_a_long_allocation_is_under_way() -> None:
    async def scenario() -> None:
        driver = SlowDriver()
        with contextlib.closing(Memory(driver, Limits())) as memory:
            making = asyncio.create_task(memory.create([PAGE], 0, asyncio.Event()))
            await until(driver.asked.is_set)
            try:
                assert (await asyncio.wait_for(memory.info(), 30)).total == 64 * PAGE
                assert not making.done()
            finally:
                driver.go.set()
            assert len(await making) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("steps", range(8))
def test_question_ends_when_it_is_cancelled_at_whatever_moment(steps: int) -> None:
    async def test() -> None:
        with contextlib.closing(Memory(HostDriver(2 * PAGE), Limits())) as memory:
            asking = asyncio.create_task(memory.info())
            await asyncio.sleep(0)
            memory._thread.submit(int).result()  # the driver's thread has answered, and the loop does not know it yet
            for _ in range(steps):
                await asyncio.sleep(0)
            if asking.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await asking

    asyncio.run(test())


def test_requests_are_served_in_order_when_memory_is_released() -> None:
    async def scenario() -> None:
        with contextlib.closing(Memory(HostDriver(8 * PAGE), Limits())) as memory:
            held = await memory.create([PAGE] * 8, 0, asyncio.Event())
            served: list[int] = []

            async def ask(number: int) -> None:
                await memory.create([2 * PAGE], 60, asyncio.Event())
                served.append(number)

            waiting = []
            for number in range(4):
                waiting.append(asyncio.create_task(ask(number)))
                await until(lambda number=number: len(memory.waits()) == number + 1)  # type: ignore[misc]
            assert [one.bytes for one in memory.waits()] == [2 * PAGE] * 4
            for identifier, _ in held:
                memory.free([identifier])
            await asyncio.gather(*waiting)
            assert served == [0, 1, 2, 3]
            assert memory.waits() == ()

    asyncio.run(scenario())


def test_small_request_passes_a_large_one_when_there_is_room_for_it_alone() -> None:
    async def scenario() -> None:
        with contextlib.closing(Memory(HostDriver(8 * PAGE), Limits())) as memory:
            held = await memory.create([PAGE] * 4, 0, asyncio.Event())
            large = asyncio.create_task(memory.create([6 * PAGE], 60, asyncio.Event()))
            await until(lambda: len(memory.waits()) == 1)
            await memory.create([PAGE], 0, asyncio.Event())
            assert memory.waits()[0].passed == 1
            memory.free(identifier for identifier, _ in held)
            assert len(await large) == 1

    asyncio.run(scenario())


def test_waits_are_told_in_order_when_they_stand_in_line() -> None:
    async def scenario() -> None:
        with contextlib.closing(Memory(HostDriver(2 * PAGE), Limits())) as memory:
            observer = Observer()
            memory.tell = observer.tell
            held = await memory.create([PAGE, PAGE], 0, asyncio.Event(), "a")
            assert observer.log.last == 0, "what is served at once has not waited"
            with pytest.raises(OutOfMemory):
                await memory.create([PAGE], 0, asyncio.Event(), "a")
            assert observer.log.last == 0, "nor has what does not want to wait"
            gone, waiting = asyncio.Event(), []
            for number, (pool, ended) in enumerate((("b", asyncio.Event()), ("c", asyncio.Event()), ("d", gone))):
                waiting.append(asyncio.create_task(memory.create([PAGE], 60, ended, pool)))
                await until(lambda number=number: len(memory.waits()) == number + 1)  # type: ignore[misc]
            begun = [(event.kind, event.subject, event.facts) for event in observer.log.after(0, 9)[0]]
            assert begun == [("pool_memory_wait_begun", pool, {"bytes": PAGE}) for pool in "bcd"]
            gone.set()
            for identifier, _ in held:
                memory.free([identifier])
            await asyncio.gather(*waiting, return_exceptions=True)
            over = {event.subject: (event.kind, event.facts["outcome"]) for event in observer.log.after(3, 9)[0]}
            ended_by = {"b": "there is room", "c": "there is room", "d": "nobody wants them any more"}
            assert over == {pool: ("pool_memory_wait_ended", outcome) for pool, outcome in ended_by.items()}
            assert observer.log.last == 6
            assert memory.waits() == ()

    asyncio.run(scenario())


def test_request_is_refused_at_once_when_too_many_wait() -> None:
    async def scenario() -> None:
        with contextlib.closing(Memory(HostDriver(2 * PAGE), Limits(memory_waiters=2))) as memory:
            await memory.create([2 * PAGE], 0, asyncio.Event())
            ended = asyncio.Event()
            waiting = [asyncio.create_task(memory.create([PAGE], 60, ended)) for _ in range(2)]
            await until(lambda: len(memory.waits()) == 2)
            with pytest.raises(OutOfMemory, match="2 requests wait for memory already"):
                await memory.create([PAGE], 60, asyncio.Event())
            ended.set()  # their clients go: they make room, and cost nothing
            assert {type(answer) for answer in await asyncio.gather(*waiting, return_exceptions=True)} == {OutOfMemory}
            assert memory.waits() == ()

    asyncio.run(scenario())


def test_nothing_is_left_when_whoever_waited_is_cancelled_while_its_memory_is_made() -> None:
    async def scenario() -> None:
        driver = SlowDriver()
        with contextlib.closing(Memory(driver, Limits())) as memory:
            making = asyncio.create_task(memory.create([PAGE], 0, asyncio.Event()))
            await until(driver.asked.is_set)
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
            driver.go.set()
            await memory.create([PAGE], 0, asyncio.Event())
            await until(lambda: len(memory) == 1)

    asyncio.run(scenario())


def test_others_are_served_when_one_that_should_fit_cannot_be_made() -> None:
    class Fragmented(HostDriver):
        def create(self, size: int) -> Handle:
            if size > PAGE:
                raise OutOfMemory("the driver says no")
            return super().create(size)

    async def scenario() -> None:
        with contextlib.closing(Memory(Fragmented(8 * PAGE), Limits())) as memory:
            ended = asyncio.Event()
            large = asyncio.create_task(memory.create([2 * PAGE], 60, ended))
            await until(lambda: len(memory.waits()) == 1)
            assert len(await memory.create([PAGE], 0, asyncio.Event())) == 1
            ended.set()
            with pytest.raises(OutOfMemory):
                await large

    asyncio.run(scenario())


def test_wait_is_over_in_its_time_when_nothing_is_released() -> None:
    async def scenario() -> None:
        with contextlib.closing(Memory(HostDriver(2 * PAGE), Limits(allocations=3))) as memory:
            await memory.create([PAGE, PAGE], 0, asyncio.Event())
            began, told = time.monotonic(), []
            with pytest.raises(OutOfMemory, match="no room for 4096 bytes: 0 are free"):
                await memory.create([PAGE], 0.2, asyncio.Event(), on_wait=told.append)
            assert time.monotonic() - began >= 0.2
            assert told == ["no room for 4096 bytes: 0 are free"]
            with pytest.raises(QuotaExceeded):
                await memory.create([PAGE, PAGE], 0, asyncio.Event())

    asyncio.run(scenario())
