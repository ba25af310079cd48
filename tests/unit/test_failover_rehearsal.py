"""What an engine is asked before it stands by, without an engine: the app and the calls are those of a test."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gms_core.errors import EngineFailed
from gms_core.failover.front_end import rehearsal
from gms_core.failover.front_end.rehearsal import rehearse


class Engine:
    """An app and its engine, which note what they are asked."""

    root_path = "/engine"

    def __init__(self, *, busy: int = 0, fails: bool = False, hangs: bool = False) -> None:
        self.said: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self._busy, self._fails, self._hangs = busy, fails, hangs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        self.said.append(scope["path"])
        self.bodies.append(json.loads(event["body"]))
        self.headers.append(dict(scope["headers"]))
        if self._fails:
            raise RuntimeError("somebody's middleware")
        answer = asyncio.ensure_future(self._answer(send))
        gone = asyncio.ensure_future(receive())  # as engines do, to notice a client that has gone away
        done, _ = await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        assert done == {answer}
        gone.cancel()

    async def _answer(self, send: Any) -> None:
        if self._hangs:
            await asyncio.Event().wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def rehearse(self, wanted: bool) -> None:
        self.said.append(("rehearse", wanted))

    async def forget(self) -> bool:
        self._busy -= 1
        self.said.append("forget")
        return self._busy < 0


PATHS = ["/v1/completions", "/v1/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("fails", [False, True])
def test_steps_are_allowed_for_the_requests_alone_and_nothing_of_them_stays(fails: bool) -> None:
    engine = Engine(busy=2, fails=fails)
    asyncio.run(rehearse(engine, engine, engine))
    assert engine.said == [("rehearse", True), *PATHS, "forget", "forget", "forget", ("rehearse", False)]


def test_requests_of_the_engines_own_come_first_and_as_they_are_when_there_are_some() -> None:
    engine = Engine()
    asyncio.run(rehearse(engine, engine, engine, own=[("/generate", {"text": "hello"})]))
    assert engine.said == [("rehearse", True), "/generate", *PATHS, "forget", ("rehearse", False)]
    assert engine.bodies[0] == {"text": "hello"}


def test_nobody_can_hit_the_blocks_of_a_rehearsal_in_the_prefix_cache() -> None:
    engine = Engine()
    asyncio.run(rehearse(engine, engine, engine))
    salts = {body["cache_salt"] for body in engine.bodies}
    assert len(salts) == len(PATHS)
    assert min(map(len, salts)) >= 32


def test_key_is_sent_when_the_app_wants_one() -> None:
    engine = Engine()
    asyncio.run(rehearse(engine, engine, engine, ["secret", "other"]))
    assert {headers[b"authorization"] for headers in engine.headers} == {b"Bearer secret"}
    asyncio.run(rehearse(engine, engine, engine))
    assert b"authorization" not in engine.headers[-1]


@pytest.mark.parametrize("engine", [Engine(hangs=True), Engine(busy=10**9)], ids=["never answers", "never forgets"])
def test_engine_fails_when_it_does_not_get_through(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "PATIENCE_S", 0.05)
    with pytest.raises(EngineFailed):
        asyncio.run(rehearse(engine, engine, engine))
