"""The gate in its port form, with real HTTP servers that share an address: who listens, who does not, and what becomes of an address that is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from gms_core.engine_config import FailoverConfig
from gms_core.errors import ConfigurationError
from gms_core.failover.front_end.gate import Gate, ListenLast, bind_port
from gms_core.failover.http import Receive, Scope, Send
from gms_vllm.gate import is_set_up, set_up

pytestmark = pytest.mark.engine

PORT_FORM = FailoverConfig()
OTHER_FORM = FailoverConfig(gate="503")


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def bound(args: Namespace, *, reuse_port: bool) -> tuple[str, socket.socket]:
    """What vLLM's ``setup_server`` does, without its checks."""
    if args.uds:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(args.uds)
        return f"unix:{args.uds}", listener
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", args.port))
    return f"http://127.0.0.1:{args.port}", listener


def app_that_says(name: str) -> Callable[[Scope, Receive, Send], Any]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                event = await receive()
                await send({"type": f"{event['type']}.complete"})
                if event["type"] == "lifespan.shutdown":
                    return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(name)).encode())]})
        await send({"type": "http.response.body", "body": name.encode()})

    return app


def ignoring_all_but_http(app: Any) -> Any:
    """Middleware as many have it."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await app(scope, receive, send)

    return middleware


def refusing_all_but_http(app: Any) -> Any:
    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await app(scope, receive, send)

    return middleware


def plain(app: Any) -> Any:
    return app


@contextlib.asynccontextmanager
async def http_server(name: str, listener: socket.socket, gate: Gate, middleware: Any = plain) -> AsyncIterator[uvicorn.Server]:
    server = uvicorn.Server(uvicorn.Config(ListenLast(middleware(app_that_says(name)), gate), log_config=None))
    serving = asyncio.create_task(server._serve([listener]))  # what `serve` does, but for the signals
    try:
        yield server
    finally:
        server.should_exit = True
        gate.let_go()
        await serving
        listener.close()


async def asked(port: int) -> str:
    """What whoever listens says; empty if nobody does."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return ""
    writer.write(b"GET / HTTP/1.1\r\nHost: gate\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.rpartition(b"\r\n\r\n")[2].decode()


@pytest.mark.parametrize("middleware", [ignoring_all_but_http, refusing_all_but_http])
def test_nobody_listens_early_when_middleware_knows_nothing_of_starting(middleware: Any) -> None:
    async def test() -> None:
        _, listener = set_up(bound, Namespace(uds=None, port=0), PORT_FORM, reuse_port=False)
        port, gate = listener.getsockname()[1], Gate(listener, None, 16)
        async with http_server("late", listener, gate, middleware):
            await asyncio.wait_for(gate.reached(), 10)
            assert await asked(port) == ""
            gate.open()
            assert await asked(port) == "late"

    asyncio.run(test())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_port_is_free_when_an_engine_has_gone_and_a_child_that_it_forked_lives_on(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def test() -> None:
        listener = bind_port("127.0.0.1", 0, shared=True)
        gate = Gate(listener, None, 10)
        gate.open()
        serving = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=listener)
        here, there = socket.socketpair()
        child = os.fork()
        if child == 0:
            here.close()
            there.send(b"running")
            there.recv(1)
            os._exit(0)
        there.close()
        try:
            assert here.recv(7) == b"running"
            serving.close()
            await serving.wait_closed()
            listener.close()
            port = int(gate.address.rpartition(":")[2])
            with contextlib.closing(bind_port("127.0.0.1", port, shared=True)) as next_one:
                Gate(next_one, None, 10).check_alone()
        finally:
            here.close()
            assert os.waitpid(child, 0)[1] == 0

    run(test())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_gate_tells_when_somebody_else_listens_at_the_shared_port(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as sockets:
        mine, other = (sockets.enter_context(socket.socket(family)) for _ in range(2))
        for one in (mine, other):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((host, mine.getsockname()[1] if one is other else 0))
        gate = Gate(mine, None, 16)
        gate.check_alone()
        other.listen()
        with pytest.raises(ConfigurationError, match="another server listens at"):
            gate.check_alone()
        other.close()
        gate.check_alone()


@in_a_loop
async def test_two_servers_have_one_port_when_only_one_of_them_listens() -> None:
    _, first_listener = set_up(bound, Namespace(uds=None, port=0), PORT_FORM, reuse_port=False)
    port = first_listener.getsockname()[1]
    _, second_listener = set_up(bound, Namespace(uds=None, port=port), PORT_FORM, reuse_port=False)
    assert is_set_up()
    first, second = Gate(first_listener, None, 16), Gate(second_listener, None, 16)
    assert first.address == f"127.0.0.1:{port}"
    async with http_server("first", first_listener, first) as serving, http_server("second", second_listener, second):
        await first.reached()
        await second.reached()
        assert await asked(port) == ""
        first.open()
        assert {await asked(port) for _ in range(20)} == {"first"}
        first.shut(serving.servers)
        assert await asked(port) == ""
        second.open()
        assert {await asked(port) for _ in range(20)} == {"second"}


@in_a_loop
async def test_nobody_listens_when_a_gate_is_shut_as_soon_as_it_is_served() -> None:
    _, listener = set_up(bound, Namespace(uds=None, port=0), PORT_FORM, reuse_port=False)
    port, gate = listener.getsockname()[1], Gate(listener, None, 16)
    async with http_server("shut", listener, gate) as server:
        await gate.reached()
        gate.open()
        await gate.served_by(server)
        gate.shut(server.servers)
        for _ in range(20):
            assert await asked(port) == ""


@in_a_loop
async def test_connections_wait_when_the_gate_opens_before_the_server_accepts() -> None:
    _, listener = set_up(bound, Namespace(uds=None, port=0), PORT_FORM, reuse_port=False)
    gate = Gate(listener, None, 16)
    gate.open()
    asking = asyncio.create_task(asked(listener.getsockname()[1]))
    async with http_server("late", listener, gate):
        assert await asking == "late"


@in_a_loop
async def test_path_changes_hands_when_a_gate_opens(runtime_dir: Path) -> None:
    path = runtime_dir / "api.sock"
    address, listener = set_up(bound, Namespace(uds=str(path), port=0), PORT_FORM, reuse_port=False)
    assert address == f"unix:{path}"
    assert list(runtime_dir.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    sibling = listener.dup()
    Gate(listener, path, 16).open()
    Gate(sibling, path, 16).open()
    assert list(runtime_dir.iterdir()) == [path]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    sibling.close()


def test_path_is_replaced_at_once_when_every_engine_has_its_own(runtime_dir: Path) -> None:
    path = runtime_dir / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    arguments = Namespace(uds=str(path), port=0)
    _, listener = set_up(bound, arguments, OTHER_FORM, reuse_port=False)
    assert arguments.uds == str(path)
    listener.listen()
    with pytest.raises(ConfigurationError, match="another server answers"):
        set_up(bound, Namespace(uds=str(path), port=0), OTHER_FORM, reuse_port=False)
    listener.close()


def test_path_is_refused_when_it_cannot_be_taken_later(runtime_dir: Path) -> None:
    taken = runtime_dir / "file"
    taken.write_text("")
    for path, message in ((taken, "no socket"), (runtime_dir / "none" / "api.sock", "written"), (runtime_dir / ("a" * 100), "too long")):
        with pytest.raises(ConfigurationError, match=message):
            set_up(bound, Namespace(uds=str(path), port=0), PORT_FORM, reuse_port=False)
