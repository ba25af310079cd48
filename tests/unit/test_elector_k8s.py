"""Locks that are Leases of Kubernetes. The API server is the tests' own, which does what the real one is documented to do; the rest is real."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gms_core.errors import ConfigurationError, LockStoreUnavailable, PermissionRefused
from gms_core.failover.elector.address import parse
from gms_core.failover.elector.k8s import K8sStore
from gms_core.failover.elector.store import Candidate, Owned, Taken
from tests.conftest import RunningServer
from tests.unit.failover_processes import ENGINE, Told, engine_options, told_processes
from tests.unit.kubernetes_api import KubernetesApi, kubernetes_api

LOCK = "k8s:llama?ttl_s=3"
KEY = ("serving", "llama")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def name_cluster(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))  # read when it was imported


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with kubernetes_api(tmp_path) as (api, file):
        name_cluster(monkeypatch, file)
        yield api


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(api: KubernetesApi, clock: Clock) -> Iterator[Callable[..., K8sStore]]:
    with contextlib.ExitStack() as stack:

        def make(name: str, lock: str = LOCK) -> K8sStore:
            candidate = Candidate(name, f"cohort of {name}", 1, "host", f"token-of-{name}")
            return stack.enter_context(contextlib.closing(K8sStore(parse(lock), candidate, clock)))

        yield make


def test_lock_is_one_candidates_until_it_gives_it_back(api, store):
    first, second = store("a"), store("b")
    assert first.take() == Taken(1)
    assert first.take() == Taken(1)  # as after an answer that was lost
    assert second.take() == Owned("a (pid 1 on host)")
    assert first.renew()
    second.release()
    first.release()
    first.release()
    assert not first.renew()
    assert second.take() == Taken(2)
    assert api.leases[KEY]["spec"]["leaseTransitions"] == 1


def test_lock_is_taken_once_it_was_seen_unchanged_for_as_long_as_it_lasts(store, clock):
    first, second = store("a", "k8s:llama?ttl_s=10"), store("b")
    first.take()
    assert isinstance(second.take(), Owned)
    clock.now += 9
    first.renew()
    assert isinstance(second.take(), Owned)
    clock.now += 9.9
    assert isinstance(second.take(), Owned)
    clock.now += 0.2
    assert second.take() == Taken(2)
    assert not first.renew()


def test_clock_of_another_node_does_not_matter(api, store, clock):
    first, second = store("a"), store("b")
    first.take()
    api.leases[KEY]["spec"]["renewTime"] = "1999-01-01T00:00:00.000001Z"
    assert isinstance(second.take(), Owned)


def test_one_of_two_has_the_lock_when_both_see_that_it_has_run_out(api, store, clock):
    first, second, third = store("a"), store("b"), store("c")
    first.take()
    second.take()
    third.take()
    clock.now += 4
    outdated = second._read()
    assert isinstance(third.take(), Taken)
    outdated.spec = second._spec(1)
    assert not second._write(outdated)
    assert isinstance(second.take(), Owned)


def test_lease_that_was_deleted_is_not_ours_any_more(api, store):
    first = store("a")
    first.take()
    del api.leases[KEY]
    assert not first.renew()
    first.release()


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, PermissionRefused), (403, PermissionRefused), (422, ConfigurationError), (429, LockStoreUnavailable), (500, LockStoreUnavailable)],
)
def test_refusals_are_told_apart_from_trouble(api, store, status, error):
    first = store("a")
    first.take()
    api.refuse = status
    for question in (first.take, first.renew, first.release):
        with pytest.raises(error, match=rf"Kubernetes answers {status} .* for the Lease serving/llama"):
            question()


def test_nobody_knows_when_the_api_server_does_not_answer(api, store):
    first = store("a")
    first.take()
    api.hangs.set()
    with pytest.raises(LockStoreUnavailable, match="Kubernetes does not answer"):
        first.renew()


def test_configuration_is_refused_when_there_is_no_cluster(tmp_path, monkeypatch):
    name_cluster(monkeypatch, tmp_path / "none")
    with pytest.raises(ConfigurationError, match="no API server of Kubernetes is known"):
        K8sStore(parse(LOCK), Candidate("a", "c", 1, "h", "t"), Clock())


@pytest.fixture
def start(server: RunningServer, api: KubernetesApi) -> Iterator[Callable[[str], Told]]:
    with told_processes() as begin:
        yield lambda engine: begin(ENGINE, engine_options(engine, [server.socket], LOCK))


def test_second_engine_serves_when_the_first_is_killed(start):
    first = start("engine-1")
    assert first.until(role="primary")["term"] == 1
    second = start("engine-2")
    second.until(role="standby")
    first.kill()
    assert second.until(role="primary")["term"] == 2


def test_engine_ends_when_the_api_server_does_not_answer_any_more(api, start):
    first = start("engine-1")
    first.until(serves=True)
    api.hangs.set()
    assert first.wait() == -signal.SIGKILL


def test_engine_ends_with_the_reason_when_it_is_refused(api, start):
    api.refuse = 403
    first = start("engine-1")
    assert first.until_key("error") == "PermissionRefused"
    assert "needs get, create and update of leases" in first.heard[-1]["message"]
