"""What a server tells of its pools, and that it tells something however much there is to tell."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from gms_core.errors import QuotaExceeded
from gms_core.layout import Identity
from gms_core.protocol.messages import Acquire, BeginMove, Commit, DropGeneration, Join, Plan, Release, StatusReport
from gms_core.server import report as report_module
from gms_core.server.limits import Limits
from tests.unit.test_quotas import ALICE, BOB, MODEL, Client, service

LARGE = Identity({"model": "m" * Limits().identity_bytes})


def size(report: StatusReport) -> int:
    return len(msgspec.msgpack.encode(report))


@pytest.mark.parametrize("request_", [Acquire("weights", "ro", LARGE, 0), Acquire("other", "auto", LARGE, 0), BeginMove("weights", LARGE)])
def test_identity_is_refused_when_it_is_too_large_to_be_shown(request_: Any) -> None:
    async def scenario() -> None:
        with service() as serving:
            client = await Client(serving, ALICE).open()
            await client.publish("weights", 1)
            with pytest.raises(QuotaExceeded, match=r"an identity of \d+ bytes is over the limit of 65536"):
                await client.ask(request_)
            assert set(serving.published.pools) == {"weights"}

    asyncio.run(scenario())


def test_draft_and_plan_are_as_they_were_when_an_identity_is_too_large() -> None:
    async def scenario() -> None:
        with service() as serving:
            client = await Client(serving, ALICE).open()
            await client.ask(Acquire("weights", "rw", MODEL, 0))
            with pytest.raises(QuotaExceeded, match="an identity"):
                await client.ask(Commit("weights", (), b"", LARGE))
            await client.ask(Commit("weights", (), b"", MODEL))
            await client.ask(Join("cohort", "engine", "rank 0"))
            with pytest.raises(QuotaExceeded, match="an identity"):
                await client.ask(Plan("kv", LARGE, 0))
            assert serving.retained.pools == {}

    asyncio.run(scenario())


def test_identity_is_measured_in_bytes_and_not_in_characters() -> None:
    async def scenario() -> None:
        with service() as serving:
            client = await Client(serving, ALICE).open()
            with pytest.raises(QuotaExceeded, match="an identity"):
                await client.ask(Acquire("weights", "rw", Identity({"model": "ü" * (Limits().identity_bytes // 2)}), 0))

    asyncio.run(scenario())


def test_report_leaves_out_the_less_important_when_it_would_be_no_message_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        with service() as serving:
            alice = await Client(serving, ALICE).open()
            for name in ("a", "b"):
                for _ in range(20):
                    await alice.publish(name, 1, pin=True)
                    await alice.ask(Release(name))
            for _ in range(100):
                await (await Client(serving, BOB).open()).ask(Acquire("a", "ro", MODEL, 0))
            whole = await serving.report()
            assert not whole.cut
            for most in range(size(whole) - 1, 0, -size(whole) // 50):
                monkeypatch.setattr(report_module, "MAX_PAYLOAD", most)
                short = await serving.report()
                assert short.cut
                assert [(pool.name, pool.generation, pool.bytes) for pool in short.pools] == [("a", 20, 4096), ("b", 20, 4096)]
                assert size(short) <= most or not any(pool.generations[1:] or pool.identity for pool in short.pools)
                assert [pool.generations[-1].generation for pool in short.pools] == [20, 20]
                if short.sessions:
                    assert [pool.identity for pool in short.pools] == [MODEL.fields] * 2
                    assert [one.identity for pool in short.pools for one in pool.generations if one.committed] == [MODEL.fields] * 2

    asyncio.run(scenario())


def test_pool_is_retired_when_only_older_generations_of_it_are_kept() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice = await Client(serving, ALICE).open()

            async def state() -> tuple[str, int]:
                (pool,) = (await serving.report()).pools
                return pool.state, pool.retired_bytes

            await alice.publish("weights", 1, pin=True)
            await alice.ask(Release("weights"))
            await alice.publish("weights", 1)
            await alice.ask(Release("weights"))
            assert await state() == ("committed", 4096)
            await alice.ask(DropGeneration("weights", 2))
            assert await state() == ("retired", 4096)
            await alice.ask(Acquire("weights", "auto", MODEL, 0))
            assert await state() == ("writing", 4096)

    asyncio.run(scenario())
