"""The supervisor as a keeper when something does not answer, has no room or is somebody else's: what it tells its servers, and how long they wait."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from gms_core import service_manager
from gms_core.errors import KeeperLost, ServerUnavailable
from gms_core.keeper import connection
from gms_core.keeper import store as store_module
from gms_core.keeper.connection import Keeper
from gms_core.keeper.keeping import Keeping
from gms_core.keeper.store import DescriptorStore, Room
from gms_core.keeper.stored import StoredKeeper, label_file
from gms_core.runtime_dir import journal_path, socket_path
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.ownership import give_up
from gms_core.service_manager import Note, ServiceManager
from gms_core.vmm.host import HostDriver
from tests.unit.service_manager_stand_in import StandIn
from tests.unit.stored_service import A, Service, files, keep, memory, of


@pytest.fixture
def systemd(runtime_dir: Path) -> Iterator[StandIn]:
    with contextlib.closing(StandIn(str(runtime_dir / "notify"), 600)) as stand_in:
        yield stand_in


@pytest.fixture
def service(systemd: StandIn, runtime_dir: Path) -> Iterator[Service]:
    with contextlib.closing(Service(systemd, runtime_dir)) as made:
        yield made


class Recording(ServiceManager):
    """A manager that looks at so many notes more in time."""

    def __init__(self, enough: int) -> None:
        self.enough, self.heard, self.seconds = enough, list[str](), list[float]()

    def deliver(self, notes: Iterable[Note], deadline: float | None = None) -> None:
        assert deadline is not None
        self.seconds.append(deadline - time.monotonic())
        names = [text.partition("FDNAME=")[2].partition("\n")[0] for text, _ in notes]
        if len(names) > self.enough:
            raise TimeoutError("systemd has not looked at it in time")
        self.enough -= len(names)
        self.heard += names


def test_only_servers_of_its_service_get_what_a_stored_keeper_has(service: Service, systemd: StandIn) -> None:
    service.start(A)
    keep(service.connect(), *memory(1))
    journal = journal_path(socket_path(A, service.directory))
    journal.touch()
    for _ in range(2):
        for patience_s in (None, 30.0):
            with pytest.raises(ServerUnavailable, match="systemd has the memory of GPU-a") as caught:
                Keeper(service.path(), patience_s)
            assert "systemctl" in caught.value.hint
        with pytest.raises(ServerUnavailable):
            connection.end_at(service.path())
        give_up(socket_path(A, service.directory))  # as a supervisor does that ends
        assert journal.exists()
        assert sorted(systemd.names) == of(A, *memory(1))
        assert service.kept() == memory(1)
        systemd.kill()
        service.start(A)
    systemd.stop()
    with contextlib.closing(service.connect(patience_s=30.0, stored=False)) as process:
        assert process.new


def test_keeper_that_cannot_keep_now_is_not_taken_for_one_that_is_lost(service: Service, systemd: StandIn) -> None:
    service.start(A)
    keeping, deaf = Keeping(service.connect(), lambda: pytest.fail("another keeper is looked for"), ""), service.directory / "deaf"
    keep(keeping, *memory(1))
    deaf.touch()
    with pytest.raises(KeeperLost, match="systemd cannot be given descriptors"):
        keep(keeping, *memory(2))
    deaf.unlink()
    keep(keeping, *memory(3))
    keeping.close()
    assert sorted(systemd.names) == of(A, *memory(1, 3))


def test_server_does_not_wait_for_what_systemd_is_told_again_in_any_case() -> None:
    assert service_manager.WAIT_S + store_module.AGAIN_S < connection.REPLY_S, "a new server asks while the last one's memory is still being put"
    manager = Recording(1)
    store = DescriptorStore(manager, Room(9), A)
    one, other = socket.socketpair()
    with one, files(*memory(1)) as descriptors:
        store.put(descriptors)
        label = label_file("ab")
        keeper = StoredKeeper(other, store, {"memory/1/4096": os.dup(descriptors["memory/1/4096"])}, label)
    with other:
        keeper.drop([b"memory/1/4096"])
        assert keeper.introduce() == b"i0\nab"
        os.close(label)
    put, *others = manager.seconds
    assert len(others) == 2
    assert max(others) <= store_module.AGAIN_S < put


def test_removals_come_to_an_end_when_systemd_looks_at_few_of_them_at_a_time() -> None:
    manager, names = Recording(100), memory(*range(300))
    store = DescriptorStore(manager, Room(300, [f"{A}/{name}" for name in names]), A, names)
    store.remove(names)
    tries = 1
    while len(manager.heard) < 300:
        assert tries < 10
        manager.enough, tries = 100, tries + 1
        store.try_again()
    assert sorted(manager.heard) == sorted(f"{A}/{name}" for name in names)
    with files(*names) as descriptors:
        manager.enough = 300
        store.put(descriptors)


class Stuck(Keeping):
    """What keeps answers only when it is let."""

    def __init__(self) -> None:
        self.let, self.checks = threading.Event(), 0

    def check(self) -> None:
        self.checks += 1
        assert self.let.wait(20)


def test_looks_at_the_keeper_do_not_queue_up_when_it_answers_slowly() -> None:
    keeping = Stuck()
    with contextlib.closing(Memory(HostDriver(4096 * 16), Limits(), keeping)) as made:
        for _ in range(5):
            made.check_keeper()
        keeping.let.set()
    assert keeping.checks == 1


def test_connection_is_lost_when_not_all_of_an_answer_could_be_taken(service: Service, systemd: StandIn) -> None:
    service.start(A)
    names, keeper = memory(*range(300)), service.connect()  # more than one message has room for
    keep(keeper, *names)
    with few_files(), pytest.raises(KeeperLost, match="more descriptors than this process may open"):
        keeper.names()
    assert keeper.lost
    with pytest.raises(KeeperLost):
        keep(keeper, *memory(300))
    with files(*names) as everything:
        keeping = Keeping(service.connect(), service.connect, "ab")
        keeping.everything = lambda: everything
        service.connect()  # the connection before is closed for it
        with few_files():
            keeping.check()  # in vain: it cannot see what else there is
        keep(keeping, *memory(301))
        keeping.close()
    assert service.kept() == sorted([*names, "memory/301/4096"])
    assert service.connect().label == "ab"


def test_keeper_that_was_found_again_and_could_not_take_everything_is_given_it_later(service: Service) -> None:
    service.start(A)
    keeper, deaf = service.connect(), service.directory / "deaf"
    keeper.set_label("ab")
    with files(*memory(1, 2)) as everything:
        keeping = Keeping(keeper, service.connect, "ab")
        keeping.everything = lambda: everything
        keep(keeping, *memory(1))
        service.connect()  # the connection before is closed for it
        deaf.touch()
        keeping.check()  # in vain
        deaf.unlink()
        keeping.check()
        keeping.close()
    assert service.kept() == memory(1, 2)


@contextlib.contextmanager
def few_files() -> Iterator[None]:
    """This process may open a few files more, and not hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (number for number in itertools.count() if not os.path.exists(f"/proc/self/fd/{number}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, 20, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
