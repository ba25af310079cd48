"""The gate and the status page, called as an ASGI server calls them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gms_core.failover.http import HoldMiddleware, StatusApp, wrap_app
from gms_core.failover.status import EngineState, Promoted

App = Callable[..., Awaitable[None]]


def at(role: str) -> EngineState:
    """A state of this role."""
    state = EngineState("engine-1", "c0ffee", "gms:primary")
    steps = [state.ready, lambda: state.elected(7), lambda: state.promoted(Promoted({"0": 3}, {"bytes": 4096})), lambda: state.end("demoted")]
    for step in steps[: ["init", "standby", "promoting", "primary", "fenced"].index(role)]:
        step()
    return state


async def inner(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The engine's own app: it answers with the path."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": f"engine {scope['path']}".encode()})
    else:
        await send({"type": f"engine {scope['type']}"})


def call(app: App, scope: dict[str, Any], *events: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    left = list(events)

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    asyncio.run(app(scope, receive, send))
    return sent


def request(app: App, path: str, method: str = "GET", **scope: Any) -> tuple[int, dict[bytes, bytes], bytes]:
    start, body = call(app, {"type": "http", "method": method, "path": path, **scope}, {"type": "http.request", "body": b""})
    return start["status"], dict(start["headers"]), body["body"]


NOT_PRIMARY = ["init", "standby", "promoting", "fenced"]


@pytest.mark.parametrize("role", NOT_PRIMARY)
@pytest.mark.parametrize("path", ["/v1/completions", "/health", "/", "/metrics/", "/gms/statusx"])
def test_every_request_is_refused_when_the_engine_is_not_the_primary(role: str, path: str) -> None:
    status, headers, body = request(HoldMiddleware(inner, at(role)), path, "POST")
    assert status == 503
    assert headers[b"retry-after"] == b"1"
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert error["type"] == role
    assert "engine-1" in error["message"]


def test_metrics_and_the_servers_life_pass_when_the_engine_is_not_the_primary() -> None:
    gate = HoldMiddleware(inner, at("standby"))
    assert request(gate, "/metrics") == (200, {}, b"engine /metrics")
    assert call(gate, {"type": "lifespan"}) == [{"type": "engine lifespan"}]
    assert request(HoldMiddleware(inner, at("standby"), through=()), "/metrics")[0] == 503


def test_app_answers_when_the_engine_is_the_primary() -> None:
    state = at("promoting")
    gate = HoldMiddleware(inner, state)
    assert request(gate, "/v1/models")[0] == 503
    state.promoted(Promoted())
    assert request(gate, "/v1/models") == (200, {}, b"engine /v1/models")
    assert call(gate, {"type": "websocket", "path": "/v1/realtime"}) == [{"type": "engine websocket"}]
    state.end("demoted")
    assert request(gate, "/v1/models")[0] == 503


@pytest.mark.parametrize("role", [*NOT_PRIMARY, "primary"])
@pytest.mark.parametrize("page", [StatusApp, lambda state: HoldMiddleware(inner, state)])
def test_status_is_the_truth_whatever_the_role(role: str, page: Callable[[EngineState], App]) -> None:
    status, headers, body = request(page(at(role)), "/gms/status")
    assert (status, headers[b"cache-control"]) == (200, b"no-store")
    told = json.loads(body)
    assert {"role", "engine", "cohort", "lock", "term", "epochs", "since_s", "kv", "detail", "version"} <= told.keys()
    assert (told["role"], told["engine"], told["lock"]) == (role, "engine-1", "gms:primary")
    assert told["term"] == (0 if role in ("init", "standby") else 7)
    assert told["epochs"] == ({"0": 3} if role in ("primary", "fenced") else {})


@pytest.mark.parametrize("role", [*NOT_PRIMARY, "primary"])
def test_health_is_good_only_when_the_engine_is_the_primary(role: str) -> None:
    status, headers, _ = request(StatusApp(at(role)), "/health")
    assert status == (200 if role == "primary" else 503)
    assert (b"retry-after" in headers) == (role != "primary")


def test_status_page_has_nothing_else_when_asked() -> None:
    status, _, body = request(StatusApp(at("primary")), "/v1/models")
    assert status == 404
    assert json.loads(body)["error"]["type"] == "not_found"


def test_body_is_left_out_when_only_the_head_is_asked_for() -> None:
    status, headers, body = request(StatusApp(at("standby")), "/gms/status", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers[b"content-length"]) > 0


def test_prefix_of_a_proxy_is_no_part_of_the_path_when_there_is_one() -> None:
    gate = HoldMiddleware(inner, at("standby"))
    assert request(gate, "/llm/gms/status", root_path="/llm")[0] == 200
    assert request(gate, "/gms/status", root_path="/llm/")[0] == 200
    assert request(gate, "/llmx/gms/status", root_path="/llm")[0] == 503


@pytest.mark.parametrize("page", [StatusApp, lambda state: HoldMiddleware(inner, state)])
def test_websocket_is_refused_when_the_engine_is_not_the_primary(page: Callable[[EngineState], App]) -> None:
    connect = {"type": "websocket.connect"}
    sent = call(page(at("standby")), {"type": "websocket", "path": "/v1/realtime"}, connect)
    assert sent == [{"type": "websocket.close", "code": 1013, "reason": "engine-1 is standby"}]
    scope = {"type": "websocket", "path": "/v1/realtime", "extensions": {"websocket.http.response": {}}}
    start, body = call(page(at("standby")), scope, connect)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 503)
    assert json.loads(body["body"])["error"]["type"] == "standby"


def test_status_page_lives_as_long_as_its_server_when_that_starts_and_stops_it() -> None:
    events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    assert call(StatusApp(at("init")), {"type": "lifespan"}, *events) == [{"type": f"{event['type']}.complete"} for event in events]


class Application:
    """As Starlette's and FastAPI's: its middleware is put around it when it is first called, and nothing can be added to it any more."""

    def __init__(self) -> None:
        self.middleware_stack: App | None = None
        self.added: list[Callable[[App], App]] = []

    def build_middleware_stack(self) -> App:
        stack: App = inner
        for around in self.added:
            stack = around(stack)
        return stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        await self.middleware_stack(scope, receive, send)


def closed(app: App) -> App:
    """Middleware that lets only some through."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        scope["path"] = f"passed {scope['path']}"
        await app(scope, receive, send)

    return call


@pytest.mark.parametrize("built", [False, True])
def test_app_is_held_with_all_of_its_middleware_whether_that_is_built_or_not(built: bool) -> None:
    application, state = Application(), at("standby")
    application.added.append(closed)
    if built:
        application.middleware_stack = application.build_middleware_stack()
    inside = wrap_app(application, lambda app: HoldMiddleware(app, state))
    assert request(application, "/v1/completions")[0] == 503
    assert request(application, "/metrics")[2] == b"engine passed /metrics"
    assert request(inside, "/v1/completions")[2] == b"engine passed /v1/completions"


def test_middleware_is_held_too_when_it_is_added_after_the_gate() -> None:
    application, state = Application(), at("standby")
    wrap_app(application, lambda app: HoldMiddleware(app, state))
    assert application.middleware_stack is None  # the list is open
    application.added.append(closed)
    assert request(application, "/v1/completions")[0] == 503
    assert request(application, "/metrics")[2] == b"engine passed /metrics"
