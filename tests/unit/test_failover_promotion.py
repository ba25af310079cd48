"""The way from the lock to the service: whatever comes between, the engine is the primary or it is at its end, and its servers know."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import CohortFenced, ConnectionLost, GmsError, NotPromoted, OutOfMemory, PromotionFailed
from gms_core.failover.flock import FileLock
from gms_core.failover.process import EngineProcess
from gms_core.failover.promotion import Promotion
from gms_core.failover.status import EngineState, Promoted
from gms_core.failover.threads import from_thread, in_thread

ME = EngineProcess("c0ffee", "engine-1", "api-server 0", ())


class Story:
    """An engine whose lock is a real file, and what has become of it."""

    def __init__(self, path: Path, promote: Callable[[], Awaitable[Promoted]] | None = None, **options: Any) -> None:
        self.state = EngineState("engine-1", "c0ffee", f"flock:{path}")
        self.lock = FileLock(path)
        self.departed: list[float] = []
        self.promotion = Promotion(ME, self.state, self.lock, promote or self.promote, self.departed.append, **options)
        self.state.ready()

    async def promote(self) -> Promoted:
        return Promoted({"0": 3}, {"bytes": 4096})

    async def when_detail(self, text: str) -> None:
        while text not in self.state.detail:
            await asyncio.sleep(0.001)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_engine_is_primary_and_tells_how_long_it_took_when_all_goes_well(path: Path) -> None:
    story = Story(path)
    asyncio.run(story.promotion.run())
    status = story.state.snapshot()
    assert (status.role, status.term, status.epochs) == ("primary", 1, {"0": 3})
    assert status.kv["bytes"] == 4096
    assert float(status.kv["promotion_s"]) >= 0
    assert story.departed == []
    story.lock.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no memory"), "could not get its memory: no memory"),
        (OutOfMemory("0 of 4 GiB are free"), "could not get its memory: 0 of 4 GiB are free"),
        (TimeoutError("the ranks did not answer"), "could not get its memory: the ranks did not answer"),
    ],
)
def test_engine_is_fenced_and_departs_when_its_memory_cannot_be_had(path: Path, error: Exception, message: str) -> None:
    async def promote() -> Promoted:
        raise error

    story = Story(path, promote)
    with pytest.raises(PromotionFailed) as caught:
        asyncio.run(story.promotion.run())
    assert caught.value.message == f"engine-1 was elected, but {message}"
    assert caught.value.__cause__ is error
    assert story.state.role == "fenced"
    assert story.state.ended_by is caught.value
    assert len(story.departed) == 1
    story.lock.close()


def test_memory_that_comes_too_late_is_not_waited_for_when_the_time_is_over(path: Path) -> None:
    cancelled = asyncio.Event()

    async def promote() -> Promoted:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return Promoted()

    story = Story(path, promote, timeout_s=0.01)
    with pytest.raises(PromotionFailed, match=r"did not have its memory within 0\.01 s"):
        asyncio.run(story.promotion.run())
    assert cancelled.is_set()
    story.lock.close()


def test_order_counts_when_it_came_before_the_engine_waited_for_it(path: Path) -> None:
    story = Story(path, autonomous=False)
    story.promotion.go()
    story.promotion.go()
    asyncio.run(story.promotion.run())
    assert story.state.role == "primary"
    story.lock.close()


def test_engine_goes_for_the_lock_when_the_order_comes_from_another_thread(path: Path) -> None:
    async def main() -> None:
        story = Story(path, autonomous=False)
        running = asyncio.create_task(story.promotion.run())
        await story.when_detail("gms failover promote")
        threading.Thread(target=story.promotion.go).start()
        await running
        story.lock.close()

    asyncio.run(main())


@pytest.mark.parametrize("error", [None, CohortFenced("rank 1 has died"), ConnectionLost("the server closed the connection")])
@pytest.mark.parametrize("wait", ["order", "lock", "memory"])
def test_wait_ends_with_the_reason_when_the_engine_is_ended(path: Path, wait: str, error: GmsError | None) -> None:
    async def promote() -> Promoted:
        promoting.set()
        await asyncio.sleep(3600)
        return Promoted()

    async def main() -> None:
        holder = FileLock(path)
        if wait == "lock":
            holder.acquire(ME)
        story = Story(path, promote, autonomous=wait != "order")
        running = asyncio.create_task(story.promotion.run())
        await (promoting.wait() if wait == "memory" else story.when_detail({"order": "gms failover promote", "lock": "has /"}[wait]))
        ender = threading.Thread(target=story.state.end, args=("it was ended", error))
        ender.start()
        with pytest.raises(type(error) if error else NotPromoted) as caught:
            await running
        assert caught.value is error or "it was ended" in caught.value.message
        assert story.state.detail == "it was ended"
        assert len(story.departed) == 1
        story.lock.close()
        holder.close()

    promoting = asyncio.Event()
    asyncio.run(main())


def test_engine_is_fenced_and_the_lock_can_be_given_up_when_the_wait_for_it_was_cancelled(path: Path) -> None:
    async def main() -> None:
        holder = FileLock(path)
        holder.acquire(ME)
        story = Story(path)
        running = asyncio.create_task(story.promotion.run())
        await story.when_detail("has /")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert story.state.role == "fenced"
        assert story.departed == []
        story.lock.close()
        holder.close()

    asyncio.run(main())
    third = FileLock(path)
    assert third.acquire(ME) == 2
    third.close()


def test_engine_ends_when_it_was_not_ready(path: Path) -> None:
    story = Story(path)
    story.state.end("stopped")
    with pytest.raises(NotPromoted, match="stopped"):
        asyncio.run(story.promotion.run())
    assert not path.exists()


class ScriptedLock:
    """A lock that is granted, or fails, when the test says so."""

    def __init__(self) -> None:
        self.granted = threading.Event()
        self.error: GmsError | None = None

    def open(self) -> None: ...

    def acquire(self, process: EngineProcess, on_wait: Callable[[str], None] | None = None) -> int:
        self.granted.wait()
        if self.error is not None:
            raise self.error
        return 5

    def resume(self, process: EngineProcess, socket: Path) -> None: ...

    def close(self) -> None:
        self.error = self.error or ConnectionLost("closed")
        self.granted.set()


STEPS = ["go", "grant", "refuse", "mapped", "fails", "server lost", "ended", "cancel", "turn"]


@given(steps=st.lists(st.sampled_from(STEPS), max_size=8), autonomous=st.booleans())
def test_run_returns_only_with_a_primary_when_anything_happens_in_any_order(steps: list[str], autonomous: bool) -> None:
    asyncio.run(_anything(steps, autonomous))


async def _anything(steps: list[str], autonomous: bool) -> None:
    memory: asyncio.Future[Promoted] = asyncio.get_running_loop().create_future()
    state, lock, departed = EngineState("engine-1", "c0ffee", "gms:primary"), ScriptedLock(), list[float]()
    promotion = Promotion(ME, state, lock, lambda: asyncio.shield(memory), departed.append, autonomous=autonomous)
    state.ready()
    running = asyncio.create_task(promotion.run())
    await asyncio.sleep(0)  # it has begun
    lost = ConnectionLost("the server closed the connection")

    def refuse() -> None:
        lock.error = OutOfMemory("no lock")
        lock.granted.set()

    acts: dict[str, Callable[[], object]] = {
        "go": promotion.go,
        "grant": lock.granted.set,
        "refuse": refuse,
        "mapped": lambda: memory.done() or memory.set_result(Promoted({"0": 1})),
        "fails": lambda: memory.done() or memory.set_exception(RuntimeError("no memory")),
        "server lost": lambda: state.server_lost(lost),
        "ended": lambda: state.end("stopped"),
        "cancel": running.cancel,
        "turn": lambda: None,
    }
    for step in steps:
        acts[step]()
        await asyncio.sleep(0.001 if step == "turn" else 0)
    if not running.done():
        acts["go"]()
        acts["grant"]()
        acts["mapped"]()
    try:
        await running
    except asyncio.CancelledError:
        assert "cancel" in steps
        assert state.role == "fenced"
    except GmsError:
        assert state.role == "fenced"
        assert len(departed) == 1
    else:
        # Whoever ends it does so in another turn of the loop, if at all.
        assert state.role == "primary" or "ended" in steps
        assert "primary" in state.snapshot().entered
        assert departed == []
    lock.close()
    if memory.done() and not memory.cancelled():
        memory.exception()


def test_error_is_raised_where_it_is_waited_for_when_a_thread_fails() -> None:
    def fails() -> int:
        raise ZeroDivisionError("in the thread")

    with pytest.raises(ZeroDivisionError, match="in the thread"):
        asyncio.run(in_thread(fails, name="test"))
    assert asyncio.run(in_thread(lambda: threading.current_thread().name, name="test")) == "test"


def test_thread_gets_what_the_loop_computes_when_it_asks() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()

        async def answer() -> int:
            return 42

        return await in_thread(from_thread(loop, answer), name="test")

    assert asyncio.run(main()) == 42
