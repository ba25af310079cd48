"""A device server of a real GPU that is killed again and again: memory and leases are with the next one, and real engines notice nothing."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_core.client import ReadLease, WriteLease
from gms_core.devices import list_gpus
from gms_core.layout import Identity
from gms_core.runtime_dir import sockets
from gms_core.vmm.driver import Address, Driver
from tests.conftest import RunningServer, owner, running_server
from tests.gpu.story import EXAMPLES, GIB, PATIENCE_S, Story, used_gib

KILLS = 20
MODEL = Identity({"content": "bytes"})
PIECE = b"0123456789abcdef" * 2**12

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("driver")]


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[RunningServer]:
    with running_server(runtime_dir, list_gpus()[0].id) as running:
        yield running


def digest(driver: Driver, lease: ReadLease, base: int) -> str:
    """Of the first and the last bytes of each allocation."""
    found = hashlib.sha256()
    for allocation in lease.layout.allocations:
        for offset in (allocation.offset, allocation.offset + allocation.size - len(PIECE)):
            found.update(driver.read(Address(base + offset), len(PIECE)))
    return found.hexdigest()


def test_memory_of_a_gpu_is_the_same_when_its_server_is_killed_again_and_again(server: RunningServer) -> None:
    before = used_gib()
    with server.connect() as session:
        write = session.acquire("weights", "rw", MODEL, timeout_s=10, slab_bytes=GIB)
        assert isinstance(write, WriteLease)
        for number in range(8):
            offset = write.arena.allocate(GIB)
            for place in (offset, offset + GIB - len(PIECE)):
                session.driver.write(write.arena.address(place), bytes([number]) + PIECE[1:])
        lease = write.commit(b"manifest", MODEL)
        right = digest(session.driver, lease, lease.arena.base)
        held = used_gib() - before
        for _ in range(KILLS):
            server.kill()
            assert digest(session.driver, lease, lease.arena.base) == right
            with server.connect() as other:  # maps what the server that was just started gives it
                attached = other.acquire("weights", "ro", MODEL, timeout_s=10)
                assert isinstance(attached, ReadLease)
                assert attached.layout == lease.layout
                assert digest(other.driver, attached, attached.map().base) == right
                attached.release()
        report = session.status()
        # One that was closed just before a kill may be away still: that it was is not written down at once.
        back = [shown for shown in report.sessions if not shown.away]
        assert (report.allocations, report.allocated_bytes, len(back)) == (8, 8 * GIB, 1)
        assert abs(used_gib() - before - held) < 0.3, "a server that was killed has left memory"
        lease.release()
        session.acquire("weights", "rw", MODEL, timeout_s=10, replace=1).release()
        deadline = time.monotonic() + 20
        while used_gib() - before > 0.6:  # this process's own context
            assert time.monotonic() < deadline, f"{used_gib() - before:.2f} GiB more than before are in use"
            time.sleep(0.05)


class Asking(threading.Thread):
    """Asks for the same answer again and again."""

    def __init__(self, story: Story, right: list[str], prompt: str) -> None:
        super().__init__(daemon=True)
        self.answered = 0
        self.failures: list[str] = []
        self.over = threading.Event()
        self._story, self._right, self._prompt = story, right, prompt

    def run(self) -> None:
        while not self.over.is_set():
            try:
                answer = self._story.complete(self._prompt, len(self._right))
            except OSError as error:
                self.failures.append(str(error))
                continue
            self.answered += 1
            if answer != self._right:
                self.failures.append(f"{answer} instead of {self._right}")


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_engines_miss_nothing_when_their_server_is_killed_again_and_again(tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import model
    import processes

    model.write_model(tmp_path / "model", "0.6b", "bfloat16")
    story = Story(tmp_path, runtime_dir, "V2", processes)
    with story.server():
        (path,) = sockets(runtime_dir)
        status = processes.free_port(), processes.free_port()
        with story.engine("engine-0", status[0]) as primary:
            story.until_role(primary, status[0], "primary")
            right = story.answers()
            prompt = " ".join(f"w{3 + number}" for number in range(20))
            asking = Asking(story, story.complete(prompt, 24), prompt)
            with story.engine("engine-1", status[1]) as shadow:
                story.until_role(shadow, status[1], "standby")
                before, used = _facts(path), used_gib()
                asking.start()
                for _ in range(KILLS):
                    killed = owner(path)
                    os.kill(killed, signal.SIGKILL)
                    _until_next(path, killed)
                    assert _facts(path) == before
                asking.over.set()
                asking.join(60)
                assert asking.failures == []
                assert asking.answered >= KILLS
                assert abs(used_gib() - used) < 0.3, "a server that was killed has left memory"
                assert story.answers() == right
                os.killpg(primary.process.pid, signal.SIGKILL)
                story.until_role(shadow, status[1], "primary")
                assert story.answers() == right


def _facts(path: Path) -> tuple[Any, ...]:
    """What must be the same before and after, once all sessions are back."""
    from gms_core.client import connect

    deadline = time.monotonic() + PATIENCE_S
    while True:
        with connect(socket_path=path, client="test") as session:
            report = session.status()
        others = [shown for shown in report.sessions if shown.client != "test"]
        if not any(shown.away for shown in others) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    pools = [(pool.name, pool.generation, pool.digest, pool.bytes, len(pool.readers)) for pool in report.pools]
    retained = [(pool.name, pool.epoch, pool.holder, pool.bytes) for pool in report.retained]
    engines = sorted((cohort.engine, cohort.state, cohort.role, len(cohort.members)) for cohort in report.cohorts)
    locks = [(lock.name, lock.term, lock.owner) for lock in report.locks]
    return pools, retained, engines, locks, report.allocations, report.allocated_bytes, len(others)


def _until_next(path: Path, killed: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while owner(path) == killed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
