"""``gms snapshot benchmark`` as a real process, on small numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.snapshot_benchmark import Part, _parts
from gms_core.config import child_environment
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.registry import names
from tests.unit.conftest import InstallPlugin
from tests.unit.object_stores import Proxy

COMMAND = [sys.executable, "-P", "-m", "gms_core.cli", "snapshot", "benchmark", "--device", "host", "--bytes", "20MiB"]


UNUSABLE = """
from gms_core.plugins.hookspecs import hookimpl
from gms_core.snapshot.transfer import Probe

class Pigeon:
    name = "pigeon"
    directions = frozenset({"save", "restore"})
    def probe(self): return Probe(False, "no pigeon is at home")
    def check(self, job): pass
    def open(self, job, memory): raise NotImplementedError

@hookimpl
def gms_transfer_backends(): return [Pigeon()]
"""


def _run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, check=False, env=child_environment(**environment))


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_every_backend_has_figures_or_a_reason_when_it_is_measured(tmp_path: Path) -> None:
    done = _run(f"--root={tmp_path / 'a'}", f"--root={tmp_path / 'b'}", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["device"], found["bytes"]) == ("gms-bench-snapshot/1", "host", 20 * 2**20)
    assert min(found["plain_write_s"], found["plain_read_s"]) > 0
    assert [run["backend"] for run in found["runs"]] == [name for name in names() if name != "object"]
    for run in found["runs"]:
        assert run["error"] or all(run[kind] is None or run[kind]["bytes"] == 20 * 2**20 for kind in ("save", "verify", "restore")), run
    staged = found["runs"][0]
    assert all(staged[kind]["seconds"] > 0 for kind in ("save", "verify", "restore"))
    assert _left(tmp_path) == ["gms-root", "gms-root"]


def test_object_store_has_figures_when_the_root_is_a_url(s3: Proxy) -> None:
    done = _run(f"--root={s3.url}", "-o", "json", "--workers=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["roots"] == [s3.url]
    assert min(found["plain_write_s"], found["plain_read_s"]) > 0
    ((run),) = found["runs"]
    assert (run["backend"], run["error"]) == ("object", "")
    assert [run[kind]["bytes"] for kind in ("save", "verify", "restore")] == [20 * 2**20] * 3
    assert Bucket(s3.url).objects().keys() == {"gms-root"}


def test_table_names_the_reason_when_a_backend_cannot_be_used(tmp_path: Path, install_plugin: InstallPlugin) -> None:
    path = f"{install_plugin('pigeon', UNUSABLE)}{os.pathsep}{child_environment().get('PYTHONPATH', '')}"
    done = _run(f"--root={tmp_path / 'a'}", "--backend=pigeon", "--backend=staged", "--workers=2", PYTHONPATH=path, GMS_PLUGINS="pigeon")
    assert done.returncode == 0, done.stderr
    assert "plain, 2 threads" in done.stdout
    assert "no pigeon is at home" in done.stdout
    assert "%" in done.stdout
    assert _left(tmp_path / "a") == ["gms-root"]


FIO = """#!{python}
import json, sys
direction = next(word.partition("=")[2] for word in sys.argv if word.startswith("--rw="))
sizes = [int(word.partition("=")[2]) for word in sys.argv if word.startswith("--size=")]
print("fio: a note before the document")
print(json.dumps({{"jobs": [{{direction: {{"io_bytes": size - {missing}, "runtime": 250 * (1 + number)}}}} for number, size in enumerate(sizes)]}}))
"""


def _fio(folder: Path, missing: int) -> str:
    """A search path on which there is a fio that reads all but some bytes of each file."""
    folder.mkdir()
    program = folder / "fio"
    program.write_text(FIO.format(python=sys.executable, missing=missing))
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_fio_stands_beside_the_backends_where_it_is_installed(tmp_path: Path) -> None:
    roots = f"--root={tmp_path / 'a'}", f"--root={tmp_path / 'b'}"
    done = _run(*roots, "--backend=staged", "-o", "json", PATH=_fio(tmp_path / "bin", missing=0))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fio_read_s"] == pytest.approx(0.25)  # one stripe, so one file
    assert found["fio_write_s"] == pytest.approx(0.5 * 20 / 32)  # of the slower one of two that are written at once, in whole requests
    assert _left(tmp_path / "a") == _left(tmp_path / "b") == ["gms-root"]


def test_fio_is_left_out_with_a_word_when_it_has_not_read_everything(tmp_path: Path) -> None:
    done = _run(f"--root={tmp_path / 'a'}", "--backend=staged", "-o", "json", PATH=_fio(tmp_path / "bin", missing=1))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["fio_read_s"], found["fio_write_s"]) == (0, 0)
    assert "fio could not read 1 files" in done.stderr


def test_nothing_is_written_when_there_is_no_such_backend(tmp_path: Path) -> None:
    done = _run(f"--root={tmp_path / 'a'}", "--backend=none")
    assert done.returncode == ExitCode.USAGE
    assert "no transfer backend 'none'" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("sizes", [[], [0], [20 * 2**20, 4096]])
def test_plain_loops_move_every_byte_once_when_files_differ_in_length(sizes: list[int]) -> None:
    files = [(Path(str(number)), size) for number, size in enumerate(sizes)]
    parts: list[Part] = _parts(files)
    for path, size in files:
        ends = sorted((part.position, part.position + part.size) for part in parts if part.path == path)
        assert [0, *(end for _, end in ends)] == [*(begin for begin, _ in ends), size] if size else not ends
