"""NIXL with its real library: what is said when it fails, hangs or is not there, and what is left when its process is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gms_core.cli.exit_codes import ExitCode
from gms_core.config import child_environment
from gms_core.errors import BackendUnavailable, InvalidArgument, SnapshotDamaged, TransferFailed
from gms_core.snapshot import engine, registry
from gms_core.snapshot.backends import asking, nixl_posix, nixl_waiting
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError, library
from gms_core.snapshot.backends.nixl_waiting import Patience
from gms_core.snapshot.buffers import Ring
from gms_core.snapshot.config import SnapshotConfig
from gms_core.snapshot.files import ShardFile
from gms_core.snapshot.memories import DiscardingMemory, memory_for
from gms_core.snapshot.transfer import is_quiet
from gms_core.snapshot.whole import verify_snapshot
from tests.conftest import RunningServer
from tests.unit.conftest import InstallPlugin
from tests.unit.publishing import until
from tests.unit.snapshot_stand_in import roots_in, save_bytes
from tests.unit.snapshot_transfers import LateMemory, Memory, Scene, descriptors, rings, transfer_threads
from tests.unit.stuck_backend import ENDLESS
from tests.unit.test_snapshot_processes import UNTOUCHED, _is_gone, _pools, _publish_ranks, _save, _states, _stuck

BOTH = ("nixl-posix", "nixl-posix-direct")
QUICK_S = "0.3"


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture
def nothing_left():
    library()  # it stays in this process once it is there
    before = descriptors(), rings()
    yield
    assert transfer_threads() == []
    assert (descriptors(), rings()) == before


class Failing:
    """NIXL that says of some requests that have ended that they have failed, or that they could not be begun.

    Args:
        every: How many of a thread's calls lead to a failure.
        threads: That wait for each other up to the first one, lest one has done all the work before another begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str, every: int, threads: int = 1) -> None:
        self.every, self.failed = every, 0
        self._counts, self._meeting = threading.local(), threading.Barrier(threads, timeout=60)
        plain = getattr(Agent, what)

        def call(agent, *arguments):
            if what == "has_ended":
                ended = plain(agent, *arguments)
                if ended:
                    self.fail_now_and_then()
                return ended
            self.fail_now_and_then()
            return plain(agent, *arguments)

        monkeypatch.setattr(Agent, what, call)

    def fail_now_and_then(self) -> None:
        count = self._counts.count = getattr(self._counts, "count", 0) + 1
        if count <= self.every:
            self._meeting.wait()
        if count % self.every == 0:
            self.failed += 1
            raise NixlError("NIXL_ERR_BACKEND")


@pytest.mark.parametrize("what", ["has_ended", "begin"])
@pytest.mark.parametrize("direction", ["save", "restore"])
def test_every_byte_arrives_and_it_is_told_when_nixl_fails_in_the_middle(scene, monkeypatch, nothing_left, direction, what):
    failing = Failing(monkeypatch, what, every=2, threads=2)
    if direction == "save":
        moved = scene.save("nixl-posix", LateMemory, workers=2)
        assert scene.files_hold_image()
    else:
        scene.fill_files()
        target, moved = scene.restore("nixl-posix", LateMemory, workers=2)
        assert target.bytes[:] == scene.filled().bytes[:]
    assert failing.failed >= 2
    assert any(note.startswith("NIXL has failed in 2 threads; from there on they have") for note in moved.notes)


@pytest.mark.parametrize("direction", ["save", "restore"])
def test_no_buffer_is_used_again_when_nixl_says_that_a_request_has_failed_which_is_under_way(scene, monkeypatch, nothing_left, direction):
    """A queue of NIXL's tells its own failure to whichever request is looked at: that one's buffer may be read or written for as long as it is."""
    asked, plain_ended, plain_close = [], Agent.has_ended, Agent.close
    touched = []

    def has_ended(agent, handle):
        asked.append(handle)
        if len(asked) == 3:
            agent._has_failed(handle)  # not looked at: it is under way as far as anybody knows
            raise NixlError("NIXL_ERR_BACKEND")
        return plain_ended(agent, handle)

    def close(agent):
        plain_close(agent)
        touched.append("closed")

    plain_read, plain_write = ShardFile.read, ShardFile.write
    monkeypatch.setattr(Agent, "has_ended", has_ended)
    monkeypatch.setattr(Agent, "close", close)
    monkeypatch.setattr(ShardFile, "read", lambda *words: (touched.append("touched"), plain_read(*words))[1])
    monkeypatch.setattr(ShardFile, "write", lambda *words: (touched.append("touched"), plain_write(*words))[1])
    if direction == "save":
        scene.save("nixl-posix", LateMemory, workers=1)
        assert scene.files_hold_image()
    else:
        scene.fill_files()
        target, _ = scene.restore("nixl-posix", LateMemory, workers=1)
        assert target.bytes[:] == scene.filled().bytes[:]
    assert touched[:2] == ["closed", "touched"]  # destroyed, which waits for the kernel, before anything else is done with a buffer


def test_transfer_fails_and_keeps_its_buffers_when_a_failed_request_cannot_be_given_up(scene, monkeypatch):
    scene.fill_files()
    plain = Agent.has_ended
    asked, before, target = [], rings(), Memory(scene.extent)
    kept: list[tuple[object, Ring, object]] = []
    monkeypatch.setattr(engine, "_kept", kept)
    monkeypatch.setattr(nixl_waiting, "_hung", [])

    def has_ended(agent, handle):
        asked.append(agent)
        if len(asked) == 3:
            agent._has_failed(handle)
            raise NixlError("NIXL_ERR_BACKEND")
        return plain(agent, handle)

    plain_agent = nixl_posix.posix_agent

    def careless(requests):
        agent = plain_agent(requests)
        agent.drains = False
        return agent

    monkeypatch.setattr(Agent, "has_ended", has_ended)
    monkeypatch.setattr(nixl_posix, "posix_agent", careless)
    with memory_for("host", scene.allocations) as memory:
        transfer = registry.find("nixl-posix").open(scene.job(workers=1), memory)
        memory.ready(target.base)
        with pytest.raises(TransferFailed, match="Device or resource busy"):
            transfer.finish()
        assert not is_quiet(transfer)
    assert rings() > before
    for agent in set(asked):
        agent.drains = True
        agent.close()
    for _, ring, _ in kept:
        ring.close()
    assert rings() == before


def test_end_is_waited_for_once_when_it_does_not_come():
    patience = Patience(0.0)
    with pytest.raises(OSError, match="Timer expired"):
        patience.wait()
    patience._seconds = 600.0
    patience.renew()
    with pytest.raises(OSError, match="Timer expired"):
        patience.wait()


@pytest.mark.parametrize("what", ["has_ended", "begin", "register"])
def test_restore_fails_and_names_the_file_when_nixl_cannot_read_into_memory(scene, monkeypatch, nothing_left, what):
    scene.fill_files()
    Failing(monkeypatch, what, every=2 if what == "register" else 5)
    with pytest.raises(TransferFailed, match=r"NIXL's plugin POSIX could not read \d+ bytes at position .*; a plain read of them works") as caught:
        scene.restore("nixl-posix-direct", workers=1)
    assert caught.value.details["file"] in [str(file.path) for file in scene.files]
    assert "staged" in caught.value.hint


@pytest.mark.parametrize(("name", "direction"), [("nixl-posix", "save"), ("nixl-posix", "restore"), ("nixl-posix-direct", "restore")])
def test_disk_is_named_when_it_is_what_has_failed(scene, monkeypatch, nothing_left, name, direction):
    """NIXL says that something has failed, and no more: a plain call says what."""
    scene.fill_files()
    Failing(monkeypatch, "has_ended", every=4)

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev" if direction == "save" else "preadv", broken)
    with pytest.raises(TransferFailed, match=r"00000\.shard cannot be .* at position \d+: Input/output error") as caught:
        scene.save(name) if direction == "save" else scene.restore(name)
    assert caught.value.details["errno"] == "EIO"
    assert "The disk has failed" in caught.value.hint


def test_memory_is_what_is_checked_when_bytes_go_there_directly(scene, monkeypatch, nothing_left):
    """Each file is right, and what NIXL has brought is not: nothing but a look at the memory can tell."""
    scene.fill_files()

    class Flawed(LateMemory):
        def lane(self, *, spin=False):
            lane = super().lane(spin=spin)
            plain = lane.from_memory

            def from_memory(target, offset, size):
                piece = scene.pieces[3]
                if offset <= piece.offset < offset + size:
                    place = self.places(piece.offset, 1)[0]
                    with open("/proc/self/mem", "r+b", buffering=0) as memory:
                        memory.seek(place.address)
                        byte = memory.read(1)[0]
                        memory.seek(place.address)
                        memory.write(bytes([byte ^ 1]))
                return plain(target, offset, size)

            lane.from_memory = from_memory
            return lane

    with pytest.raises(SnapshotDamaged) as caught:
        scene.restore("nixl-posix-direct", Flawed)
    assert caught.value.details == {"file": str(scene.files[scene.pieces[3].shard].path), "position": str(scene.pieces[3].position)}


def test_direct_backend_says_so_when_there_is_no_memory_to_verify_with(scene, nothing_left):
    scene.fill_files()
    with DiscardingMemory() as memory, pytest.raises(BackendUnavailable, match="none when a snapshot is verified") as caught:
        registry.find("nixl-posix-direct").open(scene.job(), memory).finish()
    assert "--backend staged" in caught.value.hint


def test_verifying_is_refused_before_files_are_read_when_a_backend_reads_into_memory_alone(tmp_path):
    save_bytes(roots_in(tmp_path, 1))
    config = SnapshotConfig(roots=(tmp_path / "root0",), backend="nixl-posix-direct")
    told = []
    with pytest.raises(InvalidArgument, match="verifies nothing") as caught:
        verify_snapshot("model", config, lambda *words: told.append(words))
    assert "staged" in caught.value.hint
    assert not told


def test_gpu_is_refused_when_a_backend_reads_into_host_memory_alone(scene, nothing_left):
    class OfGpu(LateMemory):
        def places(self, offset, size):
            return [place._replace(gpu=0) for place in super().places(offset, size)]

    scene.fill_files()
    with pytest.raises(BackendUnavailable, match="'nixl-posix-direct' reads into memory of the device 'host' alone, and this is a GPU"):
        scene.restore("nixl-posix-direct", OfGpu)


@pytest.mark.parametrize("value", ["0", "soon", "86401", "-1"])
def test_deadline_is_refused_when_it_is_no_number_of_seconds(scene, value):
    for name in BOTH:
        with pytest.raises(InvalidArgument, match="deadline_s"):
            registry.find(name).check(scene.job(deadline_s=value))
    with pytest.raises(InvalidArgument, match="no option 'deadline_s'"):
        registry.find("staged").check(scene.job(deadline_s="1"))


HANGS = """
import gc, os, sys, weakref
from pathlib import Path
from gms_core.errors import TransferFailed
from gms_core.snapshot.backends.nixl_agents import Agent
from tests.unit.snapshot_transfers import Scene, rings

name, direction, folder = sys.argv[1:]
scene = Scene(Path(folder))
scene.fill_files()
begun, plain, before = [], Agent.begin, rings()

def begin(agent, *words):
    handle = plain(agent, *words)
    begun.append(weakref.ref(handle))
    return handle

Agent.begin, Agent.has_ended = begin, lambda agent, handle: False
try:
    scene.save(name, deadline_s="1") if direction == "save" else scene.restore(name, deadline_s="1")
except TransferFailed as error:
    print(error.details["errno"], error.details["file"], error.message, error.hint)
gc.collect()
assert begun and all(handle() is not None and handle().found is not None for handle in begun), "given up while it was under way"
assert rings() > before, "its buffers were given back"
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(("name", "direction"), [("nixl-posix", "save"), ("nixl-posix-direct", "restore")])
def test_file_is_named_and_the_process_ends_when_a_transfer_never_does(tmp_path, name, direction):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, name, direction, str(tmp_path)], capture_output=True, text=True, timeout=60, env=child_environment(), check=True
    )
    number, file, told = done.stdout.split(maxsplit=2)
    assert number == errno.errorcode[errno.ETIME]
    assert file.endswith("00000.shard")
    assert f"cannot be {'written' if direction == 'save' else 'read'} at position" in told
    assert "deadline_s" in told


def test_former_generation_stays_and_no_draft_is_left_when_a_restore_is_killed(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        _save(server, tmp_path, "--backend=nixl-posix")
        with _stuck(server, tmp_path, install_plugin, "restore", "model", "--option=with=nixl-posix-direct", source=ENDLESS) as stuck:
            first, second = stuck.children(2)
            until(lambda: all(writer for _, _, writer, _ in _pools(session)))
            os.kill(first, signal.SIGKILL)
            code, told = stuck.ended()
            assert code == ExitCode.SNAPSHOT, told
            assert "was ended by signal SIGKILL" in told
            assert _is_gone(second)
        until(lambda: _pools(session) == UNTOUCHED)
        assert _states(tmp_path) == [(1, "committed")]


def test_nothing_is_published_and_it_is_told_when_a_restore_hangs(server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        _save(server, tmp_path)
        options = ("--option=with=nixl-posix", "--option=deadline_s=1")
        with _stuck(server, tmp_path, install_plugin, "restore", "model", *options, source=ENDLESS) as stuck:
            code, told = stuck.ended()
            assert code == ExitCode.SNAPSHOT, told
            assert "Timer expired" in told
        until(lambda: _pools(session) == UNTOUCHED)


def test_former_snapshot_loads_when_a_save_is_killed(server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        _save(server, tmp_path)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--ranks", "--option=with=nixl-posix", source=ENDLESS) as stuck:
            children = stuck.children(2)
            stuck.process.kill()
            until(lambda: all(map(_is_gone, children)))
        until(lambda: _pools(session) == UNTOUCHED)
        assert _states(tmp_path) == [(1, "committed"), (2, "unfinished")]
        _save(server, tmp_path, "--backend=nixl-posix", "--resume")
        assert [state for _, state in _states(tmp_path)] == ["committed", "committed"]


def _python(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-P", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=child_environment(**environment)).stdout


def test_logging_of_the_process_stays_as_it_is_when_nixl_is_loaded(tmp_path):
    script = """
import logging, sys
from gms_core.snapshot.backends.nixl_posix import posix_agent
logging.basicConfig(filename=sys.argv[1], filemode="w", level=logging.INFO)
posix_agent(1).close()
logging.info("still there")
assert logging.raiseExceptions
assert "torch" not in sys.modules
"""
    assert _python(script, str(tmp_path / "log")) == ""
    assert "still there" in (tmp_path / "log").read_text()


def _python_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), child_environment().get("PYTHONPATH", "")])


def _wheel(site: Path, name: str, source: str) -> None:
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(source)
    metadata = site / f"{name}-9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9\n")


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_wheel_for_the_cuda_of_the_environment_is_taken_when_there_are_several(tmp_path, cuda):
    for name in ("nixl_cu12", "nixl_cu13"):
        _wheel(tmp_path, name, "")
    metadata = tmp_path / f"cuda_bindings-{cuda}.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: cuda-bindings\nVersion: {cuda}.0\n")
    script = "from gms_core.snapshot.backends.nixl_agents import library; print(library().module.__name__, library().version)"
    assert _python(script, PYTHONPATH=_python_path(tmp_path)).split() == [f"nixl_cu{cuda}", "9"]


def test_extra_is_named_when_nixl_is_not_there(monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.backends.nixl_agents._WHEELS", ("nixl_cu0",))
    library.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match="NIXL is not installed") as caught:
            library()
        assert "pip install 'gms[nixl]'" in caught.value.hint
    finally:
        library.cache_clear()


@pytest.mark.parametrize("name", ["nixl-posix", "nixl-posix-direct", "nixl-gds"])
def test_reason_is_told_when_nixl_cannot_be_loaded(tmp_path, monkeypatch, name):
    for wheel in ("nixl_cu12", "nixl_cu13"):
        _wheel(tmp_path, wheel, "raise ImportError('libnixl.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", _python_path(tmp_path))
    with pytest.raises(BackendUnavailable, match=rf"'{name}' cannot be used here: .*libnixl\.so: cannot open.*gms\[nixl\]") as caught:
        registry.usable(name)
    assert "'staged'" in caught.value.hint


ELSEWHERE = """
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError
from gms_core.snapshot.backends.nixl_probe import posix

begin, has_ended = Agent.begin, Agent.has_ended
other, results, last = {}, {}, []

def paired(agent, *words):
    handle = begin(agent, *words)
    if last and last[0] not in results:  # both are under way
        other[handle], other[last[0]] = last[0], handle
    last[:] = [handle]
    return handle

def result(agent, handle):
    if handle not in results:
        try:
            found = has_ended(agent, handle)
        except NixlError:
            found = None
        if found is not False:
            results[handle] = found
    return handle in results

def wrong(agent, handle):
    if not (result(agent, handle) & result(agent, other.get(handle, handle))):
        return False
    if results[other.get(handle, handle)] is None:
        raise NixlError("of the other one")
    return True

Agent.begin, Agent.has_ended = paired, wrong
print(*posix())
"""
OLD = """
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError
from gms_core.snapshot.backends.nixl_probe import posix

plain = Agent.has_ended

def has_ended(agent, handle):
    try:
        return plain(agent, handle)
    except NixlError:
        return True  # as versions before 1.5 say

Agent.has_ended = has_ended
print(*posix())
"""


@pytest.mark.parametrize("refused", [{"use_aio"}, {"use_aio", "use_uring"}])
def test_other_queue_of_the_kernel_is_tried_when_one_is_refused(monkeypatch, refused):
    """And never those of the C library, with which a failure can be told to another request."""
    asked = []

    def agent(plugin, options, drains=False):
        asked.append(next(name for name in options if name.startswith("use_")))
        if asked[-1] in refused:
            raise BackendUnavailable(f"{asked[-1]} is refused")
        assert drains == (asked[-1] == "use_aio")  # io_uring's is left to the kernel when it is closed
        return asked[-1]

    monkeypatch.setattr(nixl_posix, "Agent", agent)
    if len(refused) == 1:
        assert nixl_posix.posix_agent(1) == "use_uring"
    else:
        with pytest.raises(BackendUnavailable, match="use_uring is refused"):
            nixl_posix.posix_agent(1)
    assert asked == ["use_aio", "use_uring"]


@pytest.mark.parametrize("source", [OLD, ELSEWHERE], ids=["not told", "told of the other one"])
def test_version_is_refused_when_it_does_not_tell_of_short_writes(source):
    told = _python(source)
    assert told.startswith("False NIXL 1.")
    assert "only a part of a write; versions from 1.5 on do" in told


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import time; time.sleep(60)", f"the answer has not come back after {QUICK_S} seconds"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by signal SIGSEGV"),
        ("raise SystemExit('no such library')", "exited with code 1: no such library"),
        ("print('usable, certainly')", "cannot be tried"),
        (
            "import sys; from gms_core.snapshot.backends.asking import answer; answer(lambda: (print('x', flush=True), (True, sys.argv[1]))[1])",
            "word",
        ),
    ],
    ids=["hangs", "crashes", "fails", "prints", "answers"],
)
def test_answer_or_reason_is_told_when_a_process_is_asked(tmp_path, monkeypatch, source, words):
    (tmp_path / "asked.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", _python_path(tmp_path))
    found = asking.ask("asked", "word", about="the answer", deadline_s=float(QUICK_S) if "sleep" in source else None)
    assert words in found.reason
    assert found.usable == (words == "word")


def test_answer_is_taken_when_the_process_that_gave_it_does_not_end(tmp_path, monkeypatch):
    (tmp_path / "asked.py").write_text(
        "import atexit, time; from gms_core.snapshot.backends.asking import answer\n"
        "atexit.register(time.sleep, 600)\n"
        "answer(lambda: (True, 'word'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", _python_path(tmp_path))
    assert asking.ask("asked", about="the answer") == (True, "word")


def test_no_process_is_left_when_a_question_is_interrupted(tmp_path, monkeypatch):
    (tmp_path / "asked.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", _python_path(tmp_path))
    asked, plain = [], subprocess.Popen.communicate

    def communicate(process, **options):
        asked.append(process)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return plain(process, **options)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt):
        asking.ask("asked", about="the answer")
    assert asked[0].poll() == -signal.SIGKILL
    assert asked[0].stdout.closed
