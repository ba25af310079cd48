"""Published memory that goes from one server to another by NIXL, with both on this machine: real processes, and real transfers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import Session
from gms_core.config import child_environment
from gms_core.errors import (
    BackendUnavailable,
    GmsError,
    InvalidArgument,
    PermissionRefused,
    SessionClosed,
    SnapshotDamaged,
    SnapshotMismatch,
    TransferFailed,
)
from gms_core.layout import Allocation, Identity, layout_digest
from gms_core.snapshot import registry
from gms_core.snapshot.backends import nixl_ucx
from gms_core.snapshot.manifest import encode
from gms_core.snapshot.peers import handshake, network
from gms_core.snapshot.peers import serving as serving_module
from gms_core.snapshot.peers.handshake import address, answer, ask, read_secret
from gms_core.snapshot.peers.offers import FORMAT, Offer, Reach, Span, parts, understood
from gms_core.snapshot.transfer import Job
from tests.conftest import RunningServer, running_server
from tests.unit.publishing import MODEL, publish, read_all, until
from tests.unit.snapshot_stand_in import roots_in, save_bytes

BYTES = 17 * 2**20
"""More than a block."""


@pytest.fixture
def target() -> Iterator[RunningServer]:
    """The server of another machine."""
    with tempfile.TemporaryDirectory(prefix="gms-") as directory, running_server(Path(directory)) as running:
        yield running


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(os.urandom(16).hex())
    path.chmod(0o600)
    return path


class Serve:
    """``gms snapshot serve``, once it serves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        impatient = threading.Timer(60, process.kill)
        impatient.start()
        line = process.stdout.readline()
        impatient.cancel()
        assert line.startswith("serving "), process.communicate()[1]
        self.where = line.split()[-1]

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it has told beside."""
        told = self.process.communicate(timeout=30)[1]
        return self.process.returncode, told

    def listens_at(self) -> set[str]:
        """Addresses of all of its ports, IPv4 ones as the kernel writes them."""
        mine = {os.readlink(path) for path in Path(f"/proc/{self.process.pid}/fd").iterdir() if os.path.lexists(path)}
        lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{self.process.pid}/net/{name}").read_text().splitlines()[1:]]
        return {words[1].partition(":")[0] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in mine}


@contextlib.contextmanager
def _serve(server: RunningServer, secret: Path, *options: str) -> Iterator[Serve]:
    command = [sys.executable, "-P", "-m", "gms_core.cli", "snapshot", "serve", "--listen=127.0.0.1:0", f"--secret-file={secret}"]
    command += ["--runtime-dir", str(server.directory), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment())
    try:
        yield Serve(process)
    finally:
        process.kill()
        process.communicate()


def _pull(server: RunningServer, where: str, secret: Path, *options: str) -> Result:
    return CliRunner().invoke(gms, ["snapshot", "pull", where, f"--secret-file={secret}", "--runtime-dir", str(server.directory), *options])


def _publish(session: Session, pool: str = "weights") -> bytes:
    data = os.urandom(BYTES)
    publish(session, data, pool=pool, slab=2**20).release()
    return data


def _read(session: Session, pool: str = "weights") -> bytes:
    with session.acquire(pool, "ro", MODEL, timeout_s=1) as lease:
        return read_all(session, lease, BYTES)  # type: ignore[no-any-return]


def _readers(session: Session) -> list[int]:
    return [len(pool.readers) for pool in session.status().pools]


@pytest.mark.parametrize("way", ["all", "tcp"])
def test_bytes_are_the_same_when_another_machine_pulls_them(
    server: RunningServer, target: RunningServer, secret: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("UCX_TLS", way)  # processes of one machine would not take TCP, which those of two mostly have to
    with server.connect() as source, target.connect() as session:
        saved = {pool: _publish(source, pool) for pool in ("weights", "weights.1")}
        with _serve(server, secret, "--ranks") as serving:
            assert _readers(source) == [1, 1]
            assert serving.listens_at() == {"0100007F"}, "whoever reaches a port of UCX's reaches the process's memory"
            pulled = _pull(target, serving.where, secret)
            assert pulled.exit_code == 0, pulled.output
            assert "pulled weights@1" in pulled.stdout
            assert {pool: _read(session, pool) for pool in saved} == saved
            assert [(pool.name, pool.generation) for pool in session.status().pools] == [("weights", 1), ("weights.1", 1)]
            again = _pull(target, serving.where, secret, "--if-missing")
            assert "it is committed already" in again.stdout
            serving.process.send_signal(signal.SIGTERM)
            code, told = serving.ended()
            assert code == 0, told
        until(lambda: _readers(source) == [0, 0])


READ = """
import os, signal, sys, time
from pathlib import Path
from gms_core.errors import GmsError
from gms_core.snapshot.backends.nixl_ucx import PeerBackend
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.peers.handshake import address, read_secret
from gms_core.snapshot.peers.peer import Peer
from gms_core.snapshot.restore import job_of
from gms_core.snapshot.running import running
from tests.unit.snapshot_transfers import Memory

where, secret, pid, what = sys.argv[1:]
try:
    with Peer(address(where), read_secret(Path(secret))) as peer:
        image = peer.image(0)
        job = job_of(image, peer.files(0), 1, {"deadline_s": "1" if what in ("kill", "stop") else "60"})
        if what == "kill":
            os.kill(int(pid), signal.SIGKILL)
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
        if what == "stop":
            os.kill(int(pid), signal.SIGSTOP)
        if what == "flip":
            job.checksums[1] ^= 1
        target = Memory(image.size)
        with memory_for("host", image.allocations) as memory, running(PeerBackend(peer.offer), job, memory) as transfer:
            memory.ready(target.base)
            print("moved", transfer.finish().bytes)
except GmsError as error:
    print(error.code, error.message, error.hint)
sys.stdout.flush()
os._exit(0)  # as every process that has loaded UCX has to end
"""


SERVE = """
import os, sys
from pathlib import Path
from gms_core.client import connect
from gms_core.errors import GmsError
from gms_core.layout import Identity
from gms_core.snapshot.peers.serving import Serving
from gms_core.snapshot.whole import Place
from tests.unit.publishing import publish

path, when = Path(sys.argv[1]), sys.argv[2]

def commit(now):
    if now == when:
        with connect(socket_path=path, client="another writer") as session:
            publish(session, b"of another model", pool="weights.1", identity=Identity({"content": "another", "dtype": "bf16"})).release()

commit("before")
try:
    with Serving([Place("host", path, "weights"), Place("host", path, "weights.1")], lambda what: commit("meanwhile")) as serving:
        print([(image.pool, image.identity["content"]) for image in serving.manifest.images])
except GmsError as error:
    print(error.code, error.message)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("meanwhile", "[('weights', 'abc'), ('weights.1', 'abc')]"),
        ("before", "snapshot_mismatch these pools are not ranks of one engine, since they differ in content"),
    ],
)
def test_ranks_of_one_model_are_served_when_another_one_is_committed(server: RunningServer, when: str, told: str) -> None:
    with server.connect() as session:
        for pool in ("weights", "weights.1"):
            publish(session, b"of one model", pool=pool).release()
        command = [sys.executable, "-c", SERVE, str(server.directory / "host.sock"), when]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=child_environment())
    assert told in done.stdout, done.stderr


def _read_alone(serving: Serve, secret: Path, what: str) -> str:
    command = [sys.executable, "-c", READ, serving.where, str(secret), str(serving.process.pid), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=child_environment()).stdout


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("flip", r"snapshot_damaged the 1048576 bytes at position 16777216 of .*/memory/00000.shard have arrived with the checksum .*gms audit"),
        ("kill", r"transfer_failed .* cannot be (read|reached): .*Does gms snapshot serve still run there"),
        ("stop", r"transfer_failed \d+ bytes at position \d+ of .* cannot be read: .*"),
    ],
)
def test_place_is_named_when_a_peer_fails_hangs_or_has_other_bytes(server: RunningServer, secret: Path, what: str, words: str) -> None:
    with server.connect() as session:
        _publish(session)
        with _serve(server, secret) as serving:
            told = _read_alone(serving, secret, what)
            assert re.search(words, told), told


def test_nothing_is_published_when_the_peer_refuses_or_has_gone_or_has_something_else(
    server: RunningServer, target: RunningServer, secret: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("another secret, long enough")
    other.chmod(0o600)
    with server.connect() as source, target.connect() as session:
        _publish(source)
        with _serve(server, secret) as serving:
            refused = _pull(target, serving.where, other)
            assert refused.exit_code == ExitCode.PERMISSION, refused.output
            assert "has closed the connection" in refused.stderr
            assert "secret" in refused.stderr
            refused = _pull(target, serving.where, secret, "--expect=model=another")
            assert refused.exit_code == ExitCode.IDENTITY, refused.output
            assert "is not what is expected" in refused.stderr
            serving.process.send_signal(signal.SIGINT)
            code, told = serving.ended()
            assert code == 0
            assert "is refused: it has another secret" in told
        gone = _pull(target, serving.where, secret)
        assert gone.exit_code == ExitCode.SNAPSHOT, gone.output
        assert "gms snapshot serve has to run there" in gone.stderr
        assert not session.status().pools


def test_reason_is_told_when_there_is_nothing_to_serve(server: RunningServer, secret: Path) -> None:
    command = ["snapshot", "serve", "--listen=127.0.0.1:0", f"--secret-file={secret}", "--runtime-dir", str(server.directory)]
    refused = CliRunner().invoke(gms, command)
    assert refused.exit_code != 0
    assert "no server has a pool 'weights'" in refused.stderr
    secret.chmod(0o644)
    refused = CliRunner().invoke(gms, command)
    assert refused.exit_code == ExitCode.PERMISSION
    assert "chmod 600" in refused.stderr


def test_extra_is_named_when_nixl_cannot_be_loaded(secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in ("nixl_cu12", "nixl_cu13"):
        (tmp_path / f"{wheel}.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{child_environment().get('PYTHONPATH', '')}")
    refused = CliRunner().invoke(gms, ["snapshot", "pull", "127.0.0.1:1", f"--secret-file={secret}"])
    assert refused.exit_code != 0
    assert "nothing can be pulled here" in refused.stderr
    assert "gms[nixl]" in refused.stderr


def test_file_backend_refuses_and_names_the_command_when_it_reads_peers() -> None:
    job = Job("restore", (), (), (), 4096)
    with pytest.raises(BackendUnavailable, match="reads another machine's memory, and no files") as caught:
        registry.usable("nixl-ucx").check(job)
    assert "gms snapshot pull" in caught.value.hint


@pytest.mark.parametrize(("segment", "seconds", "told"), [("VRAM", 1.0, True), ("VRAM", 0.1, False), ("DRAM", 1.0, False)])
def test_it_is_told_when_a_peers_gpu_is_read_slowly(segment: Literal["DRAM", "VRAM"], seconds: float, told: bool) -> None:
    clock = iter([100.0, 100.0 + seconds / 2, 100.0 + seconds, 200.0])
    route = nixl_ucx.PeerRoute(Offer(FORMAT, msgspec.Raw(b"{}"), b"", ()), Reach(segment, 0, ()), 1, clock.__next__)
    for size in (0, nixl_ucx.SAMPLE_BYTES // 2, nixl_ucx.SAMPLE_BYTES // 2, 1):
        route.arrived(size)
    assert [note.startswith("the first 256 MiB of the peer's GPU came at 0.27 GB/s") for note in route.notes()] == [True] * told


class _Dripping:
    """A connection on which one byte comes every nine seconds."""

    def __init__(self) -> None:
        self.now, self.came = 1000.0, 0

    def settimeout(self, _: float) -> None:
        pass

    def recv(self, _: int) -> bytes:
        self.now += 9
        self.came += 1
        return b"g"


def test_stranger_gets_no_more_time_when_it_sends_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _Dripping()
    monkeypatch.setattr(handshake, "time", SimpleNamespace(monotonic=lambda: peer.now))
    with pytest.raises(TimeoutError):
        answer(peer, SECRET, b"offer")  # type: ignore[arg-type]
    assert peer.came == 2


def test_those_with_the_secret_are_served_when_strangers_hold_connections(caplog: pytest.LogCaptureFixture) -> None:
    peers = serving_module._Peers()
    with contextlib.ExitStack() as stack:
        first, *strangers = [stack.enter_context(socket.socket()) for _ in range(serving_module._MOST_STRANGERS + 1)]
        assert peers.admit(first)
        assert peers.prove(first)
        assert all(peers.admit(one) for one in strangers)
        assert not peers.admit(first)
        peers.leave(strangers[0])
        assert peers.admit(strangers[0])
    for _ in range(1000):
        peers.warn(address("node:1"), "it speaks something else")
    assert 1 <= len(caplog.records) < 100


def test_serving_ends_and_says_why_when_a_lease_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise SessionClosed("the session is closed")

    monkeypatch.setattr(serving_module, "_LOOK_S", 0.01)
    with serving_module.listen(address("127.0.0.1:0")) as listener, pytest.raises(SessionClosed):
        serving_module.serve(SimpleNamespace(check=check, offer=b""), listener, SECRET)  # type: ignore[arg-type]
    until(lambda: not [one for one in threading.enumerate() if one.daemon and "_watch" in one.name])


def test_network_is_that_of_the_address_when_the_environment_names_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / "lo" / "device" / "infiniband" / name / "ports" / "1").mkdir(parents=True)
    monkeypatch.setattr(network, "_INTERFACES", tmp_path)
    monkeypatch.setenv("UCX_NET_DEVICES", "")
    assert network.keep_to("127.0.0.1") == "lo,mlx5_0:1,mlx5_1:1"
    assert os.environ["UCX_NET_DEVICES"] == "lo,mlx5_0:1,mlx5_1:1"
    monkeypatch.setenv("UCX_NET_DEVICES", "eth7")
    assert network.keep_to("0.0.0.0") == "eth7"


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::", "203.0.113.1"])
def test_address_is_refused_when_it_does_not_say_which_network(monkeypatch: pytest.MonkeyPatch, everywhere: str) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "")
    with pytest.raises(InvalidArgument, match="does not say which network") as caught:
        network.keep_to(everywhere)
    assert "UCX_NET_DEVICES" in caught.value.hint


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:65536", "a:b:1", "[::1]", "host:-1", "host:1x"])
def test_address_is_refused_when_it_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not HOST:PORT"):
        address(text)


def test_address_is_understood_when_it_is_one() -> None:
    assert [address(text) for text in ("node-1:7000", "[::1]:0")] == [("node-1", 7000), ("::1", 0)]
    assert [str(address(text)) for text in ("node-1:7000", "[::1]:0")] == ["node-1:7000", "[::1]:0"]


@pytest.mark.parametrize(
    ("content", "mode", "kind"),
    [(None, 0o600, InvalidArgument), ("short", 0o600, InvalidArgument), ("x" * 5000, 0o600, InvalidArgument), ("x" * 32, 0o640, PermissionRefused)],
)
def test_secret_is_refused_when_it_is_short_or_others_may_read_it(tmp_path: Path, content: str | None, mode: int, kind: type[GmsError]) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(kind):
        read_secret(path)


def _met(mine: bytes, theirs: bytes, offer: bytes, between: Callable[[bytes], bytes] = bytes) -> tuple[bytes | GmsError, GmsError | OSError | None]:
    """What one that pulls gets, and what one that serves meets; what the second one sends goes through a hand."""
    pulls, hand = socket.socketpair()
    other_hand, serves = socket.socketpair()
    met: list[GmsError | OSError | None] = []

    def attend() -> None:
        with serves:
            try:
                answer(serves, theirs, offer)
                met.append(None)
            except (GmsError, OSError) as error:
                met.append(error)

    def relay(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(change(data))
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    threads = [
        threading.Thread(target=attend),
        threading.Thread(target=relay, args=(hand, other_hand, bytes)),
        threading.Thread(target=relay, args=(other_hand, hand, between)),
    ]
    for thread in threads:
        thread.start()
    with pulls, hand, other_hand:
        try:
            got: bytes | GmsError = ask(pulls, mine, "the peer")
        except GmsError as error:
            got = error
        pulls.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
    return got, met[0]


SECRET = b"sixteen bytes or more"


def test_offer_comes_when_both_have_the_secret() -> None:
    offer = os.urandom(3 * 2**20)
    assert _met(SECRET, SECRET, offer) == (offer, None)


def test_both_refuse_when_the_secrets_differ() -> None:
    got, met = _met(SECRET, SECRET + b"!", b"offer")
    assert isinstance(got, PermissionRefused)
    assert isinstance(met, PermissionRefused)


def test_offer_is_refused_when_somebody_has_changed_it() -> None:
    got, _ = _met(SECRET, SECRET, b"the weights are there", lambda data: data.replace(b"there", b"here!"))
    assert isinstance(got, PermissionRefused)


def test_offer_is_refused_when_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "MOST_OFFER", 4)
    got, _ = _met(SECRET, SECRET, b"offer")
    assert isinstance(got, TransferFailed)
    assert "more than can be understood" in got.message


def test_one_that_pulls_notices_when_who_answers_has_no_secret() -> None:
    pulls, serves = socket.socketpair()
    with pulls, serves:
        serves.sendall(bytes(32) + bytes(32) + (3).to_bytes(8) + b"abc" + bytes(32))
        with pytest.raises(PermissionRefused, match="does not have the same secret"):
            ask(pulls, SECRET, "the peer")


def _offer(**changes: object) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        manifest = save_bytes(roots_in(Path(folder), 1))
    spans = (Span(4096, 4096), Span(2**30, manifest.images[0].size - 4096))
    if changes.get("manifest") is True:
        (image,) = manifest.images
        identity = Identity({**image.identity, "content": "another"})
        digest = layout_digest(identity, [Allocation(number, *one) for number, one in enumerate(image.allocations)], image.tensors)
        other = msgspec.structs.replace(image, pool="weights.1", identity=dict(identity.fields), digest=digest)
        changes["manifest"] = msgspec.Raw(encode(msgspec.structs.replace(manifest, images=(image, other))))
        changes["reaches"] = (Reach("DRAM", 0, spans),) * 2
    facts: dict[str, object] = {"format": FORMAT, "manifest": msgspec.Raw(encode(manifest)), "metadata": b"x", "reaches": (Reach("DRAM", 0, spans),)}
    return msgspec.json.encode({**facts, **changes})


def test_offer_is_understood_when_it_is_whole() -> None:
    offer, manifest = understood(_offer(), "the peer")
    assert [span.begin for span in offer.reaches[0].spans] == [4096, 2**30]
    assert manifest.images[0].pool == "weights"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"format": "gms-peer/2"}, SnapshotMismatch, "speaks 'gms-peer/2'"),
        ({"reaches": ()}, SnapshotDamaged, "where all bytes"),
        ({"reaches": ({"segment": "DRAM", "gpu": 0, "spans": [{"begin": 0, "size": 4096}]},)}, SnapshotDamaged, "where all bytes"),
        ({"reaches": ({"segment": "FILE", "gpu": 0, "spans": []},)}, SnapshotDamaged, "no offer"),
        ({"manifest": msgspec.Raw(b"{}")}, SnapshotDamaged, "not a manifest"),
        ({"manifest": True}, SnapshotMismatch, "not ranks of one engine, since they differ in content"),
        ({"surprise": 1}, SnapshotDamaged, "no offer"),
    ],
)
def test_offer_is_refused_when_it_contradicts_itself(changes: dict[str, object], kind: type[GmsError], words: str) -> None:
    with pytest.raises(kind, match=words):
        understood(_offer(**changes), "the peer")


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_every_byte_of_a_part_is_found_once_when_memory_is_in_pieces(sizes: list[int], data: st.DataObject) -> None:
    spans = [Span(100 * number, size) for number, size in enumerate(sizes, 1)]
    addresses = [span.begin + inside for span in spans for inside in range(span.size)]
    offset = data.draw(st.integers(0, len(addresses) - 1))
    size = data.draw(st.integers(1, len(addresses) - offset))
    found = [part.begin + inside for part in parts(spans, offset, size) for inside in range(part.size)]
    assert found == addresses[offset : offset + size]
