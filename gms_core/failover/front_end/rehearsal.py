"""A few requests through the whole engine before it stands by, so that nothing in it runs for the first time when somebody waits for the answer.

An engine's warm-up ends at its ranks. What the first request passes besides, from HTTP over the tokenizer and the scheduler to the detokenizer, is
code that has never run in this process, and takes several times as long as for the second one.

The requests compute on scratch memory, so nothing of them may stay: the prefix cache is emptied before the engine stands by. Those of OpenAI's API
have a salt of their own besides, with which nobody finds their blocks.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from gms_core.engine_log import log
from gms_core.errors import EngineFailed
from gms_core.failover.front_end.engine import EngineCalls
from gms_core.failover.http import App, Event

PATIENCE_S = 300.0
"""Seconds that all of it may take: on a busy CPU each request may have something to compile."""
_AGAIN_S = 0.01
_TEXT = "hello"
_TOKENS = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}
Request = tuple[str, Mapping[str, Any]]
"""Path and body."""
_REQUESTS: tuple[Request, ...] = (
    ("/v1/completions", {"prompt": _TEXT, **_TOKENS}),
    ("/v1/completions", {"prompt": _TEXT, **_TOKENS, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": _TEXT}], **_TOKENS, "stream": True}),
)
"""What clients ask for most. A model that has no such endpoint, or no chat template, refuses."""


async def rehearse(app: Any, stack: App, engine: EngineCalls, api_keys: Sequence[str] = (), own: Sequence[Request] = ()) -> None:
    """Ask the engine, and make it forget what it was asked. Nobody else may be able to ask it meanwhile. To be run in the event loop that serves.

    Args:
        app: The engine's ``FastAPI`` or ``Starlette``, which speaks the API of OpenAI.
        stack: Its middleware and all that is in it, without what holds requests back.
        engine: Lets its ranks compute meanwhile, and forgets.
        api_keys: That the app wants one of.
        own: Requests of the engine's own API, which come first.

    Raises:
        EngineFailed: It does not answer in time, or does not forget.
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            await engine.rehearse(True)
            statuses = []
            for path, body in (*own, *((path, {**body, "cache_salt": secrets.token_hex(16)}) for path, body in _REQUESTS)):
                statuses.append(await _ask(app, stack, path, body, api_keys))
            if HTTPStatus.OK not in statuses:
                log().info("no rehearsed request was answered (%s): the first one after a promotion may be slow", ", ".join(map(str, statuses)))
            while not await engine.forget():  # the last request's blocks are still being given back
                await asyncio.sleep(_AGAIN_S)
            await engine.rehearse(False)
    except TimeoutError:
        raise EngineFailed(f"this engine has not answered and forgotten {len(own) + len(_REQUESTS)} short requests within {PATIENCE_S:g} s") from None


async def _ask(app: Any, stack: App, path: str, body: Mapping[str, Any], api_keys: Sequence[str]) -> int:
    """The status of an answer, once all of it is there; 0 if there was none."""
    content = json.dumps(body).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if api_keys:
        headers.append((b"authorization", f"Bearer {api_keys[0]}".encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": app.root_path or "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", os.getpid() % 2**16),
        "server": ("127.0.0.1", 0),
        "state": {},
        "app": app,
    }
    request: list[Event] = [{"type": "http.request", "body": content, "more_body": False}]
    never = asyncio.Event()
    status = 0

    async def receive() -> Event:
        if request:
            return request.pop()
        await never.wait()  # this client does not go away
        raise AssertionError

    async def send(event: Event) -> None:
        nonlocal status
        if event["type"] == "http.response.start":
            status = int(event["status"])

    try:
        await stack(scope, receive, send)
    except Exception as error:  # noqa: BLE001 - an app may have middleware of anybody's; an engine that has died says so by itself
        log().warning("a rehearsed request to %s has failed: %r", path, error)
    return status
