"""What users and pools may have: how it is written, when it is refused, and that the account is right whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gms_core.cli import gms
from gms_core.cli.options import parse_size
from gms_core.client import connect
from gms_core.errors import InvalidArgument, OutOfMemory, QuotaExceeded
from gms_core.layout import Allocation, Identity
from gms_core.protocol.messages import (
    Acquire,
    Allocate,
    AwaitGeneration,
    Commit,
    Descriptors,
    DropGeneration,
    Hello,
    Join,
    Pin,
    Plan,
    Planned,
    Provide,
    Release,
    Rollback,
    Unpin,
)
from gms_core.protocol.peer import PeerCredentials
from gms_core.quotas import Holding, Quota, check, decode_quotas, encode_quotas, parse_quotas
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm.host import HostDriver
from tests.unit.test_cli_serve import serving

PAGE = 4096
MODEL = Identity({"content": "abc"})
ALICE, BOB = 23456, 23457


def quotas(*words: str) -> tuple[Quota, ...]:
    return parse_quotas(words, parse_size)


def test_quotas_come_back_when_they_are_told_to_a_device_server() -> None:
    found = quotas("user=1000, bytes=40GiB, sessions=64", "pool=*,allocations=7,metadata=1MiB")
    assert found == (
        Quota("user", "1000", "bytes", 40 * 2**30),
        Quota("user", "1000", "sessions", 64),
        Quota("pool", "*", "allocations", 7),
        Quota("pool", "*", "metadata", 2**20),
    )
    assert decode_quotas(encode_quotas(found)) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bytes=1"], "is no quota"),
        (["user=,bytes=1"], "is no quota"),
        (["user=1"], "is no quota"),
        (["user=nobody-of-this-name,bytes=1"], "there is no user"),
        (["user=1,speed=1"], "limits 'speed'"),
        (["user=1,bytes=much"], "is no size"),
        (["user=1,sessions=1GiB"], "is no number"),
        (["user=1,sessions=-1"], "is no number"),
        (["pool=a,bytes=1", "pool=a,bytes=2"], "two quotas for the bytes of pool a"),
    ],
)
def test_quota_is_refused_with_a_sentence_when_it_is_wrong(words: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        quotas(*words)
    result = CliRunner().invoke(gms, ["serve", "--device", "host", *(word for one in words for word in ("--quota", one))])
    assert result.exit_code == 2


def test_own_quota_goes_before_the_one_for_each_when_there_are_both() -> None:
    rules = quotas("user=*,bytes=10,allocations=1", "user=7,bytes=100")
    check(rules, Holding(7, "a", bytes=100), [])
    with pytest.raises(QuotaExceeded):
        check(rules, Holding(8, "a", bytes=11), [])
    with pytest.raises(QuotaExceeded):
        check(rules, Holding(7, "a", allocations=1), [Holding(7, "b", allocations=1)])


def test_refusal_names_quota_use_and_limit_when_there_is_one() -> None:
    with pytest.raises(QuotaExceeded, match="pool a has 8 bytes of memory of 10 that its quota allows, and asks for 3 more") as refused:
        check(quotas("pool=a,bytes=10"), Holding(7, "a", bytes=3), [Holding(7, "a", bytes=5), Holding(8, "a", bytes=3), Holding(8, "b", bytes=9)])
    assert refused.value.details == {"quota": "pool=a,bytes", "used": "8", "limit": "10", "wanted": "3"}


def test_nothing_is_refused_of_what_is_not_asked_for_when_a_quota_was_lowered() -> None:
    check(quotas("user=7,bytes=1,metadata=9"), Holding(7, "a", metadata=5), [Holding(7, "a", bytes=100)])


class Client:
    """A session of a user, with a service in this process."""

    def __init__(self, service: Service, uid: int) -> None:
        self.service, self.uid = service, uid
        self.replies: list[Any] = []
        self.ended = asyncio.Event()

    async def open(self, hello: Hello | None = None) -> Client:
        peer = PeerCredentials(os.getpid(), self.uid, self.uid)
        self.session = await self.service.open(hello or Hello((2, 1)), peer, self.send, lambda: os.pidfd_open(os.getpid()))
        self.welcome = self.replies[-1]
        return self

    async def send(self, message: Any, _: Any) -> None:
        self.replies.append(message)

    async def ask(self, request: Any) -> Any:
        await self.service.handle(self.session, request, self.ended)
        return self.replies[-1]

    async def publish(self, pool: str, pages: int, manifest: bytes = b"", *, pin: bool = False) -> int:
        await self.ask(Acquire(pool, "rw", MODEL, 0))
        made = await self.ask(Allocate(pool, (PAGE,) * pages))
        allocations = tuple(Allocation(number, index * PAGE, PAGE) for index, number in enumerate(made.ids))
        return (await self.ask(Commit(pool, allocations, manifest, MODEL, pin))).layout.generation


@contextlib.contextmanager
def service(*words: str, pages: int = 256) -> Iterator[Service]:
    with contextlib.closing(Memory(HostDriver(pages * PAGE), Limits())) as memory:
        serving = Service("host", memory, Limits(), quotas=quotas(*words))
        try:
            yield serving
        finally:
            serving.stop()


async def use(serving: Service) -> dict[tuple[str, str], int]:
    return {(one.who, one.resource): one.used for one in (await serving.report()).quotas}


def test_bytes_are_charged_to_their_maker_until_they_are_freed() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},bytes={4 * PAGE},allocations=4") as serving:
            alice, bob = await Client(serving, ALICE).open(), await Client(serving, BOB).open()
            await alice.publish("a", 3)
            await bob.publish("b", 8)
            await bob.ask(Acquire("a", "ro", MODEL, 0))
            assert await use(serving) == {(str(ALICE), "bytes"): 3 * PAGE, (str(ALICE), "allocations"): 3}
            second = await Client(serving, ALICE).open()
            await second.ask(Acquire("a", "rw", MODEL, 0))
            with pytest.raises(QuotaExceeded):
                await second.ask(Allocate("a", (PAGE, PAGE)))
            assert isinstance(await second.ask(Allocate("a", (PAGE,))), Descriptors)
            assert (await use(serving))[str(ALICE), "bytes"] == 4 * PAGE
            serving.close(second.session)  # as when its process dies: the draft goes
            assert (await use(serving))[str(ALICE), "bytes"] == 3 * PAGE
            await alice.ask(Release("a"))
            assert (await use(serving))[str(ALICE), "bytes"] == 3 * PAGE, "what is committed stays, and counts"

    asyncio.run(scenario())


def test_account_is_even_when_an_allocation_fails() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},bytes=1GiB", pages=8) as serving:
            alice = await Client(serving, ALICE).open()
            await alice.ask(Acquire("a", "rw", MODEL, 0))
            await alice.ask(Allocate("a", (6 * PAGE,)))
            with pytest.raises(OutOfMemory):
                await alice.ask(Allocate("a", (4 * PAGE,)))
            with pytest.raises(InvalidArgument):
                await alice.ask(Allocate("a", (1,)))
            assert await use(serving) == {(str(ALICE), "bytes"): 6 * PAGE}

    asyncio.run(scenario())


def test_requests_that_are_under_way_count_when_another_one_comes() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},bytes={4 * PAGE}") as serving:
            clients = [await Client(serving, ALICE).open() for _ in range(3)]
            for number, client in enumerate(clients):
                await client.ask(Acquire(f"p{number}", "rw", MODEL, 0))
            asked = [client.ask(Allocate(f"p{number}", (2 * PAGE,))) for number, client in enumerate(clients)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert sorted(type(answer).__name__ for answer in answers) == ["Descriptors", "Descriptors", "QuotaExceeded"]

    asyncio.run(scenario())


def test_sessions_are_limited_by_user_and_by_pool() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},sessions=2", "pool=*,sessions=1") as serving:
            first, second = await Client(serving, ALICE).open(), await Client(serving, ALICE).open()
            with pytest.raises(QuotaExceeded, match=f"user {ALICE} has 2 sessions of 2"):
                await Client(serving, ALICE).open()
            other = await Client(serving, BOB).open()
            serving.close(second.session)
            second = await Client(serving, ALICE).open()
            await first.publish("a", 1)
            with pytest.raises(QuotaExceeded, match="pool a has 1 sessions of 1"):
                await other.ask(Acquire("a", "ro", MODEL, 0))
            await first.ask(Release("a"))
            await other.ask(Acquire("a", "ro", MODEL, 0))

    asyncio.run(scenario())


def test_who_waits_for_a_generation_counts_among_the_sessions_of_a_pool() -> None:
    async def scenario() -> None:
        with service("pool=*,sessions=1") as serving:
            first, second = [await Client(serving, uid).open() for uid in (ALICE, BOB)]
            waiting = asyncio.ensure_future(first.ask(AwaitGeneration("a", 0, 60)))
            while not first.session.waiting_for:
                await asyncio.sleep(0)
            assert await use(serving) == {("a", "sessions"): 1}
            for request in (AwaitGeneration("a", 0, 60), Acquire("a", "rw", MODEL, 0)):
                with pytest.raises(QuotaExceeded, match="pool a has 1 sessions of 1"):
                    await second.ask(request)
            serving.close(first.session)
            first.ended.set()
            await asyncio.gather(waiting, return_exceptions=True)
            assert serving.published.pools == {}
            await second.publish("a", 1)
            assert (await second.ask(AwaitGeneration("a", 0, 60))).generation == 1, "it counts already"
        with service("pool=a,sessions=0") as serving:
            with pytest.raises(QuotaExceeded):
                await (await Client(serving, ALICE).open()).ask(AwaitGeneration("a", 0, 60))
            assert serving.published.pools == {}

    asyncio.run(scenario())


def test_metadata_is_limited_and_a_replaced_manifest_makes_room() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},metadata=150") as serving:
            alice = await Client(serving, ALICE).open()
            await alice.publish("a", 1, b"x" * 100)
            reader = await Client(serving, BOB).open()
            await alice.ask(Release("a"))
            assert await alice.publish("a", 1, b"y" * 100) == 2
            await reader.ask(Acquire("a", "ro", MODEL, 0))
            await alice.ask(Release("a"))
            with pytest.raises(QuotaExceeded, match="bytes of metadata"):
                await alice.publish("a", 1, b"z" * 100)

    asyncio.run(scenario())


def test_pinned_generation_is_charged_and_its_manifest_makes_no_room() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},metadata=150,bytes={4 * PAGE}") as serving:
            alice = await Client(serving, ALICE).open()
            await alice.publish("a", 3, b"x" * 100, pin=True)
            await alice.ask(Release("a"))
            with pytest.raises(QuotaExceeded, match="bytes of metadata"):
                await alice.publish("a", 1, b"y" * 100)
            await alice.ask(Release("a"))
            assert (await use(serving))[str(ALICE), "bytes"] == 3 * PAGE
            await alice.ask(Unpin("a", 1))
            assert await alice.publish("a", 1, b"y" * 100) == 2
            assert (await use(serving))[str(ALICE), "bytes"] == PAGE

    asyncio.run(scenario())


def test_metadata_of_each_generation_are_charged_when_layouts_without_memory_are_alike() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},metadata=250") as serving:
            alice = await Client(serving, ALICE).open()
            for _ in range(2):
                await alice.publish("a", 0, b"x" * 100, pin=True)
                await alice.ask(Release("a"))
            assert await use(serving) == {(str(ALICE), "metadata"): 220}
            with pytest.raises(QuotaExceeded, match="bytes of metadata"):
                await alice.publish("a", 0, b"x" * 100, pin=True)

    asyncio.run(scenario())


def test_rollback_is_charged_once_and_to_the_maker_whoever_asks_for_it() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},bytes={4 * PAGE},metadata=150", "user=*,allocations=9", "pool=a,bytes=1GiB") as serving:
            alice, operator = await Client(serving, ALICE).open(), await Client(serving, 0).open()
            await alice.publish("a", 3, b"x" * 100, pin=True)
            await alice.ask(Release("a"))
            before = await use(serving)
            await operator.publish("a", 1)
            await operator.ask(Release("a"))
            assert (await operator.ask(Rollback("a", 1, 2))).generation == 3
            await operator.ask(Pin("a", 3))
            assert await use(serving) == before, "two generations, one memory"
            await alice.ask(Unpin("a", 1))
            assert await use(serving) == before, "the new generation has what the old one had"
            assert await alice.publish("a", 1) == 4, "the pool is its maker's again"
            assert (await use(serving))["a", "bytes"] == 4 * PAGE
            await alice.ask(Unpin("a", 3))
            await alice.ask(Release("a"))
            await alice.ask(DropGeneration("a", 4))
            assert (await use(serving))["a", "bytes"] == len(serving.memory) == 0

    asyncio.run(scenario())


def test_retained_memory_and_plans_are_charged_to_the_planner() -> None:
    async def scenario() -> None:
        with service(f"user={ALICE},bytes={4 * PAGE},metadata=50") as serving:
            alice = await Client(serving, ALICE).open()
            await alice.ask(Join("cohort", "engine", "rank 0"))
            await alice.ask(Plan("kv", MODEL, 0))
            for sizes, plan in (((8 * PAGE,), b""), ((PAGE,), b"p" * 100)):
                with pytest.raises(QuotaExceeded):
                    await alice.ask(Provide("kv", plan, sizes, 0.0))
            assert isinstance(await alice.ask(Provide("kv", b"plan", (3 * PAGE,), 0.0)), Planned)
            assert (await use(serving))[str(ALICE), "bytes"] == 3 * PAGE

    asyncio.run(scenario())


def test_status_tells_of_quotas_when_a_server_has_some(runtime_dir: Path) -> None:
    uid = os.getuid()
    words = ("--quota", f"user={uid},bytes=1MiB", "--quota", "pool=*,allocations=3")
    with serving(runtime_dir, *words), connect(socket_path=runtime_dir / "host.sock") as session:
        lease = session.acquire("weights", "rw", MODEL, timeout_s=0, slab_bytes=PAGE)
        lease.arena.reserve_exact(3 * PAGE)
        with pytest.raises(QuotaExceeded, match="pool weights has 3 allocations of 3"):
            lease.arena.reserve_exact(4 * PAGE)
        shown = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir), "-o", "json"])
        (told,) = json.loads(shown.stdout)["servers"]
        assert {(one["scope"], one["who"], one["resource"], one["used"], one["limit"]) for one in told["quotas"]} == {
            ("user", str(uid), "bytes", 3 * PAGE, 2**20),
            ("pool", "weights", "allocations", 3, 3),
        }
        table = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir)])
        assert "12 KiB" in table.stdout
        lease.release()
