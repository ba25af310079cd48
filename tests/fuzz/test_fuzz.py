"""Hostile input, a little of it in each run: `make fuzz` sends as much as is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gms_core.errors import GmsError, ProtocolError
from gms_core.protocol.framing import HEADER, MAX_PAYLOAD, FrameDecoder, decode_reply, decode_request, encode
from gms_core.protocol.messages import Acquire, Allocate, Commit, HandOver, Hello, Join, Release
from gms_core.quotas import Quota
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm.host import HostDriver
from tests.conftest import RunningServer, running_server
from tests.fuzz.hostile import REPLIES, REQUESTS, frame, message, payload
from tests.fuzz.live import Outcome, answers, run
from tests.unit.publishing import MODEL, publish, read_all
from tests.unit.test_quotas import ALICE, BOB, Client

FRAMES = 3000


@pytest.mark.parametrize(("kinds", "decode"), [(REQUESTS, decode_request), (REPLIES, decode_reply)], ids=["requests", "replies"])
@given(chance=st.randoms(use_true_random=False))
def test_payload_is_a_message_or_refused_when_it_is_nearly_one(kinds, decode, chance: random.Random) -> None:
    data = payload(chance, kinds)
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert type(message) in kinds or isinstance(message, Hello)
    again = decode(msgspec.msgpack.encode(message))
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(message)


@given(chance=st.randoms(use_true_random=False), cuts=st.lists(st.integers(1, 5000), max_size=20))
def test_decoder_holds_no_more_than_it_was_given_when_frames_are_hostile(chance: random.Random, cuts: list[int]) -> None:
    stream = b"".join(frame(chance).data for _ in range(4))
    decoder, taken, start = FrameDecoder(max_descriptors=0), 0, 0
    try:
        for end in [*cuts, len(stream)]:
            piece, start = stream[start : max(start, end)], max(start, end)
            for found in decoder.feed(piece):
                taken += HEADER.size + len(found.payload)
                assert len(found.payload) <= MAX_PAYLOAD
            assert decoder.buffered + taken <= len(stream)
    except ProtocolError:
        pass
    decoder.close()
    assert decoder.buffered == 0


def test_server_needs_no_more_afterwards_when_hostile_peers_were_there(runtime_dir: Path) -> None:
    with running_server(runtime_dir, host_memory=64 * 2**20) as server:
        outcome = run(server, 7, FRAMES, senders=2)
    assert outcome.findings == []
    assert outcome.frames >= FRAMES


def test_what_others_have_is_whole_when_hostile_peers_were_there(runtime_dir: Path) -> None:
    with running_server(runtime_dir, host_memory=64 * 2**20) as server, server.connect() as session:
        lease = publish(session, b"weights" * 1000, pool="ours")
        outcome = run(server, 11, 1000, senders=2)
        assert outcome.findings == []
        with server.connect() as reader:
            found = reader.acquire("ours", "ro", MODEL, timeout_s=10)
            assert found.layout == lease.layout
            assert read_all(reader, found, 7000) == b"weights" * 1000
            found.release()
        lease.release()


@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_server_answers_others_when_a_connection_sends_anything(server: RunningServer, chance: random.Random) -> None:
    kinds = [kind for kind in REQUESTS if kind.__name__ != "Join"]  # this process must not be the member of a cohort: it would be ended
    frames = [frame(chance, kinds).data for _ in range(5)]
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(str(server.socket))
        connection.settimeout(10)
        for data in (encode(Hello((2, 1))), *frames):
            connection.sendall(data)
    outcome = Outcome(0)
    assert answers(server.socket, outcome), outcome.findings


@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_account_is_even_and_rights_hold_when_users_ask_for_anything(chance: random.Random) -> None:
    """Requests of several users, right in their types and wild in their values, at a service in this process."""
    kinds = [kind for kind in [*REQUESTS, HandOver] if kind not in (Hello, Join)]  # this process must be no member of a cohort
    kinds += [Acquire] * 8 + [Allocate] * 16 + [Commit] * 4 + [Release] * 4
    requests = [(chance.randrange(4), decode_request(msgspec.msgpack.encode(built))) for _ in range(40) if (built := _decodable(chance, kinds))]
    handed_over: list[bool] = []

    async def scenario() -> None:
        quotas = [Quota("user", "*", "bytes", 2**40), Quota("user", "*", "sessions", 3), Quota("pool", "a", "allocations", 3)]
        with contextlib.closing(Memory(HostDriver(2**20), Limits())) as memory:
            service = Service("host", memory, Limits(), on_hand_over=lambda: handed_over.append(True), quotas=quotas)
            clients = [await Client(service, uid).open() for uid in (ALICE, ALICE, BOB, BOB)]
            for index, request in requests:
                with contextlib.suppress(GmsError, TimeoutError):
                    async with asyncio.timeout(0.05 if getattr(request, "timeout_s", 0) else 10):
                        await clients[index].ask(request)
                report = await service.report()
                while report.allocated_bytes != (counted := sum(one.used for one in report.quotas if one.resource == "bytes")):
                    service.durable.write()
                    again = await service.report()
                    assert again.allocated_bytes != report.allocated_bytes or again.quotas != report.quotas, (
                        request,
                        report.allocated_bytes,
                        counted,
                    )
                    report = again
                assert all(one.used <= one.limit for one in report.quotas)
            for client in clients:
                service.close(client.session)
            service.stop()

    asyncio.run(scenario())
    assert not handed_over


def _decodable(chance: random.Random, kinds: list[type]) -> dict[str, object] | None:
    built = message(chance, chance.choice(kinds))
    if "pool" in built:
        built["pool"] = chance.choice("ab")
    if built["type"] == "allocate" and chance.random() < 0.8:
        built["timeout_s"], built["batch"] = 0.0, 0
        built["sizes"] = [chance.choice((4096, 8192)) for _ in range(chance.randrange(1, 4))]
    if built["type"] == "acquire" and chance.random() < 0.8:
        built |= {"identity": {"fields": {}}, "replace": None, "mode": "rw", "timeout_s": 0.0}
    if built["type"] == "commit" and chance.random() < 0.8:
        built["identity"], built["allocations"] = {"fields": {}}, []
    try:
        decode_request(msgspec.msgpack.encode(built))
    except ProtocolError:
        return None
    return built
