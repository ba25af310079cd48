"""Connections of agents, over real sockets: what is said by others, again, or in another order is not taken."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gms_core.errors import ConfigurationError, ConnectionLost, GmsError, PermissionRefused
from gms_core.failover.nodes import channel
from gms_core.failover.nodes.channel import MAGIC, MOST_BYTES, Channel, accept, connect
from gms_core.failover.nodes.secret import read_secret

SECRET = b"a secret of the engine"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def with_listener(talk: Callable[[int, asyncio.Future[Channel]], Awaitable[None]], secret: bytes = SECRET) -> None:
    """Run a conversation with something that listens, and whose end of the connection is a future's."""

    async def run() -> None:
        accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()

        async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                found = await accept(reader, writer, secret)
            except GmsError as error:
                if not accepted.done():
                    accepted.set_exception(error)
            else:
                accepted.set_result(found)

        async with await asyncio.start_server(called, "127.0.0.1", 0) as server:
            await asyncio.wait_for(talk(server.sockets[0].getsockname()[1], accepted), 30)
        if accepted.done() and accepted.exception() is None:
            accepted.result().close()

    asyncio.run(run())


def test_both_hear_each_other_when_they_know_the_secret() -> None:
    async def talk(port: int, accepted: asyncio.Future[Channel]) -> None:
        mine, theirs = await connect("127.0.0.1", port, SECRET), await accepted
        for message in (b"", b"one", b"x" * MOST_BYTES):
            await mine.send(message)
            assert await theirs.receive() == message
            await theirs.send(message)
            assert await mine.receive() == message
        mine.close()
        with pytest.raises(ConnectionLost):
            await theirs.receive()

    with_listener(talk)


def test_caller_is_refused_when_its_secret_is_another() -> None:
    async def talk(port: int, accepted: asyncio.Future[Channel]) -> None:
        with pytest.raises(ConnectionLost, match="is its secret the same"):
            await connect("127.0.0.1", port, b"some other secret")
        with pytest.raises(PermissionRefused, match="does not know the secret"):
            await accepted

    with_listener(talk)


def test_listener_is_refused_when_it_says_anything_for_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        done = asyncio.Event()

        async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeting = await reader.readexactly(len(MAGIC) + 32)
            writer.write(greeting)  # the caller's own number
            writer.write(await reader.readexactly(32))  # and its own proof
            await writer.drain()
            await reader.read()
            writer.close()
            done.set()

        async with await asyncio.start_server(called, "127.0.0.1", 0) as server:
            with pytest.raises(PermissionRefused, match="does not know the secret"):
                await connect("127.0.0.1", server.sockets[0].getsockname()[1], SECRET)
            await done.wait()

    asyncio.run(run())


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 40, MAGIC[:-2] + b"9\n" + b"0" * 32])
def test_stranger_is_refused_when_it_speaks_something_else(greeting: bytes) -> None:
    async def talk(port: int, accepted: asyncio.Future[Channel]) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(greeting)
        with pytest.raises(PermissionRefused, match="is no agent of this version"):
            await accepted
        writer.close()

    with_listener(talk)


def test_stranger_is_hung_up_on_when_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.05)

    async def talk(port: int, accepted: asyncio.Future[Channel]) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionLost, match="does not say that it is an agent"):
            await accepted
        writer.close()

    with_listener(talk)


@pytest.mark.parametrize("change", ["again", "another", "swapped", "longer", "back"])
def test_message_is_refused_when_it_is_not_what_the_other_end_has_said(change: str) -> None:
    """Somebody in between passes on the handshake, and then does something to messages."""

    async def talk(port: int, accepted: asyncio.Future[Channel]) -> None:
        middle: asyncio.Future[tuple[Streams, Streams]] = asyncio.get_running_loop().create_future()

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection("127.0.0.1", port)
            hello, proof = len(MAGIC) + 32, 32
            there[1].write(await reader.readexactly(hello))
            writer.write(await there[0].readexactly(hello))
            there[1].write(await reader.readexactly(proof))
            writer.write(await there[0].readexactly(proof))
            middle.set_result(((reader, writer), there))

        async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
            mine, theirs = await connect("127.0.0.1", server.sockets[0].getsockname()[1], SECRET), await accepted
            (reader, back), (_, there) = await middle
            frames = []
            for message in (b"first", b"other"):
                await mine.send(message)
                frames.append(await reader.readexactly(4 + len(message) + 32))
            if change == "back":
                back.write(frames[0])
                with pytest.raises(PermissionRefused):
                    await mine.receive()
            else:
                passed = {
                    "again": [frames[0], frames[0]],
                    "another": [frames[0], frames[1].replace(b"other", b"wrong")],
                    "swapped": [frames[1]],
                    "longer": [struct.pack(">I", MOST_BYTES + 1)],
                }[change]
                for frame in passed:
                    there.write(frame)
                for _ in passed[1:]:
                    assert await theirs.receive() == b"first"
                with pytest.raises(PermissionRefused):
                    await theirs.receive()
            for end in (back, there):
                end.close()
            mine.close()

    with_listener(talk)


def test_secret_is_read_when_its_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"0123456789abcdef\n")
    file.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert read_secret(file) == read_secret(link) == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (None, 0, "cannot be read: No such file"),
        (b"0123456789abcdef", 0o640, "can be read by others"),
        (b"short\n", 0o600, "has 5 bytes, and must have 16"),
        (b"x" * 5000, 0o600, "and must have 16 to 4096"),
    ],
)
def test_secret_is_refused_when_it_is_none(tmp_path: Path, content: bytes | None, mode: int, sentence: str) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(ConfigurationError, match=sentence):
        read_secret(file)


def test_secret_is_refused_when_it_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no regular file"):
        read_secret(tmp_path)
