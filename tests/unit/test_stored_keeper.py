"""The supervisor as a keeper behind which systemd stands: starts that are killed half-way, stores that are full, and a systemd that is slow."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core import config, service_manager
from gms_core.errors import ConfigurationError, KeeperLost, QuotaExceeded
from gms_core.keeper import connection
from gms_core.keeper import store as store_module
from gms_core.keeper.connection import Keeper
from gms_core.keeper.keeping import Keeping
from gms_core.keeper.store import DescriptorStore, Room
from gms_core.service_manager import Note, ServiceManager
from tests.conftest import keepers
from tests.unit.service_manager_stand_in import StandIn
from tests.unit.stored_service import A, B, Service, files, keep, memory, of
from tests.unit.test_keeper import until


@pytest.fixture
def systemd(runtime_dir: Path) -> Iterator[StandIn]:
    with contextlib.closing(StandIn(str(runtime_dir / "notify"), 10)) as stand_in:
        yield stand_in


@pytest.fixture
def service(systemd: StandIn, runtime_dir: Path) -> Iterator[Service]:
    with contextlib.closing(Service(systemd, runtime_dir)) as made:
        yield made


@pytest.fixture
def manager(systemd: StandIn, monkeypatch: pytest.MonkeyPatch) -> ServiceManager:
    """What this very process would be told as the service's main one."""
    systemd.main = os.getpid()
    for name, value in {**systemd.variables(), "SYSTEMD_EXEC_PID": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    return ServiceManager()


def fill(keeper: Keeper) -> list[str]:
    """Fill the store with memory, one by one."""
    for number in range(100):
        try:
            keep(keeper, *memory(number))
        except QuotaExceeded:
            return memory(*range(number))
    raise AssertionError("the store is never full")


def test_start_goes_on_with_a_full_store_and_puts_nothing_into_it(service: Service, systemd: StandIn) -> None:
    service.start(A)
    keeper = service.connect()
    keeper.set_label("ab")
    kept = fill(keeper)
    assert len(kept) == 8
    names = systemd.names
    for _ in range(3):
        systemd.kill()
        service.start_and_put_nothing(A)
        assert service.connect().label == "ab"
        assert service.kept() == kept
        assert systemd.names == names
    assert systemd.dropped == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_first_start_that_is_killed_half_way_is_made_good_by_the_next_one(service: Service, systemd: StandIn, steps: int) -> None:
    systemd.most = 4
    service.start(A, B, steps=steps)
    service.start(A, B, steps=min(steps, 1))
    service.start(A, B)
    assert sorted(systemd.names) == of(A) + of(B)
    assert (service.connect(A).label, service.connect(B).label) == ("", "")
    assert systemd.dropped == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_keeper_process_has_everything_until_a_start_has_moved_all_of_it(service: Service, systemd: StandIn, steps: int) -> None:
    systemd.most = 400
    process = service.connect(patience_s=30.0, stored=False)
    names = memory(*range(300))  # more than one message has room for
    keep(process, *names)
    process.set_label("ab")
    for _ in range(2):
        service.start(A, steps=steps)
        assert service.connect().label == "ab"
        assert service.kept() == sorted(names)
        assert len(keepers(service.directory)) == 1
    for _ in range(2):
        service.start(A)
        until(lambda: keepers(service.directory) == [])
        assert service.connect().label == "ab"
        assert service.kept() == sorted(names)
        assert sorted(systemd.names) == of(A, *names)
        systemd.kill()


def test_another_device_is_labelled_and_starts_again_when_one_has_filled_the_store(service: Service, systemd: StandIn) -> None:
    service.start(A, B)
    kept = fill(service.connect(A))
    for label in ("ab", "cdef", "g"):
        service.connect(B).set_label(label)
        systemd.kill()
        service.start(A, B)
        assert service.connect(B).label == label
        assert service.kept(A) == kept
    assert systemd.dropped == 0


def test_device_that_is_missing_for_a_while_finds_what_it_had(service: Service, systemd: StandIn) -> None:
    service.start(A, B)
    for device, label in ((A, "aa"), (B, "bb")):
        keep(service.connect(device), *memory(1, 2))
        service.connect(device).set_label(label)
    names = systemd.names
    systemd.kill()
    service.start(A)
    assert systemd.names == names
    with pytest.raises(QuotaExceeded, match="it has 8 of 10"):
        keep(service.connect(A), *memory(3, 4, 5))
    keep(service.connect(A), *memory(3, 4))
    systemd.kill()
    service.start(A, B)
    assert (service.connect(A).label, service.connect(B).label) == ("aa", "bb")
    assert service.kept(B) == memory(1, 2)


@pytest.mark.parametrize("there", ["nothing", "another socket", "clients that look"])
def test_keeper_is_found_at_its_path_whatever_was_there(service: Service, systemd: StandIn, there: str) -> None:
    service.start(A)
    keep(service.connect(), *memory(1))
    service.connect().set_label("ab")
    systemd.kill()
    with contextlib.ExitStack() as waiting:
        if there == "clients that look":
            for _ in range(20):
                waiting.enter_context(connection._connected(service.path()))
        else:
            service.path().unlink()
        if there == "another socket":
            connection.listen(service.path()).close()
        service.start(A)
        assert service.connect().label == "ab"
        assert service.kept() == memory(1)
    assert sorted(systemd.names) == of(A, *memory(1))


def test_device_that_has_two_sockets_listens_on_another_one_and_keeps_its_memory(service: Service, systemd: StandIn) -> None:
    service.start(A)
    keep(service.connect(), *memory(1))
    service.connect().set_label("ab")
    systemd.kill()
    systemd.store.append((f"{A}/socket", os.memfd_create("another")))
    service.start(A)
    assert service.connect().label == "ab"
    assert service.kept() == memory(1)
    assert sorted(systemd.names) == of(A, *memory(1))


def test_stored_keeper_answers_on_when_a_server_has_told_it_to_be_impatient(service: Service) -> None:
    service.start(A)
    service.connect(patience_s=0.0).close()
    for _ in range(3):
        assert service.connect().label == ""
        service.connect().close()


def test_keeper_that_lives_on_after_it_was_lost_keeps_nothing_that_nobody_knows(
    service: Service, systemd: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.start(A)
    monkeypatch.setattr(connection, "REPLY_S", 2.0)  # so that the keeper takes longer
    with files(*memory(1, 2)) as everything:
        keeping = Keeping(service.connect(), service.connect, "ab")
        keeping.everything = lambda: everything
        keeping.keep(everything)
        with systemd.hanging():
            with pytest.raises(KeeperLost):
                keep(keeping, *memory(3))  # it is carried out after the client was refused
            os.close(everything.pop("memory/2/4096"))
            with pytest.raises(KeeperLost):
                keeping.drop(memory(2))  # there is no connection for it
            keeping.check()  # in vain
        monkeypatch.setattr(connection, "REPLY_S", 10.0)
        keeping.check()
    assert service.kept() == memory(1)
    assert sorted(systemd.names) == of(A, *memory(1))
    assert service.connect().label == "ab"


def test_what_systemd_was_told_in_vain_to_close_is_closed_when_the_server_looks_after_its_keeper(service: Service, systemd: StandIn) -> None:
    service.start(A)
    keeper, deaf = service.connect(), service.directory / "deaf"
    keep(keeper, *memory(1, 2, 3))
    deaf.touch()
    keeper.drop(memory(1, 3))
    keeper.check()
    assert sorted(systemd.names) == of(A, *memory(1, 2, 3))
    deaf.unlink()
    keeper.check()
    assert sorted(systemd.names) == of(A, *memory(2))


class Slow(ServiceManager):
    """A manager that looks at what is of one device only when it is let."""

    def __init__(self, device: str) -> None:
        self.device, self.let, self.asked = device, threading.Event(), threading.Event()

    def deliver(self, notes: Iterable[Note], deadline: float | None = None) -> None:
        if any(self.device in text for text, _ in notes):
            self.asked.set()
            assert self.let.wait(20)


def test_device_does_not_wait_for_what_systemd_is_told_of_another() -> None:
    manager, room = Slow(A), Room(3)
    one, other = DescriptorStore(manager, room, A), DescriptorStore(manager, room, B)
    with files(*memory(1, 2)) as descriptors:
        waiting = threading.Thread(target=one.put, args=(descriptors,))
        waiting.start()
        try:
            assert manager.asked.wait(20)
            with pytest.raises(QuotaExceeded, match="it has 2 of 3"):
                other.put(descriptors)
            other.put({"memory/1/4096": descriptors["memory/1/4096"]})
        finally:
            manager.let.set()
            waiting.join()


def test_all_that_systemd_is_told_for_one_request_has_less_time_than_the_keeper_for_its_answer(
    manager: ServiceManager, systemd: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service_manager.WAIT_S < connection.REPLY_S
    store, deliver = DescriptorStore(manager, Room(9), A), manager.deliver
    deadlines: list[float | None] = []
    with files(*memory(1, 2)) as descriptors:
        with systemd.hanging(), monkeypatch.context() as patch:
            patch.setattr(service_manager, "WAIT_S", 0.2)
            with pytest.raises(KeeperLost):
                store.put({"memory/1/4096": descriptors["memory/1/4096"]})
        monkeypatch.setattr(manager, "deliver", lambda notes, deadline: (deadlines.append(deadline), deliver(notes, deadline)))
        store.put({"memory/2/4096": descriptors["memory/2/4096"]})
    assert systemd.memory == ["GPU-a/memory/2/4096"]
    removal, put = deadlines
    assert removal == put


def test_names_are_refused_that_together_are_too_long_for_the_next_start() -> None:
    name = "GPU-00000000-0000-0000-0000-000000000000/memory/12345/2097152"
    fitting = store_module.NAMES_BYTES // (len(name) + 1)
    room = Room(10_000, [name] * (fitting - 1))
    with pytest.raises(QuotaExceeded, match="too long together"):
        room.take([name, name])
    room.take([name])
    with pytest.raises(QuotaExceeded, match="too long together"):
        room.take([name])
    room.give_back([name])
    room.take([name])


def test_longest_names_that_are_taken_can_be_passed_to_a_process() -> None:
    variable = "x" * store_module.NAMES_BYTES
    subprocess.run(["true"], env={"LISTEN_FDNAMES": variable}, check=True)
    with pytest.raises(OSError, match="too long"):
        subprocess.run(["true"], env={"LISTEN_FDNAMES": variable + "x"}, check=True)


def test_descriptor_whose_arrival_nobody_has_seen_is_removed_before_anything_else_is_kept(
    manager: ServiceManager, systemd: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "WAIT_S", 0.2)
    store = DescriptorStore(manager, Room(64), "host")
    with files("memory/1/4096") as lost, files("memory/2/4096") as other:
        with systemd.hanging():
            with pytest.raises(KeeperLost, match="has not looked"):
                store.put(lost)
            with pytest.raises(KeeperLost):
                store.put(other)
        monkeypatch.setattr(service_manager, "WAIT_S", 10.0)
        store.put(other)
        assert systemd.names == ["host/memory/2/4096"]
        store.put(lost)
        store.remove(["memory/2/4096", "unknown"])
        assert systemd.names == ["host/memory/1/4096"]


@given(st.lists(st.tuples(st.sampled_from(["put", "remove", "restart"]), st.sets(st.integers(1, 9), max_size=5)), max_size=12))
def test_store_has_what_was_put_and_never_drops_anything(steps: list[tuple[str, set[int]]]) -> None:
    with contextlib.closing(StandIn(f"@gms-test-{os.getpid()}-{threading.get_ident()}", 6)) as systemd, pytest.MonkeyPatch.context() as patch:
        systemd.main = os.getpid()
        patch.setenv("NOTIFY_SOCKET", systemd.address)
        made = ServiceManager()
        store = DescriptorStore(made, Room(6), "host")
        expected: set[str] = set()
        for what, numbers in steps:
            names = set(memory(*numbers))
            if what == "put":
                new = names - expected
                with files(*new) as descriptors:
                    if len(expected | new) > 6:
                        with pytest.raises(QuotaExceeded):
                            store.put(descriptors)
                    else:
                        store.put(descriptors)
                        expected |= new
            elif what == "remove":
                store.remove(names)
                expected -= names
            else:
                store = DescriptorStore(made, Room(6, systemd.names), "host", [name.removeprefix("host/") for name in systemd.names])
            assert sorted(systemd.names) == sorted(f"host/{name}" for name in expected)
        assert systemd.dropped == 0


def test_manager_that_cannot_be_reached_is_told_nothing_and_delivers_nothing(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(runtime_dir / "nowhere"))
    manager = ServiceManager()
    assert manager.listens
    manager.tell("READY=1")
    with pytest.raises(FileNotFoundError):
        manager.deliver([("FDSTORE=1", ())])
    assert not manager.discard(["a name"])
    assert "NOTIFY_SOCKET" not in config.child_environment()


def test_address_of_a_kind_that_is_not_known_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")
    manager = ServiceManager()
    assert not manager.listens
    manager.tell("READY=1")
    with pytest.raises(ConfigurationError):
        store_module.check(manager)


def test_manager_that_does_not_say_whom_it_hears_is_told_of_readiness_and_given_nothing_to_keep(
    manager: ServiceManager, systemd: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in systemd.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SYSTEMD_EXEC_PID")
    old = ServiceManager()
    assert old.listens
    with pytest.raises(ConfigurationError, match="not known to be the main process") as caught:
        store_module.check(old)
    assert "version 248" in caught.value.hint
    old.tell("READY=1")
    until(lambda: systemd.told == ["READY=1"])
