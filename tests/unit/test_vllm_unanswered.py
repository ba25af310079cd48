"""Questions to an engine core that dies, without a vLLM: the client is that of a test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gms_vllm import unanswered
from gms_vllm.unanswered import wrap_call_utility


class Dead(Exception):
    """As vLLM's ``EngineDeadError``."""


class Client:
    """As vLLM's ``AsyncMPClient``."""

    def __init__(self) -> None:
        self.dead = False
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def ensure_alive(self) -> None:
        if self.dead:
            raise Dead

    async def _call_utility_async(self, method: str, *args: Any, engine: Any) -> Any:
        return [method, *args, engine, await self.answer]

    ask = wrap_call_utility(_call_utility_async)


@pytest.fixture(autouse=True)
def cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_COHORT", "some")
    monkeypatch.setattr(unanswered, "LOOK_S", 0.01)


async def asked(dies: bool) -> Any:
    client = Client()
    asking = asyncio.create_task(client.ask("tasks", 1, engine=b"e"))
    await asyncio.sleep(0.05)
    if dies:
        client.dead = True
    else:
        client.answer.set_result("generate")
    try:
        return await asyncio.wait_for(asking, 30)
    finally:
        assert client.answer.done(), "nobody waits for it any more"


def test_question_ends_when_the_engine_core_has_died() -> None:
    with pytest.raises(Dead):
        asyncio.run(asked(dies=True))


def test_question_is_answered_when_the_engine_core_takes_its_time() -> None:
    assert asyncio.run(asked(dies=False)) == ["tasks", 1, b"e", "generate"]


def test_nothing_is_watched_when_the_engine_does_not_fail_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GMS_COHORT")

    async def ask() -> None:
        client = Client()
        client.dead = True
        asking = asyncio.create_task(client.ask("tasks", engine=b"e"))
        await asyncio.sleep(0.05)
        assert not asking.done()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(ask())
