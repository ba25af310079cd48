"""The gate in its HTTP form, and the status page, as plain ASGI that any server of any engine can run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec

from gms_core.failover.status import EngineState
from gms_core.protocol.messages import Role

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

STATUS_PATH = "/gms/status"
HEALTH_PATH = "/health"
RETRY_AFTER_S = 1
TRY_AGAIN_LATER = 1013
"""The code of RFC 6455's registry with which a WebSocket is closed whose server cannot serve now."""
REFUSALS: dict[Role, str] = {
    "init": "is starting",
    "standby": "is a shadow: another engine serves",
    "promoting": "is about to serve",
    "fenced": "is at its end",
}


class StatusApp:
    """Answers nothing but ``/gms/status`` and ``/health``: the page of an engine whose own server does not listen yet.

    ``/gms/status`` is 200 and the truth at all times. ``/health`` is 200 if the engine is the primary, else 503.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or one life of a server."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await _refuse_websocket(self._state, scope, receive, send)
        elif scope["type"] == "http":
            path = _path(scope)
            if path not in (STATUS_PATH, HEALTH_PATH):
                await _answer(scope, send, HTTPStatus.NOT_FOUND, _error("not_found", f"this page has {STATUS_PATH} and {HEALTH_PATH}"))
            elif path == STATUS_PATH or self._state.role == "primary":
                await _status(self._state, scope, send)
            else:
                await _refuse(self._state, scope, send)


class HoldMiddleware:
    """Holds an app back until its engine is the primary, and gives it ``/gms/status`` at all times.

    Until then every request is answered with 503, but for those of ``through``; a WebSocket is refused, and the life of the server passes. Whatever
    has been let in is never touched again, so an engine that is demoted finishes what it has begun and takes no more.
    """

    def __init__(self, app: App, state: EngineState, *, through: tuple[str, ...] = ("/metrics",)) -> None:
        """Wrap an app.

        Args:
            app: The engine's.
            state: The engine's.
            through: Paths that the app itself answers at all times.
        """
        self._app = app
        self._state = state
        self._through = frozenset(through)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it through."""
        kind = scope["type"]
        if kind == "http" and _path(scope) == STATUS_PATH:
            await _status(self._state, scope, send)
        elif self._state.role == "primary" or kind not in ("http", "websocket") or (kind == "http" and _path(scope) in self._through):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await _refuse_websocket(self._state, scope, receive, send)
        else:
            await _refuse(self._state, scope, send)


def wrap_app(app: Any, wrap: Callable[[App], App]) -> App:
    """Put something around an app of Starlette or FastAPI and all of its middleware. What can still be added to that afterwards lies inside too.

    Args:
        app: The app.
        wrap: Makes what is around out of what is inside.

    Returns:
        What is inside. It can be called once the app has been.
    """
    stack: App | None = app.middleware_stack
    if stack is not None:
        app.middleware_stack = wrap(stack)
        return stack
    build: Callable[[], App] = app.build_middleware_stack
    built: list[App] = []

    def build_around() -> App:
        built.append(build())
        return wrap(built[-1])

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await built[-1](scope, receive, send)

    app.build_middleware_stack = build_around
    return inside


def _path(scope: Scope) -> str:
    """The path below the prefix under which a proxy has put the app."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def _error(kind: str, message: str) -> bytes:
    return msgspec.json.encode({"error": {"type": kind, "message": message}})


async def _status(state: EngineState, scope: Scope, send: Send) -> None:
    await _answer(scope, send, HTTPStatus.OK, msgspec.json.encode(state.snapshot()))


def _refusal(state: EngineState) -> bytes:
    role = state.role
    return _error(role, f"{state.engine} {REFUSALS.get(role, 'was not ready when the request came')}")


async def _refuse(state: EngineState, scope: Scope, send: Send) -> None:
    await _answer(scope, send, HTTPStatus.SERVICE_UNAVAILABLE, _refusal(state), (b"retry-after", str(RETRY_AFTER_S).encode()))


async def _refuse_websocket(state: EngineState, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse the handshake with 503 where the server can, and close with 1013 where it cannot."""
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or {}):
        body = _refusal(state)
        headers = [(b"content-type", b"application/json"), (b"retry-after", str(RETRY_AFTER_S).encode())]
        await send({"type": "websocket.http.response.start", "status": int(HTTPStatus.SERVICE_UNAVAILABLE), "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": f"{state.engine} is {state.role}"})


async def _answer(scope: Scope, send: Send, status: HTTPStatus, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = str(len(body)).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", length), (b"cache-control", b"no-store"), *headers]
    await send({"type": "http.response.start", "status": int(status), "headers": fields})
    await send({"type": "http.response.body", "body": b"" if scope.get("method") == "HEAD" else body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return
