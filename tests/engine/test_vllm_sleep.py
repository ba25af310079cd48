"""Real vLLM engines on CPU sleep and wake up by GMS: nothing is copied, addresses stay, and other engines serve meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from failover_story import Client, Running, Story, until
from models import write_model
from site_of_engines import Site

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.client.arena import Received, Take
from gms_core.errors import EngineUnsupported, InvalidArgument, OutOfMemory
from gms_core.kv.private import PrivateKv
from gms_core.kv.retained import RetainedKv
from gms_core.layout import Allocation, Identity
from gms_core.protocol.framing import close_descriptors
from gms_core.pytorch.kv import clearing
from gms_core.vmm.driver import Address
from gms_core.vmm.host import HostDriver
from tests.conftest import RunningServer
from tests.ports import free_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn about things that are not ours
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    from gms_core.weights.holdings import Holding
    from gms_vllm.sleep import GmsSleepBackend, register_backend

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CLEAR = clearing(torch.device("cpu"))
MIB = 2**20

SLEEP = {"enable_sleep_mode": True}
LOOK_S = 1.0
"""Seconds in which an engine notices a request, or that its client is gone."""
KV_BYTES = 16 * 2**20


def test_tokens_are_equal_when_engines_sleep_by_turns(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.engine(model, arguments=SLEEP) as writer:
        published = writer.answer()
        expected, weights = published["tokens"], published["figures"]["bytes"]
        assert published["mapped"] == published["held"] == weights + KV_BYTES
        with site.engine(model, arguments=SLEEP) as reader:
            assert reader.answer()["tokens"] == expected

            assert writer.ask("sleep 1") == {"mapped": 0, "held": weights}
            assert writer.ask("step")["error"] == "engine_asleep"
            assert reader.again()["tokens"] == expected
            assert writer.ask("wake") == {"mapped": weights + KV_BYTES, "held": weights + KV_BYTES}
            assert writer.again()["tokens"] == expected

            assert reader.ask("sleep 2") == {"mapped": 0, "held": weights}
            assert writer.again()["tokens"] == expected
            assert reader.ask("wake weights") == {"mapped": weights, "held": weights}
            assert reader.ask("step")["error"] == "engine_asleep"
            assert reader.ask("wake kv_cache") == {"mapped": weights + KV_BYTES, "held": weights + KV_BYTES}
            assert reader.ask("step")["error"] is None
            assert reader.again()["tokens"] == expected


def mapped(engine: Running) -> int:
    """Bytes of memory files that an engine's processes have mapped."""
    total = 0
    for pid in engine.pids():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            ends = [line.split(" ", 1)[0].split("-") for line in lines if "memfd:gms-" in line]
            total += sum(int(end, 16) - int(start, 16) for start, end in ends)
    return total


def test_request_is_answered_after_the_wake_up_when_it_came_while_the_engine_slept(server: RunningServer, tmp_path: Path) -> None:
    model, port = write_model(tmp_path / "model", "llama"), free_port()
    client, options = Client(model, port), ("--load-format", "gms", "--enable-sleep-mode", "--port", str(port))
    development = {"VLLM_SERVER_DEV_MODE": "1"}
    with (
        Story(server, model, tmp_path).engine("sleeper", *options, load_format="auto", environment=development) as engine,
        ThreadPoolExecutor() as pool,
    ):
        until(client.listens, "the engine does not listen")
        expected, awake = client.tokens(), mapped(engine)
        assert awake > KV_BYTES
        for level in (1, 2):
            assert client.request("POST", f"/sleep?level={level}")[0] == 200
            assert client.request("GET", "/is_sleeping")[1] == {"is_sleeping": True}
            assert mapped(engine) == 0
            give_up(client)
            answer = pool.submit(client.tokens)
            assert client.request("GET", "/health")[0] == 200
            assert client.request("POST", "/wake_up?tags=weights")[0] == 200
            assert 0 < mapped(engine) < awake
            assert not answer.done()
            assert client.request("POST", "/wake_up?tags=kv_cache")[0] == 200
            assert answer.result() == expected
            assert mapped(engine) == awake
            assert client.request("GET", "/is_sleeping")[1] == {"is_sleeping": False}


def give_up(client: Client) -> None:
    """Ask, and go away before there is an answer: the engine then makes a step to forget the request."""
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        body = json.dumps({"model": str(client.model), "prompt": "hello", "max_tokens": 4}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        time.sleep(LOOK_S)  # nothing tells of a request that waits in an engine that makes no steps
    time.sleep(LOOK_S)


def published(server: RunningServer) -> tuple[Session, ReadLease]:
    session = server.connect()
    writing = session.acquire("weights", "rw", Identity({}), timeout_s=10)
    assert isinstance(writing, WriteLease)
    writing.arena.allocate(MIB)
    return session, writing.commit(b"", Identity({}))


def test_nothing_is_unmapped_when_the_weights_are_not_published_yet(server: RunningServer, driver: HostDriver) -> None:
    backend, kv = GmsSleepBackend(), PrivateKv(driver, CLEAR, patience_s=0)
    backend.kv, address = kv, Address(kv.place(MIB))
    with server.connect() as session:
        lease = session.acquire("weights", "rw", Identity({}), timeout_s=10)
        backend.weights = [Holding(session, lease)]
        with pytest.raises(EngineUnsupported, match="not published"):
            backend.suspend()
        assert (backend.asleep, backend.state()) == (frozenset(), "RUNNING")
        assert driver.read(address, 1) == b"\0"
        with pytest.raises(InvalidArgument, match="level"):
            backend.suspend(3)
    kv.close()


def test_backend_unmaps_what_is_named_when_there_are_tags(server: RunningServer, driver: HostDriver) -> None:
    backend, kv = GmsSleepBackend(), PrivateKv(driver, CLEAR, patience_s=0)
    backend.kv, _ = kv, kv.place(MIB)
    session, lease = published(server)
    with session:
        assert lease.arena is not None
        backend.weights = [Holding(session, lease)]
        backend.discard(("kv_cache",))
        assert (backend.asleep, backend.state(), lease.arena.mapped) == ({"kv_cache"}, "SUSPENDED", True)
        backend.suspend(1)
        assert (backend.asleep, lease.arena.mapped) == ({"kv_cache", "weights"}, False)
        backend.resume(["runtime", "workspace"])
        assert backend.asleep == {"kv_cache", "weights"}
        backend.resume(["weights"])
        assert (backend.asleep, backend.state(), lease.arena.mapped) == ({"kv_cache"}, "SUSPENDED", True)
        backend.resume()
        assert (backend.asleep, backend.state(), driver.memory_info().free) == (frozenset(), "RUNNING", 23 * MIB)
        lease.release()
    kv.close()


def test_kv_memory_is_kept_when_an_engine_that_fails_over_sleeps(driver: HostDriver) -> None:
    kv = RetainedKv(driver, CLEAR, [MIB - driver.granularity], MIB)  # and a granule for the mark
    backend, arena = GmsSleepBackend(), kv.arena
    backend.kv = kv
    handle = driver.create(MIB)

    def receive(take: Take) -> None:
        descriptor = driver.export(handle)
        take([Received(1, MIB, descriptor)])
        close_descriptors([descriptor])

    arena.adopt(receive, [Allocation(1, 0, MIB)])
    arena.map_pool()
    driver.write(arena.base, b"kept")
    for level in (1, 2):
        backend.suspend(level)
        assert arena.backing == "none"
        backend.resume(["kv_cache"])
        assert driver.read(arena.base, 4) == b"kept"
    arena.close()


def test_backend_is_registered_once_when_several_workers_ask() -> None:
    register_backend()
    register_backend()
    assert SleepModeBackendFactory.get_backend_class("gms") is GmsSleepBackend


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    opened = HostDriver(capacity=24 * MIB)
    yield opened
    opened.close()


def test_kv_memory_is_zero_at_the_same_addresses_when_it_comes_back(driver: HostDriver) -> None:
    kv = PrivateKv(driver, CLEAR, patience_s=0)
    addresses = [kv.place(size) for size in (MIB, 3 * MIB)]
    assert (kv.size, driver.memory_info().free) == (4 * MIB, 20 * MIB)
    driver.write(Address(addresses[1]), b"\x07" * MIB)
    kv.suspend()
    kv.suspend()
    assert driver.memory_info().free == 24 * MIB
    kv.resume()
    kv.resume()
    assert driver.memory_info().free == 20 * MIB
    assert driver.read(Address(addresses[1]), 3 * MIB) == bytes(3 * MIB)
    kv.close()


def test_wake_up_waits_when_another_still_has_the_memory(driver: HostDriver) -> None:
    kv = PrivateKv(driver, CLEAR, patience_s=60)
    address = Address(kv.place(20 * MIB))
    kv.suspend()
    taken = driver.create(10 * MIB)
    failed = threading.Event()
    create = driver.create

    def noticed(size: int) -> object:
        try:
            return create(size)
        except OutOfMemory:
            failed.set()
            raise

    driver.create = noticed  # type: ignore[assignment, method-assign]
    waking = threading.Thread(target=kv.resume)
    waking.start()
    assert failed.wait(60)
    driver.release(taken)
    waking.join()
    assert driver.read(address, 1) == b"\0"
    kv.close()


def test_wake_up_is_refused_and_can_be_repeated_when_no_memory_comes_free(driver: HostDriver) -> None:
    kv = PrivateKv(driver, CLEAR, patience_s=0)
    kv.place(8 * MIB)
    address = Address(kv.place(12 * MIB))
    kv.suspend()
    taken = driver.create(10 * MIB)
    with pytest.raises(OutOfMemory):
        kv.resume()
    driver.release(taken)
    kv.resume()
    assert driver.read(address, 1) == b"\0"
    kv.close()
