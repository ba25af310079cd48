"""Commands whose root is in an object store: real servers, real processes, and a server that speaks S3."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.run_restore import restore_command
from gms_core.client import Session
from gms_core.config import SNAPSHOTS, child_environment
from gms_core.errors import ConfigurationError, InvalidArgument, SnapshotNotFound
from gms_core.snapshot.config import snapshot_config
from gms_core.snapshot.control import Control
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.on_disk import COMMITTED, MANIFEST
from gms_core.snapshot.registry import find
from gms_core.snapshot.save import save_image
from gms_core.snapshot.shelves import open_shelf
from tests.conftest import RunningServer
from tests.unit.object_stores import KEY, SECRET, Harm, Proxy, holds, save_objects
from tests.unit.publishing import MODEL, PAGE, generations, publish, read_all
from tests.unit.sentinels import read_sentinels

ROOT = Path(__file__).parents[2]
BYTES = 17 * 2**20


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SNAPSHOTS:
        monkeypatch.delenv(name, raising=False)


def _gms(server: RunningServer | None, *arguments: str) -> Result:
    where = ["--runtime-dir", str(server.directory)] if server is not None else []
    return CliRunner().invoke(gms, ["snapshot", *arguments, *where])


def _done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def _refused(result: Result, code: ExitCode) -> str:
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    assert KEY not in result.output
    return result.stderr


def _publish(session: Session, pool: str = "weights", size: int = BYTES) -> bytes:
    data = os.urandom(size)
    publish(session, data, pool=pool, slab=2**20).release()
    return data


def _read(session: Session, pool: str, size: int = BYTES) -> bytes:
    with session.acquire(pool, "ro", MODEL, timeout_s=1) as lease:
        return read_all(session, lease, size)  # type: ignore[no-any-return]


def test_all_ranks_come_back_when_they_were_saved(server: RunningServer, s3: Proxy, tmp_path: Path) -> None:
    root, control = f"--root={s3.url}/", f"--control-dir={tmp_path / 'control'}"
    with server.connect() as session:
        data = {pool: _publish(session, pool) for pool in ("weights", "weights.1")}
        told: dict[str, Any] = json.loads(_done(_gms(server, "save", "model", root, "--ranks", "--shard-size=16MiB", control, "-o", "json")))
        assert (told["version"], told["bytes"]) == (1, 2 * BYTES)
    assert read_sentinels(tmp_path / "control", "model").keys() == {"SAVED"}
    bucket = Bucket(s3.url)
    assert bucket.objects("model/1").keys() == {
        *("claim.json", "part.json", "manifest.json", "COMMITTED"),
        *(f"images/{image}/0000{shard}.shard" for image in (0, 1) for shard in (0, 1)),
    }
    order = [request.key.rpartition("/")[2] for request in s3.seen if request.method == "PUT"]
    assert order[-2:] == [MANIFEST, COMMITTED]
    assert _done(_gms(None, "verify", "model", root)).startswith("verified model@1: 34 MiB in 2 images\n")
    server.lose_everything()
    assert _done(_gms(server, "restore", "model", root, control)).startswith("restored model@1: 34 MiB in 2 images\n")
    with server.connect() as session:
        assert {pool: _read(session, pool) for pool in data} == data
    assert read_sentinels(tmp_path / "control", "model").keys() == {"SAVED", "RESTORED"}
    listed = json.loads(_done(_gms(None, "list", root, "-o", "json")))["snapshots"]
    assert [(one["version"], one["state"], one["size"], one["path"]) for one in listed] == [(1, "committed", 2 * BYTES, f"{s3.url}/model/1")]
    assert _done(_gms(None, "prune", "model", root, "--version=1")) == "removed: model@1\n"
    assert "no snapshot" in _done(_gms(None, "list", root))
    del bucket


def test_nothing_is_published_when_an_object_is_damaged_or_gone(server: RunningServer, s3: Proxy) -> None:
    root, bucket = f"--root={s3.url}", Bucket(s3.url)
    with server.connect() as session:
        _publish(session, size=PAGE)
        _done(_gms(server, "save", "model", root))
        key = "model/1/images/0/00000.shard"
        data = bytearray(bucket.read(key))
        data[100] ^= 1
        bucket.write(key, bytes(data))
        for told in (_gms(server, "restore", "model", root), _gms(None, "verify", "model", root)):
            assert f"{s3.url}/{key} is damaged" in _refused(told, ExitCode.SNAPSHOT)
        s3.harm.append(Harm("GET", key, status=404, word="NoSuchKey"))
        assert f"{s3.url}/{key} is not there" in _refused(_gms(server, "restore", "model", root), ExitCode.NOT_FOUND)
        assert generations(session) == [(1, True, False, 0)]
    del bucket


def test_command_says_what_to_do_when_the_store_refuses(server: RunningServer, s3: Proxy) -> None:
    with server.connect() as session:
        _publish(session, size=PAGE)
    assert "there is no bucket nowhere" in _refused(_gms(server, "save", "model", "--root=s3://nowhere/prefix"), ExitCode.NOT_FOUND)
    assert "is no root of snapshots" in _refused(_gms(None, "list", f"--root={s3.url}"), ExitCode.NOT_FOUND)
    s3.harm.append(Harm("PUT", "gms-root", status=403, word="AccessDenied"))
    told = _refused(_gms(server, "save", "model", f"--root={s3.url}"), ExitCode.PERMISSION)
    assert "gms-root cannot be made: these credentials may not do that (403 AccessDenied)" in told
    assert "the rights to list and to get objects, to save or prune also those to put and to delete them" in told
    s3.harm.append(Harm("PUT", "shard", status=403, word="AccessDenied"))
    told = _refused(_gms(server, "save", "model", f"--root={s3.url}"), ExitCode.PERMISSION)
    assert f"{s3.url}/model/1/images/0/00000.shard cannot be written" in told
    (entry,) = json.loads(_done(_gms(None, "list", f"--root={s3.url}", "-o", "json")))["snapshots"]
    assert (entry["state"], "these credentials may not do that" in entry["reason"]) == ("failed", True)
    for root, backend in ((s3.url, "staged"), ("/tmp", "object")):
        assert "moves" in _refused(_gms(server, "save", "model", f"--root={root}", f"--backend={backend}"), ExitCode.USAGE)
    assert "is not resumed" in _refused(_gms(server, "save", "model", f"--root={s3.url}", "--resume"), ExitCode.USAGE)


def test_save_is_refused_when_another_one_tells_of_the_name_in_the_same_place(server: RunningServer, s3: Proxy, tmp_path: Path) -> None:
    with server.connect() as session:
        _publish(session, size=PAGE)
    with Control(tmp_path, "model", "save") as other:
        other.alone()
        other.begin()
        told = _refused(_gms(server, "save", "model", f"--root={s3.url}", f"--control-dir={tmp_path}"), ExitCode.SNAPSHOT)
        assert "another save tells of snapshot 'model'" in told
        assert read_sentinels(tmp_path, "model").keys() == {"SAVING"}
    assert not s3.seen, "no number is taken for it"
    _done(_gms(server, "save", "model", f"--root={s3.url}", f"--control-dir={tmp_path}"))


def _agent(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][program].partition(":")
    code = f"from {module} import {function}; {function}()"
    return subprocess.run(
        [sys.executable, "-c", code], env=child_environment(**environment), capture_output=True, text=True, check=False, timeout=100
    )


def test_weights_come_back_when_the_environment_says_everything(server: RunningServer, s3: Proxy) -> None:
    environment = {"GMS_RUNTIME_DIR": str(server.directory), "GMS_CHECKPOINT_DIR": s3.url, "GMS_SNAPSHOT": "model", "GMS_DEVICES": "host"}
    with server.connect() as session:
        publish(session, b"weights", pool="draft").release()
    saved = _agent("gms-saver", **environment, GMS_POOL="draft")
    assert (saved.returncode, saved.stdout[:14]) == (0, "saved model@1:"), saved.stderr
    loaded = _agent("gms-loader", **environment, GMS_POOL="weights")
    assert loaded.returncode == 0, loaded.stderr
    with server.connect() as session:
        assert _read(session, "weights", 7) == b"weights"


def test_gms_run_restores_from_a_url_when_there_is_such_a_snapshot(s3: Proxy, tmp_path: Path) -> None:
    shelf = open_shelf([s3.url], create=True)
    save_objects(shelf)  # type: ignore[arg-type]
    command = restore_command("model", [s3.url], [], tmp_path)
    assert command is not None
    assert command[-2:] == ("--root", s3.url)
    with pytest.raises(SnapshotNotFound, match="there is no snapshot other in"):
        restore_command("other", [s3.url], [], tmp_path)


@pytest.mark.parametrize("key", ["00000.shard$", f"{COMMITTED}$"], ids=["shard", "commit"])
def test_former_snapshot_loads_when_the_command_is_killed(server: RunningServer, s3: Proxy, key: str) -> None:
    shelf = open_shelf([s3.url], create=True)
    save_objects(shelf, first=b"1")  # type: ignore[arg-type]
    with server.connect() as session:
        _publish(session, size=PAGE)
    command = [sys.executable, "-P", "-m", "gms_core.cli", "snapshot", "save", "model", f"--root={s3.url}", f"--runtime-dir={server.directory}"]
    started: SimpleQueue[int] = SimpleQueue()
    s3.harm.append(Harm("PUT", f"model/2/.*{key}", status=503, call=lambda: os.kill(started.get(timeout=30), signal.SIGKILL)))
    reading, writing = os.pipe()  # the process of the image has it too: it ends when both are gone
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        with contextlib.closing(os.fdopen(writing, "wb")):
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writing))
            stack.callback(process.kill)
            started.put(process.pid)
        assert process.wait(100) == -signal.SIGKILL
        while os.read(reading, 4096):
            pass
    assert [(one.version, one.state) for one in shelf.entries()] == [(1, "committed"), (2, "unfinished")]
    assert holds(shelf) == b"1"  # type: ignore[arg-type]
    assert save_objects(shelf, first=b"3").version == 3  # type: ignore[arg-type]
    assert [(one.version, one.state) for one in shelf.entries()] == [(1, "committed"), (3, "committed")]


KILLED = """
import os, signal, sys
from pathlib import Path
from gms_core.client import connect
from gms_core.snapshot.objects import bucket as module
from gms_core.snapshot.registry import find
from gms_core.snapshot.save import save_image
from gms_core.snapshot.shelves import open_shelf
from tests.unit.publishing import MODEL

what, socket, root = sys.argv[1:]


def arm(left):
    def wrap(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for kind, name in ((module.Bucket, "write"), (module.Bucket, "create"), (module.ShardObject, "write"), (module.ShardObject, "complete")):
        setattr(kind, name, wrap(getattr(kind, name)))

    def delete(bucket, keys):  # one by one: a process may end between any two
        for key in keys:
            one([key], bucket)
    real = module.Bucket.delete
    one = wrap(lambda keys, bucket: real(bucket, keys))
    module.Bucket.delete = delete


def save():
    with connect(socket_path=Path(socket)) as session, session.acquire("weights", "ro", MODEL, timeout_s=1) as lease:
        with open_shelf([root], create=True).begin("model", resume=False, stripe_bytes=2**24, shard_bytes=2**24) as staging:
            images = [save_image(session, lease, staging.target, 0, find("object"), options={"chunk_bytes": "8388608"}).image]
            staging.commit(images)


for line in sys.stdin:
    child = os.fork()  # before the library has threads
    if child == 0:
        arm(int(line))
        save() if what == "save" else open_shelf([root]).prune("model", keep=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Does the same again and again, and is killed each time one step later."""

    def __init__(self, what: str, socket: str, root: str) -> None:
        command = [sys.executable, "-c", KILLED, what, socket, root]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def is_killed_at(self, number: int) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code != 0


@pytest.fixture
def url(tmp_path: Path) -> str:
    """In files: it is the order of steps that counts."""
    return f"file://{tmp_path}/objects"


@contextlib.contextmanager
def _killer(what: str, socket: str, root: str) -> Iterator[Killer]:
    killer = Killer(what, socket, root)
    try:
        yield killer
    finally:
        assert killer.process.stdin is not None
        assert killer.process.stdout is not None
        killer.process.stdin.close()
        killer.process.wait(30)
        killer.process.stdout.close()


def test_former_snapshot_loads_and_the_next_is_saved_when_a_save_is_killed_at_any_step(server: RunningServer, url: str) -> None:
    shelf: Any = open_shelf([url], create=True)
    with server.connect() as session, publish(session, os.urandom(PAGE) + bytes(2**24), slab=2**20) as lease:

        def save() -> int:
            with shelf.begin("model", resume=False, stripe_bytes=2**24, shard_bytes=2**24) as staging:
                return int(staging.commit([save_image(session, lease, staging.target, 0, find("object")).image]).version)

        former, kills = save(), 0
        with _killer("save", str(server.socket), url) as killer:
            for number in range(1000):
                killed = killer.is_killed_at(number)
                with shelf.find("model") as snapshot:
                    assert len(snapshot.files(0)) == 2
                    newest = snapshot.manifest.version
                assert newest == former or newest > former
                assert newest != former or killed, "a save that went well is the newest"
                assert {one.state for one in shelf.entries()} <= {"committed", "unfinished"}
                kills += killed
                if not killed:
                    break
                former = save() if number % 3 == 0 else newest  # otherwise what was left is there when the next one is killed
            assert kills > 8
        last = save()
        assert {one.state for one in shelf.entries()} == {"committed"}
        shelf.prune("model", keep=1)
        left = {key for key in shelf.root.bucket.objects("model") if not key.endswith(COMMITTED)}
        assert all(key == "lock" or key.startswith(f"{last}/") for key in left), left


def test_snapshots_that_stay_load_when_a_removal_is_killed_at_any_step(url: str) -> None:
    shelf: Any = open_shelf([url], create=True)
    kills = 0
    with _killer("prune", "", url) as killer:
        for number in range(1000):
            save_objects(shelf, first=b"1")
            former = save_objects(shelf, first=b"2").version
            killed = killer.is_killed_at(number)
            kills += killed
            with shelf.find("model") as snapshot:
                assert snapshot.manifest.version == former
            assert holds(shelf) == b"2"
            assert {one.state for one in shelf.entries()} == {"committed"}
            if not killed:
                break
    assert kills > 4
    assert [entry.version for entry in shelf.entries()] == [former]
    assert {key for key in shelf.root.bucket.objects("model") if not key.endswith(COMMITTED) and not key.startswith(f"{former}/")} == {"lock"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        (f"s3://{KEY}:{SECRET}@bucket/prefix", "has more than a bucket and a prefix"),
        (f"s3://bucket/prefix?X-Amz-Signature={SECRET}", "has more than a bucket and a prefix"),
        ("s3://bucket/a//b", "empty parts or odd characters"),
        ("s3://bucket/../other", "empty parts or odd characters"),
        ("s3://bucket/a%2Fb", "empty parts or odd characters"),
        ("ftp://bucket/prefix", "cannot begin with ftp://"),
        ("file://host/directory", "names an absolute path"),
        ("abfs://container/prefix", "write abfs://CONTAINER@ACCOUNT"),
    ],
)
def test_url_is_refused_without_its_secrets_when_it_cannot_be_a_roots(monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    assert why in _refused(_gms(None, "list", f"--root={text}"), ExitCode.USAGE)
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", text)
    with pytest.raises(ConfigurationError, match=f"^GMS_CHECKPOINT_DIR: .*{why}") as raised:
        snapshot_config()
    assert SECRET not in str(raised.value)


def test_backend_follows_the_root_when_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (snapshot_config({"roots": (Path("/a"),)}).mover, snapshot_config().mover) == ("staged", "staged")
    for text, url in [
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/prefix/", "s3://bucket/prefix"),
        ("abfss://c@account.dfs.core.windows.net/p", "abfss://c@account.dfs.core.windows.net/p"),
    ]:
        config = snapshot_config({"roots": (text,)})
        assert (config.roots, config.mover, config.objects) == ((url,), "object", True)
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", "gs://bucket/prefix")
    assert snapshot_config().roots == ("gs://bucket/prefix",)
    monkeypatch.setenv("GMS_TRANSFER_BACKEND", "staged")
    assert snapshot_config().mover == "staged"
    monkeypatch.setenv("GMS_SHARDED_SSD_ROOTS", "/a:/b")
    with pytest.raises(ConfigurationError, match="a root in an object store is the only one"):
        snapshot_config()
    monkeypatch.setenv("GMS_SHARDED_SSD_ROOTS", "s3://a/b")
    with pytest.raises(ConfigurationError, match="a root in an object store is the only one"):
        snapshot_config()
    with pytest.raises(InvalidArgument, match="is given beside other roots"):
        open_shelf(["s3://a/b", Path("/c")])
