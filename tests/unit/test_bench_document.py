"""``make bench``: its document, what it says of loaders that are missing or fail, and one small run as a real process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from gms_core.errors import BackendUnavailable, GmsError, InvalidArgument
from tools.bench import checkpoint, commands, page_cache
from tools.bench.document import SCHEMA, Document, Limit, Loader, Loading, Machine, Measurement, Sample, encode, read, summed_up
from tools.bench.limits import disk_limit, fio_files
from tools.bench.loaders import GMS, PEERS, SOURCES, Peer, Tensors, chosen, names, prepare
from tools.bench.loading import restored_s
from tools.bench.machine import ROOT, file_system, machine
from tools.bench.orders import Copy, Load, ask

RUN = [sys.executable, "-m", "tools.bench"]
COPY = Limit("copies", 4e9)
DISK = Limit("fio", 2e9)


def _samples(*seconds: float) -> list[Sample]:
    return [Sample(seconds=one, from_start=one + 1, cached=0.0) for one in seconds]


def _document(machine_: Machine, **changes: object) -> Document:
    facts = {"schema": SCHEMA, "date": "2026-01-01T00:00:00+00:00", "duration_s": 1.0, "machine": machine_}
    return Document(**{**facts, **changes})  # type: ignore[arg-type]


def _loading(*measurements: Measurement, left_out: dict[str, str] | None = None) -> Loading:
    loaders = (Loader("gms staged", "gms", "1"), Loader("gms aio", "gms", error="no aio here"), Loader("safetensors load_file", "peer"))
    facts = {"device": "host", "bytes": 1, "tensors": 1, "files": 1, "repeat": 1, "copy": COPY, "disk": DISK}
    return Loading(**facts, loaders=loaders, left_out=left_out or {}, measurements=measurements)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def here() -> Machine:
    return machine({"disk": ROOT})


def test_rate_is_that_of_the_median_when_samples_differ() -> None:
    found = summed_up("disk", "gms staged", _samples(4.0, 1.0, 2.0), 2 * 10**9, COPY, DISK)
    assert found.seconds is not None
    assert (found.seconds.min, found.seconds.median, found.seconds.max) == (1.0, 2.0, 4.0)
    assert found.from_start is not None
    assert found.from_start.median == 3.0
    assert (found.rate, found.of_copy, found.of_disk) == (1e9, 0.25, 0.5)
    assert [sample.seconds for sample in found.samples] == [4.0, 1.0, 2.0]


def test_no_share_is_given_when_there_is_no_limit() -> None:
    found = summed_up("tmpfs", "gms staged", _samples(1.0), 10**9, Limit("copies", error="no"), Limit(""))
    assert (found.rate, found.of_copy, found.of_disk) == (1e9, 0.0, 0.0)


def test_no_figures_are_given_when_one_of_the_processes_has_failed() -> None:
    found = summed_up("tmpfs", "gms staged", _samples(1.0), 10**9, COPY, DISK, "it was ended by SIGKILL")
    assert (found.seconds, found.rate, found.error) == (None, 0.0, "it was ended by SIGKILL")


def test_document_comes_back_when_it_is_read(tmp_path: Path, here: Machine) -> None:
    measured = summed_up("disk", "gms staged", _samples(1.0), 10**9, COPY, DISK)
    document = _document(here, attach={"schema": "gms-bench-attach/1", "error": "no"}, loading=_loading(measured))
    path = tmp_path / "bench.json"
    path.write_bytes(encode(document))
    assert read(path) == document
    found = json.loads(path.read_text())
    assert (found["schema"], found["loading"]["schema"], found["attach"]["schema"]) == (SCHEMA, "gms-bench-loading/1", "gms-bench-attach/1")
    assert "server" not in found


@pytest.mark.parametrize(("text", "words"), [("{}", "no document"), ("", "no document"), (None, "cannot be read")])
def test_document_is_refused_when_it_is_something_else(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidArgument, match=words):
        read(path)


def test_document_is_refused_when_it_has_another_schema(tmp_path: Path, here: Machine) -> None:
    path = tmp_path / "bench.json"
    path.write_bytes(encode(_document(here, schema="gms-bench/2")))
    with pytest.raises(InvalidArgument, match="gms-bench/2"):
        read(path)


def test_failures_are_those_of_gms_alone_when_loaders_have_failed(here: Machine) -> None:
    errors = [
        Measurement(source="disk", loader="gms staged", error="the server is gone"),
        Measurement(source="disk", loader="gms aio", error="no aio here"),
        Measurement(source="disk", loader="safetensors load_file", error="not installed"),
        Measurement(source="tmpfs", loader="gms staged", error="/dev/shm is no tmpfs"),
    ]
    loading = _loading(*errors, left_out={"tmpfs": "/dev/shm is no tmpfs"})
    document = _document(here, server={"schema": "gms-bench-server/1", "error": "boom"}, loading=loading)
    assert document.failures() == ["server: boom", "gms staged, disk: the server is gone"]


def test_machine_names_its_versions_and_file_systems_when_it_is_described(here: Machine) -> None:
    assert all((here.cpu, here.cores, here.memory_bytes, here.kernel, here.python, here.gms))
    assert here.file_systems["disk"].type
    assert here.file_systems["disk"].bytes > 0
    assert re.fullmatch(r"([0-9a-f]{40})?", here.commit)


def test_file_system_is_that_of_the_innermost_mount_when_mounts_lie_in_each_other(tmp_path: Path) -> None:
    inner = tmp_path / "a b"
    inner.mkdir()
    escaped = str(inner).replace(" ", "\\040")
    mounts = f"1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 8:2 / {escaped} rw shared:1 - xfs /dev/vdb rw\n3 2 0:9 / {escaped} rw - tmpfs none rw\n"
    assert (file_system(inner, mounts).type, file_system(inner, mounts).source) == ("tmpfs", "none")
    assert file_system(tmp_path, mounts).type == "ext4"


@pytest.mark.parametrize("size", [2**20, 5 * 10**6, 2**27, 2**30, 4 * 2**30, 100 * 2**30])
def test_checkpoint_has_the_wanted_bytes_less_than_a_row_when_it_is_planned(size: int) -> None:
    tensors = checkpoint.shapes_of(size)
    width = tensors[0][1][1]
    assert 0 <= size - sum(checkpoint.bytes_of(shape) for _, shape in tensors) < 2 * width
    assert len({name for name, _ in tensors}) == len(tensors)


def test_checkpoint_is_refused_when_there_is_no_room_for_a_model() -> None:
    with pytest.raises(InvalidArgument, match="is no model"):
        checkpoint.shapes_of(1000)


def test_share_in_memory_is_that_of_the_pages_there_are_when_a_file_has_holes() -> None:
    descriptor = os.memfd_create("half")
    try:
        os.ftruncate(descriptor, 2**20)
        os.pwrite(descriptor, bytes(2**19), 0)
        path = Path(f"/proc/self/fd/{descriptor}")
        assert page_cache.cached_share([(path, 2**20)]) == 0.5
        page_cache.forget([(path, 2**20)])  # what lies in memory alone stays
        assert page_cache.cached_share([(path, 2**19)]) == 1.0
    finally:
        os.close(descriptor)
    assert page_cache.cached_share([]) == 0.0


def test_seconds_of_a_restore_are_all_that_is_not_beside_its_transfer() -> None:
    image = {"seconds": 1.0, "threads": {"clean": 0.25, "read": 9.0}, "around": {"prepare": 0.5, "acquire": 7.0, "memory": 8.0, "commit": 0.125}}
    assert restored_s(image) == 1.875


def test_limit_of_the_disk_is_fios_or_that_of_plain_reads_or_says_why_there_is_none() -> None:
    files = [(Path("a"), 3 * 2**20 + 5), (Path("b"), 100)]
    assert fio_files(files) == [(Path("a"), 3 * 2**20)]
    assert disk_limit(files, [1.0, 3.0, 2.0], 1e9).rate == 1.5 * 2**20
    assert disk_limit(files, [], 1e9).rate == 1e9
    assert "fio" in disk_limit(files, [], 0.0).error


def test_all_loaders_are_chosen_when_none_is_named() -> None:
    assert chosen([]) == names() == (*GMS, *PEERS)
    assert chosen(["InstantTensor", "gms aio"]) == ("gms aio", "InstantTensor")
    with pytest.raises(InvalidArgument, match="no loader 'nothing'"):
        chosen(["nothing"])


def test_every_peer_can_be_installed_and_brings_no_torch_when_the_group_is_read() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    peers = {re.split("[<>=~!]", word)[0] for word in groups["peers"]}
    assert {peer.distribution for peer in PEERS.values()} <= peers
    assert "torch" not in peers
    assert not peers & {re.split("[<>=~!]", word)[0] for word in groups["dev"]}


# Commands that fail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('boom')", "gms bench attach failed: boom"),
        ('import sys; print(\'{"error": {"code": "x", "message": "no device"}}\', file=sys.stderr); sys.exit(9)', "no device"),
        ("print('hello')", "something else than JSON"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_section_has_its_schema_and_the_reason_when_a_command_fails(code: str, words: str) -> None:
    found = commands.section("attach", "bench", "attach", command=(sys.executable, "-c", code))
    assert found["schema"] == "gms-bench-attach/1"
    assert words in found["error"]


def test_command_is_ended_when_it_does_not_end() -> None:
    found = commands.section("server", "bench", "server", command=("sh", "-c", "exec sleep 600", "sh"), patience_s=0.2)
    assert found == {"schema": "gms-bench-server/1", "error": "gms bench server did not end within 0.2 s"}


# Processes that fail, and peers that are missing


def test_process_is_named_with_its_signal_when_it_was_killed() -> None:
    with pytest.raises(GmsError, match="its process was ended by SIGKILL"):
        ask(Copy("host", 4096), command=("sh", "-c", "kill -9 $$"))


def test_process_is_named_with_its_last_line_when_it_has_no_answer() -> None:
    with pytest.raises(GmsError, match="exited with code 3 and no answer: last words"):
        ask(Copy("host", 4096), command=("sh", "-c", "echo first >&2; echo last words >&2; exit 3"))


def test_process_is_ended_when_it_does_not_answer() -> None:
    with pytest.raises(GmsError, match="did not end within"):
        ask(Copy("host", 4096), command=("sh", "-c", "exec sleep 600"), patience_s=0.2)


def test_copies_have_a_rate_when_they_are_measured_on_the_host() -> None:
    assert ask(Copy("host", 2**20)).answer.rate > 0


def test_peer_is_unavailable_with_a_reason_when_it_is_not_installed() -> None:
    missing = Peer("no-such-loader", "no_such_loader", lambda *_: Tensors({}))
    with pytest.raises(BackendUnavailable, match="no-such-loader is not installed: make peers"):
        prepare(missing, "cpu")
    with pytest.raises(BackendUnavailable, match="GPUs alone"):
        prepare(PEERS["InstantTensor"]._replace(module="json"), "cpu")


def test_peer_is_unavailable_with_a_reason_when_torch_is_not_installed(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('tools.bench.child', run_name='__main__')"
    with pytest.raises(BackendUnavailable, match="torch is not installed"):
        ask(Load("safetensors load_file", str(tmp_path), "cpu"), command=(sys.executable, "-c", code))


def test_peer_is_refused_when_the_bytes_are_not_those_of_the_checkpoint(tmp_path: Path) -> None:
    written = checkpoint.write(tmp_path, checkpoint.LEAST_BYTES)
    wrong = written.tensors[-1]
    changed = [msgspec.structs.replace(one, digest="0" * 16) if one is wrong else one for one in written.tensors]
    (tmp_path / checkpoint.LIST).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(GmsError, match=f"1 of {len(changed)} tensors are not those of the checkpoint: {wrong.name}"):
        ask(Load("safetensors safe_open", str(tmp_path), "cpu"))


# One run


def test_one_document_names_every_loader_with_figures_or_a_reason_when_it_is_run(tmp_path: Path) -> None:
    out, disk = tmp_path / "out/bench.json", tmp_path / "disk"
    wanted = ("gms staged", "gms local-ssd-pinned", "safetensors load_file", "fastsafetensors GDS", "InstantTensor")
    words = ["--only", "loading", "--bytes", "1MiB", "--repeat", "1", "--device", "host", "--source", "page cache", "--source", "tmpfs"]
    words += [word for name in wanted for word in ("--loader", name)]
    done = subprocess.run(
        [*RUN, *words, "--out", str(out), "--dir", str(disk), "--tmpfs", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = read(out)
    loading = found.loading
    assert loading is not None
    assert (found.attach, found.failures()) == (None, [])
    assert loading.copy.rate > 0
    assert [one.name for one in loading.loaders] == list(wanted)
    measured = {(one.source, one.loader): one for one in loading.measurements}
    assert list(measured) == [(source, name) for source in SOURCES[:2] for name in wanted]
    for name in wanted[:3]:
        assert measured["page cache", name].rate > 0, measured["page cache", name].error
    assert all(measured["page cache", name].error for name in wanted[3:])
    assert all("is no tmpfs" in measured["tmpfs", name].error for name in wanted)
    assert all(name in done.stdout for name in wanted)
    assert list(disk.iterdir()) == []
    shown = subprocess.run([*RUN, "--show", str(out)], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() in done.stdout


def test_document_has_the_reason_and_the_run_fails_when_there_is_no_room(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [*RUN, "--only", "loading", "--bytes", "1000TiB", "--device", "host", "--out", str(out), "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    found = read(out)
    assert found.loading is None
    assert "needs 2100 TiB" in found.loading_error
    assert found.failures() == [f"loading: {found.loading_error}"]
    assert found.loading_error in done.stdout


def test_what_was_measured_is_kept_and_nothing_else_when_a_run_is_told_to_end(tmp_path: Path) -> None:
    out, disk = tmp_path / "bench.json", tmp_path / "disk"
    words = ["--only", "loading", "--bytes", "1MiB", "--repeat", "100", "--device", "host", "--source", "page cache", "--loader", "gms staged"]
    command = [*RUN, *words, "--out", str(out), "--dir", str(disk)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert any(line.startswith("page cache, 2 of") for line in process.stderr)
        assert list(disk.iterdir()) != []
        process.terminate()
        process.stderr.read()
        shown = process.stdout.read()
    assert process.returncode == 130
    assert list(disk.iterdir()) == []
    loading = read(out).loading
    assert loading is not None
    assert loading.interrupted
    assert loading.measurements[0].rate > 0
    assert 1 <= len(loading.measurements[0].samples) < 100
    assert "ended early" in shown


def test_nothing_is_left_when_a_run_is_told_to_end_before_anything_was_measured(tmp_path: Path) -> None:
    command = [*RUN, "--only", "loading", "--bytes", "64MiB", "--device", "host", "--out", str(tmp_path / "bench.json"), "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert any(line.startswith("a checkpoint") for line in process.stderr)
        process.terminate()
        process.stderr.read()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "said"), [(["--loader", "nothing"], "no loader 'nothing'"), (["--device", "0"], "is no device")])
def test_nothing_is_measured_when_an_option_is_wrong(tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run(
        [*RUN, *words, "--out", str(tmp_path / "bench.json"), "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
