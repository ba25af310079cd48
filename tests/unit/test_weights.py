"""What loaders of all engines share: which lease a rank asks for, what is compared, and whose options are whose."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gms_core.checkpoint import content_digest
from gms_core.client import ReadLease, WriteLease, connect
from gms_core.engine_config import GmsConfig
from gms_core.errors import AcquireTimeout, CheckpointNotFound, ConfigurationError, GmsError, IdentityMismatch, SessionClosed
from gms_core.layout import Identity
from gms_core.weights import loading
from gms_core.weights.files import check_weights, model_folder
from gms_core.weights.identity import DUMMY, check_content, digest_of, final_identity, known_content, plain, whereabouts
from gms_core.weights.leases import acquire
from gms_core.weights.loading import publish_or_attach
from gms_core.weights.options import loader_options
from tests.unit.rank_threads import Group
from tests.unit.server_threads import server_in_thread

MODEL = Identity({"content": "bytes"})


POOLS = ("weights", "weights.1")


@pytest.fixture
def sessions(runtime_dir):
    with server_in_thread(runtime_dir, memory_bytes=2**28) as path, connect(socket_path=path) as first, connect(socket_path=path) as second:
        yield first, second


def alone():
    return None


def published(session, pool, identity=MODEL):
    lease = session.acquire(pool, "rw", identity, timeout_s=5)
    lease.arena.allocate(4096)
    lease.commit(b"", identity).release()


def acquire_as_one(sessions, *options, identity=MODEL):
    """What each of two ranks is given: a kind of lease, which is released once both have theirs, or an error."""
    options, group = options * 2 if len(options) == 1 else options, Group(2)

    def ask(rank):
        try:
            return acquire(sessions[rank], POOLS[rank], identity, options[rank], lambda: group.rank(rank)).lease
        except GmsError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, range(2)))
    for lease in found:
        if not isinstance(lease, GmsError):
            lease.release()
    return [lease if isinstance(lease, GmsError) else type(lease) for lease in found]


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_lease_is_of_the_mode_when_one_is_given(sessions, mode):
    for session, pool in zip(sessions, POOLS, strict=True):
        published(session, pool)
    expected = WriteLease if mode == "rw" else ReadLease
    with acquire(sessions[0], "weights", MODEL, GmsConfig(mode=mode), alone).lease as lease:
        assert isinstance(lease, expected)
    assert acquire_as_one(sessions, GmsConfig(mode=mode)) == [expected, expected]


def test_all_ranks_publish_or_attach_when_several_are_there(sessions):
    assert acquire_as_one(sessions, GmsConfig()) == [WriteLease, WriteLease]
    published(sessions[1], "weights.1")
    assert acquire_as_one(sessions, GmsConfig()) == [WriteLease, WriteLease]
    published(sessions[0], "weights")
    assert acquire_as_one(sessions, GmsConfig()) == [ReadLease, ReadLease]


def test_all_ranks_publish_when_the_server_of_a_further_rank_has_nothing(sessions):
    published(sessions[0], "weights")
    assert acquire_as_one(sessions, GmsConfig()) == [WriteLease, WriteLease]


def test_no_rank_attaches_when_parts_of_two_checkpoints_are_published(sessions):
    published(sessions[0], "weights", Identity({"content": "newer"}))
    published(sessions[1], "weights.1", Identity({"content": "older"}))
    for mode in ("auto", "ro"):
        for error in acquire_as_one(sessions, GmsConfig(mode=mode), identity=Identity({"content": ""})):
            assert isinstance(error, IdentityMismatch)
            assert "not of one checkpoint: rank 0: newer, rank 1: older" in str(error)
    assert not any(pool.readers for pool in sessions[0].status().pools)


def test_ranks_attach_when_the_content_of_some_is_unknown(sessions):
    published(sessions[0], "weights")
    published(sessions[1], "weights.1", Identity({"content": ""}))
    assert acquire_as_one(sessions, GmsConfig(), identity=Identity({"content": ""})) == [ReadLease, ReadLease]


def test_no_rank_asks_when_their_modes_differ(sessions):
    for error in acquire_as_one(sessions, GmsConfig(mode="ro"), GmsConfig()):
        assert isinstance(error, ConfigurationError)
        assert "rank 0: ro, rank 1: auto" in str(error)


@pytest.mark.parametrize("mode", ["auto", "rw"])
def test_other_ranks_do_not_wait_when_the_first_one_is_refused(sessions, runtime_dir, mode):
    with connect(socket_path=runtime_dir / "host.sock") as other, other.acquire("weights", "rw", MODEL, timeout_s=5):
        first, second = acquire_as_one(sessions, GmsConfig(mode=mode, acquire_timeout_s=0.1))
    assert isinstance(first, AcquireTimeout)
    assert isinstance(second, AcquireTimeout)
    assert "not granted within 0.1 s in all" in str(first)
    assert f"the writer is {sessions[0].status().sessions[-1].client}" in str(first) or "the writer is" in str(first)
    assert "rank 0 of this engine (host) was not granted a lease: " in str(second)


def load(session, mode, *, identity=MODEL, files=(), attach=None):
    """Load as an adapter does; what took the device's memory while the lease was waited for is one byte of five."""
    free = iter((5, 4))

    def publish(lease):
        lease.arena.allocate(4096)
        return "published", b"manifest"

    return publish_or_attach(
        session,
        lambda: acquire(session, "weights", MODEL, GmsConfig(mode=mode, acquire_timeout_s=5), alone),
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
