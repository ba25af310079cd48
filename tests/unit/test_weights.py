"""What loaders of all engines share: which lease a rank asks for, what is compared, and whose options are whose."""

from __future__ import annotations

import queue
import threading

import pytest

from gms_core.checkpoint import content_digest
from gms_core.client import ReadLease, WriteLease, connect
from gms_core.engine_config import GmsConfig
from gms_core.errors import AcquireTimeout, CheckpointNotFound, ConfigurationError, ConnectionLost, IdentityMismatch, SessionClosed
from gms_core.layout import Identity
from gms_core.weights import loading
from gms_core.weights.files import check_weights, model_folder
from gms_core.weights.identity import DUMMY, check_content, digest_of, final_identity, known_content, plain, whereabouts
from gms_core.weights.leases import acquire
from gms_core.weights.loading import publish_or_attach
from gms_core.weights.options import loader_options
from tests.unit.server_threads import server_in_thread

MODEL = Identity({"content": "bytes"})


class Ranks:
    """Two ranks of a group that speak as engines' groups do."""

    def __init__(self, rank_in_group, line):
        self.rank_in_group, self._line, self.told = rank_in_group, line, []

    def broadcast_object(self, obj, src=0):
        if self.rank_in_group == src:
            self.told.append(obj)
            self._line.put(obj)
            return obj
        return self._line.get(timeout=10)


@pytest.fixture
def sessions(runtime_dir):
    with server_in_thread(runtime_dir, memory_bytes=2**28) as path, connect(socket_path=path) as first, connect(socket_path=path) as second:
        yield first, second


@pytest.fixture
def ranks():
    line = queue.SimpleQueue()
    return Ranks(0, line), Ranks(1, line)


def no_ranks():
    raise AssertionError("nobody has to agree")


def published(session, pool):
    lease = session.acquire(pool, "rw", MODEL, timeout_s=5)
    lease.arena.allocate(4096)
    lease.commit(b"", MODEL).release()


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_each_rank_asks_for_itself_when_the_mode_is_given(sessions, mode):
    if mode == "ro":
        published(sessions[0], "weights")
    with acquire(sessions[0], "weights", MODEL, GmsConfig(mode=mode), no_ranks).lease as lease:
        assert isinstance(lease, WriteLease if mode == "rw" else ReadLease)


def test_first_rank_decides_for_all_when_several_are_there(sessions, ranks):
    first = acquire(sessions[0], "weights", MODEL, GmsConfig(), lambda: ranks[0])
    second = acquire(sessions[1], "weights.1", MODEL, GmsConfig(), lambda: ranks[1])
    assert [type(granted.lease) for granted in (first, second)] == [WriteLease, WriteLease]
    first.lease.release()
    second.lease.release()
    published(sessions[0], "weights")
    published(sessions[0], "weights.1")
    first = acquire(sessions[0], "weights", MODEL, GmsConfig(), lambda: ranks[0])
    second = acquire(sessions[1], "weights.1", MODEL, GmsConfig(), lambda: ranks[1])
    assert [type(granted.lease) for granted in (first, second)] == [ReadLease, ReadLease]
    assert ranks[0].told == ["rw", "ro"]


def test_other_ranks_do_not_wait_when_the_first_one_is_refused(sessions, ranks):
    held = sessions[1].acquire("weights", "rw", MODEL, timeout_s=5)
    with pytest.raises(AcquireTimeout):
        acquire(sessions[0], "weights", MODEL, GmsConfig(acquire_timeout_s=0.1), lambda: ranks[0])
    with pytest.raises(ConnectionLost, match="the first rank of this engine was not granted a lease"):
        acquire(sessions[1], "weights.1", MODEL, GmsConfig(), lambda: ranks[1])
    held.release()


def load(session, mode, *, identity=MODEL, files=(), attach=None):
    """Load as an adapter does; what took the device's memory while the lease was waited for is one byte of five."""
    free = iter((5, 4))

    def publish(lease):
        lease.arena.allocate(4096)
        return "published", b"manifest"

    return publish_or_attach(
        session,
        lambda: acquire(session, "weights", MODEL, GmsConfig(mode=mode, acquire_timeout_s=5), no_ranks),
        publish=publish,
        attach=attach or (lambda lease: ("attached", lease.map(), lease.layout.manifest)),
        free_memory=lambda: next(free),
        identity=identity,
        files=files,
    )


def test_model_is_published_or_attached_as_the_lease_says(sessions, monkeypatch):
    kept = []
    monkeypatch.setattr(loading, "keep", kept.append)
    what, first = load(sessions[0], "rw")
    assert (what, first.neighbours, first.external_bytes, kept) == ("published", 1, 0, [first])
    (what, arena, manifest), second = load(sessions[1], "ro")
    assert (what, arena, manifest) == ("attached", second.lease.arena, b"manifest")
    assert (second.external_bytes, kept[1:]) == (second.lease.layout.size, [second])
    for holding in kept:
        holding.lease.release()


def test_session_is_closed_and_nothing_is_kept_when_a_load_fails(sessions, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "keep", pytest.fail)
    monkeypatch.setenv("GMS_CACHE_DIR", str(tmp_path / "cache"))
    published(sessions[0], "weights")
    (tmp_path / "other.bin").write_bytes(b"other")
    with pytest.raises(IdentityMismatch, match="is not what is published"):
        load(sessions[0], "ro", identity=Identity({"content": ""}), files=[tmp_path / "other.bin"], attach=pytest.fail)
    with pytest.raises(SessionClosed):
        sessions[0].status()


def test_content_is_compared_when_it_was_not_known_before(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [tmp_path / "model.safetensors"]
    files[0].write_bytes(b"weights")
    assert known_content(files, "auto") == ""
    check_content(files, Identity({"content": content_digest(files)}))
    assert known_content(files, "auto") == content_digest(files)
    assert known_content(files, "dummy") == DUMMY
    with pytest.raises(IdentityMismatch, match=r"'other' \(expected != published\)"):
        check_content(files, Identity({"content": "other"}))


@pytest.mark.parametrize("content", ["", "something"])
def test_nothing_is_compared_when_one_side_is_unknown(tmp_path, content, caplog):
    check_content([], Identity({"content": content, "model": "m"}))
    assert "is not checked" in caplog.text


def test_final_identity_has_the_digest_once_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [tmp_path / "model.safetensors"]
    files[0].write_bytes(b"weights")
    promised = Identity({"model": "m"})
    before = threading.active_count()
    assert final_identity(promised, files)().fields == {"model": "m", "content": content_digest(files)}
    assert final_identity(promised, [])() == promised
    files[0].unlink()
    failing = final_identity(promised, files)
    with pytest.raises(CheckpointNotFound):
        failing()
    assert threading.active_count() <= before + 1


def test_configuration_is_the_same_whatever_its_order_and_its_kinds():
    class Config:
        def to_dict(self):
            return {"b": [1.0, {"torch_dtype": "x", "c": (2, 3)}], "a": None, "torch_dtype": "y"}

    found = plain(Config(), {"torch_dtype"})
    assert found == {"b": [1, {"c": [2, 3]}], "a": None}
    assert digest_of(found) == digest_of({"a": None, "b": [1, {"c": [2, 3]}]}) != digest_of({"a": 0, "b": found["b"]})


def test_place_is_a_folder_without_links_or_a_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    assert whereabouts(str(tmp_path / "link")) == str(tmp_path.resolve() / "model")
    assert whereabouts("org/model") == "org/model"


def test_folder_is_refused_when_it_has_no_weights(tmp_path):
    assert model_folder(str(tmp_path), None, None) == tmp_path
    with pytest.raises(CheckpointNotFound, match=r"has no weight files \(\*\.safetensors, \*\.bin\)"):
        check_weights(str(tmp_path), ["*.safetensors", "*.bin"])
    (tmp_path / "model.bin").touch()
    check_weights(str(tmp_path), ["*.safetensors", "*.bin"])


def test_options_are_split_between_gms_and_the_inner_loader():
    options = loader_options({"gms": {"tag": "mine", "inner": "Fast"}, "num_threads": 4}, {"gms": "it is itself"})
    assert (options.gms.tag, options.gms.inner, options.rest) == ("mine", "Fast", {"num_threads": 4})


@pytest.mark.parametrize(
    ("extra", "said"), [([], "is a list, not a mapping"), ({"gms": {"inner": "GMS"}}, "because it is itself"), ({"gms": {"tagg": "x"}}, "tagg")]
)
def test_options_are_refused_when_they_are_wrong(extra, said):
    with pytest.raises(ConfigurationError, match=said):
        loader_options(extra, {"gms": "it is itself"})
