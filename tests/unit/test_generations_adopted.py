"""Generations at the server after the one that made them: requests that are asked again, who has made what, and what the journal says."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gms_core.errors import AcquireTimeout, GenerationNotFound, QuotaExceeded, VersionMismatch
from gms_core.layout import Allocation, Layout
from gms_core.protocol.messages import (
    Acquire,
    Allocate,
    AwaitGeneration,
    BeginMove,
    Commit,
    Done,
    DropGeneration,
    EndMove,
    Newer,
    Pin,
    ReadGranted,
    Release,
    Rollback,
    RolledBack,
    Unpin,
)
from gms_core.quotas import Quota
from gms_core.server.limits import Limits
from gms_core.server.records import About
from gms_core.server.state import decode, encode, read
from tests.unit.servers_in_turn import LABEL, MODEL, PAGE, Client, Host, run_in_turn, used


async def publish(client: Client, manifest: bytes, *, pin: bool = False) -> Layout:
    """Publish a page, and read it no more; returns the layout without its manifest."""
    await client.ask(Acquire("weights", "rw", MODEL, 0, renumbers=True))
    made = await client.ask(Allocate("weights", (PAGE,)))
    committed: ReadGranted = await client.ask(Commit("weights", (Allocation(made.ids[0], 0, PAGE),), manifest, MODEL, pin))
    await client.ask(Release("weights"))
    return committed.layout


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a scenario with a `Host`."""
    return functools.partial(run_in_turn, tmp_path)


def test_requests_about_generations_are_answered_as_before_when_they_are_asked_again(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        client, reader = await Client(service).open(), await Client(service).open()

        async def again(request: Any, kind: type) -> Any:
            nonlocal service
            told = await client.ask(request)
            service = host.next()
            await reader.come_back(service)
            await client.come_back(service, repeats=True)
            repeated = await client.ask(request)
            assert isinstance(told, kind)
            assert told == repeated
            return told

        async def publish(number: int, *, pin: bool) -> None:
            await client.ask(Acquire("weights", "rw", MODEL, 0))
            made = await client.ask(Allocate("weights", (PAGE,), batch=1))
            told = await again(Commit("weights", (Allocation(made.ids[0], 0, PAGE),), b"manifest", MODEL, pin=pin), ReadGranted)
            assert told.layout.generation == number

        def there() -> list[tuple[int, bool]]:
            generations = service.published.pools["weights"].generations
            return [(number, number in generations.pins) for number in sorted(generations.all())]

        await publish(1, pin=True)
        await reader.ask(Acquire("weights", "ro", MODEL, 0))
        await client.ask(Release("weights"))
        await publish(2, pin=False)
        await client.ask(Release("weights"))
        assert (await again(Rollback("weights", 1, 2), RolledBack)).generation == 3
        assert there() == [(1, True), (3, False)]
        assert (await again(AwaitGeneration("weights", 2, 0), Newer)).generation == 3
        await again(Pin("weights", 3), Done)
        assert there() == [(1, True), (3, True)]
        await again(Unpin("weights", 3), Done)
        await again(Unpin("weights", 1), Done)
        assert there() == [(1, False), (3, False)]
        client, reader = reader, client
        assert (await again(BeginMove("weights", MODEL), ReadGranted)).layout.generation == 3
        await again(EndMove("weights", 3), Done)
        assert there() == [(3, False)]
        assert len(service.memory) == 1
        await again(Release("weights"), Done)
        await again(DropGeneration("weights", 3), Done)
        assert there() == []
        assert len(service.memory) == 0

    run(work)


def test_rollback_of_a_session_that_does_not_come_back_is_forgotten(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        client, other = await Client(service).open(), await Client(service).open()
        await client.ask(Acquire("weights", "rw", MODEL, 0))
        await client.ask(Commit("weights", (), b"", MODEL, pin=True))
        await client.ask(Release("weights"))
        await client.ask(Acquire("weights", "rw", MODEL, 0))
        await client.ask(Commit("weights", (), b"", MODEL))
        await other.ask(Rollback("weights", 1, 2))
        assert set(host.next().published.pools["weights"].rollbacks) == {other.session.id}
        await other.come_back(service := host.next())
        service.close(other.session)
        service.durable.write()
        assert host.next().published.pools["weights"].rollbacks == {}

    run(work)


def test_what_was_rolled_back_to_is_still_its_makers_and_charged_once_when_the_next_server_counts(run: Any) -> None:
    quotas = [Quota("user", "*", "bytes", 2**30), Quota("user", "*", "metadata", 2**20)]
    maker = 23456

    async def work(host: Host) -> None:
        service = host.next(quotas=quotas)
        alice, operator = await Client(service, uid=maker).open(), await Client(service).open()
        for client, pin in ((alice, True), (operator, False)):
            await client.ask(Acquire("a", "rw", MODEL, 0))
            made = await client.ask(Allocate("a", (PAGE,)))
            await client.ask(Commit("a", (Allocation(made.ids[0], 0, PAGE),), b"manifest", MODEL, pin))
            await client.ask(Release("a"))
        await operator.ask(Rollback("a", 1, 2))
        before = await used(service)
        assert (before[str(maker), "bytes"], before[str(os.getuid()), "bytes"], len(service.memory)) == (PAGE, 0, 1)
        service = host.next(quotas=quotas)
        assert await used(service) == before
        await alice.come_back(service)
        await alice.ask(Unpin("a", 1))
        service = host.next(quotas=quotas)
        assert await used(service) == before
        await alice.come_back(service)
        await alice.ask(Acquire("a", "rw", MODEL, 0))
        assert service.accounts.maker_of(service.published.pools["a"], 3) == maker

    run(work)


def test_layout_is_written_once_however_often_it_is_rolled_back_to(run: Any) -> None:
    async def work(host: Host) -> None:
        client = await Client(host.next()).open()
        await publish(client, b"x" * 2**20, pin=True)
        await publish(client, b"y")
        for number in range(2, 40):
            await client.ask(Rollback("weights", number - 1 if number > 3 else 1, number))
            await client.ask(Pin("weights", number + 1))
        for _ in range(2):
            assert sum(map(len, host.journal.values.values())) < 1.1 * 2**20
            service = host.next()
            generations = service.published.pools["weights"].generations
            assert {generation: (layout.generation, layout.manifest[:1]) for generation, layout in generations.all().items()} == {
                number: (number, b"x") for number in generations.pins
            }
        assert (len(generations.pins), len(service.memory)) == (39, 1)

    run(work)


def test_rollback_is_carried_out_when_an_earlier_one_like_it_was_and_the_server_was_killed_before_it(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        client = await Client(service).open()
        await publish(client, b"first", pin=True)
        await publish(client, b"other")
        await client.ask(DropGeneration("weights", 2))
        assert (await client.ask(Rollback("weights", 1, 0, number=1))).generation == 3
        await client.ask(DropGeneration("weights", 3))
        await client.come_back(service := host.next(), repeats=True)
        assert (await client.ask(Rollback("weights", 1, 0, number=2))).generation == 4
        committed = service.published.pools["weights"].committed
        assert committed is not None
        assert committed.generation == 4
        await client.come_back(service := host.next(), repeats=True)
        assert (await client.ask(Rollback("weights", 1, 0, number=2))).generation == 4

    run(work)


@pytest.mark.parametrize("request_", [Unpin("weights", 7), DropGeneration("weights", 7), Unpin("weights", 0), DropGeneration("weights", -1)])
def test_repeated_request_is_refused_when_there_never_was_such_a_generation(run: Any, request_: Any) -> None:
    async def work(host: Host) -> None:
        client = await Client(host.next()).open()
        await publish(client, b"first")
        await client.come_back(host.next(), repeats=True)
        with pytest.raises(GenerationNotFound):
            await client.ask(request_)

    run(work)


@pytest.mark.parametrize("killed", [False, True])
def test_generations_go_on_where_they_were_when_a_pool_was_forgotten_for_others(run: Any, killed: bool) -> None:
    async def work(host: Host) -> None:
        limits = Limits(pools=3)
        service = host.next(limits)
        client = await Client(service).open()
        for _ in range(5):
            await publish(client, b"")
        await client.ask(DropGeneration("weights", 5))
        for name in ("a", "b", "c"):
            await client.ask(Acquire(name, "rw", MODEL, 0))
        assert set(service.published.pools) == {"a", "b", "c"}
        with pytest.raises(QuotaExceeded):
            await client.ask(Acquire("weights", "rw", MODEL, 0))
        if killed:
            await client.come_back(service := host.next(limits))
            assert set(service.published.pools) == {"a", "b", "c"}
        for name in ("a", "b"):
            await client.ask(Release(name))
        with pytest.raises(AcquireTimeout):
            await client.ask(AwaitGeneration("weights", 5, 0))
        assert "weights" not in service.published.pools, "to ask for it makes no pool"
        layout = await publish(client, b"")
        assert layout.generation == 6

    run(work)


def test_server_that_knows_no_rollbacks_is_not_given_what_it_would_free_twice(run: Any) -> None:
    async def work(host: Host) -> None:
        client = await Client(host.next()).open()

        def format_now() -> int:
            return decode(host.journal.values["about/"], About).format

        await publish(client, b"first", pin=True)
        await publish(client, b"other")
        assert format_now() == 1
        await client.ask(Rollback("weights", 1, 2))
        assert format_now() == 2
        await client.come_back(host.next())
        assert format_now() == 2
        await publish(client, b"third")
        assert format_now() == 1

    run(work)


def test_journal_of_a_later_format_is_refused_and_left_as_it_is(run: Any) -> None:
    async def work(host: Host) -> None:
        await publish(await Client(host.next()).open(), b"first")
        about = decode(host.journal.values["about/"], About)
        later = {**host.journal.values, "about/": encode(msgspec.structs.replace(about, format=3))}
        with pytest.raises(VersionMismatch, match="format 3") as refusal:
            read(later, "host", LABEL)
        assert "later version" in refusal.value.hint

    run(work)


def test_layout_of_a_rollback_is_still_there_when_the_generation_that_it_came_from_has_gone(run: Any) -> None:
    async def work(host: Host) -> None:
        service = host.next()
        client = await Client(service).open()
        first = await publish(client, b"first", pin=True)
        await publish(client, b"other")
        await client.ask(Rollback("weights", 1, 2))
        await client.ask(Unpin("weights", 1))
        for _ in range(2):
            await client.come_back(service := host.next())
            (layout,) = service.published.pools["weights"].generations.all().values()
            assert layout == msgspec.structs.replace(first, generation=3, manifest=b"first")
        await client.ask(Pin("weights", 3))
        await publish(client, b"third")
        assert (await client.ask(Rollback("weights", 3, 4))).generation == 5
        await client.ask(Unpin("weights", 3))
        await client.come_back(service := host.next())
        assert service.published.pools["weights"].committed == msgspec.structs.replace(first, generation=5, manifest=b"first")
        await client.ask(DropGeneration("weights", 5))
        assert not [name for name in host.journal.values if name.startswith("layout/")]
        assert len(service.memory) == 0

    run(work)
