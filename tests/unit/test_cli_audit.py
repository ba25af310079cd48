"""``gms audit`` as a real process beside a process that writes where it must not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gms_core.audit import Audited
from gms_core.cli import gms
from gms_core.cli.audit_words import SHOWN, Report
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import PoolGenerations
from gms_core.tensor_manifest import encode
from tests.conftest import RunningServer
from tests.unit.publishing import publish
from tests.unit.stray_writer import MODEL, storage, stray_writer, tensor
from tests.unit.test_audit import MANIFEST, SIZE

GMS = [sys.executable, "-m", "gms_core.cli"]
SOON = ("--every", "0.1")
NEVER = ("--every", "86400")


def run(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(gms, ["audit", "--runtime-dir", str(directory), *arguments])


class Auditing:
    """A ``gms audit -o json`` that goes on until it is told to end."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        command = [*GMS, "audit", "--runtime-dir", str(directory), "-o", "json", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def next(self, event: str) -> dict[str, object]:
        """The next line, which has to be of this event."""
        assert self.process.stdout is not None
        line: dict[str, object] = json.loads(self.process.stdout.readline())
        assert line["event"] == event, line
        return line

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, dict[str, object], str]:
        """Tell it to end; returns the exit code, the sum, and what it has complained of."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, dict[str, object], str]:
        summed = self.next("ended")
        assert self.process.stderr is not None
        return self.process.wait(60), summed, self.process.stderr.read()


@contextlib.contextmanager
def auditing(server: RunningServer, *arguments: str) -> Iterator[Auditing]:
    started = Auditing(server.directory, *arguments)
    with started.process:
        try:
            yield started
        finally:
            started.process.kill()


def test_tensor_is_named_with_pool_generation_and_place_when_it_is_written_to(server: RunningServer, tmp_path: Path) -> None:
    with stray_writer(server.socket, tmp_path, SIZE, MANIFEST) as writer, auditing(server, "weights", *SOON) as audit:
        began = audit.next("began")
        assert (began["schema"], began["pool"], began["device"], began["generation"]) == ("gms-audit/1", "weights", "host", 1)
        assert (began["tensors"], began["bytes"], began["chunk_bytes"], began["unreadable"]) == (4, SIZE, 4096, "")
        writer.write(401)
        told = audit.next("written")
        (tied,) = told["tensors"]  # type: ignore[misc, attr-defined]
        assert tied == {
            "name": "embed.weight",
            "also": ["head.weight"],
            "dtype": "float32",
            "shape": [10_000],
            "offset": 0,
            "bytes": 40_000,
            "shared": True,
        }
        assert told["first"] == told["last"] == {"offset": 400, "bytes": 3696}
        assert (told["pool"], told["device"], told["generation"], told["parts"], told["bytes"]) == ("weights", "host", 1, 1, 3696)
        assert began["time"] <= told["time"]  # type: ignore[operator]
        assert told["after"] <= told["time"]  # type: ignore[operator]
        writer.write(402)
        audit.next("written")
        writer.write(SIZE - 1)
        assert audit.next("written")["tensors"] == []
        code, summed, complaint = audit.end()
    assert (code, complaint) == (ExitCode.FINDINGS, "")
    tied_sum, gap_sum = summed["written"]  # type: ignore[misc, attr-defined]
    assert ([one["name"] for one in tied_sum["tensors"]], tied_sum["looks"], tied_sum["offset"], tied_sum["end"]) == (["embed.weight"], 2, 400, 4096)
    assert (gap_sum["tensors"], gap_sum["looks"], gap_sum["first_noticed"]) == ([], 1, gap_sum["last_noticed"])


def test_exit_code_is_0_when_nothing_was_written(server: RunningServer) -> None:
    with server.connect() as session:
        lease = publish(session, b"bytes", manifest=MANIFEST, identity=MODEL)
        for arguments in (("--rounds", "2"), ("--for", "0.2")):
            result = run(server.directory, "weights", *SOON, *arguments)
            assert (result.exit_code, result.stderr) == (0, "")
            began, ended = result.stdout.splitlines()
            assert "weights on host, generation 1: 4 tensors, 4 KiB read" in began
            assert "nothing was written, seen in 2 complete comparisons" in ended or "--for" in arguments
        assert session.status().pools[0].readers == (session.welcome.session,)
        lease.release()


def test_people_read_what_was_written_and_the_sum_of_it(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"layers.{number}" for number in range(SHOWN + 5)]
    many = encode(tuple(storage(number * 512, 512, tensor(name, elements=128)) for number, name in enumerate(names)))
    with (
        stray_writer(server.socket, tmp_path, SIZE, many) as writer,
        server.connect() as session,
        Audited(session, "weights", MODEL) as audited,
    ):
        report = Report(audited, as_json=False)
        report.began(audited.look())
        for number in range(SHOWN + 5):
            writer.write(number * 512)
        report.looked(audited.look())
        writer.write(0)
        writer.write(8 * 512)
        report.looked(audited.look())
        report.ended(time.time(), None)
    began, *lines = capsys.readouterr().out.splitlines()
    assert "  weights on host, generation 1: 25 tensors, 256 KiB read" in began
    assert [line.partition("generation 1: ")[2] for line in lines[:SHOWN]] == [
        f"{name} written: 512 bytes at offset {number * 512}" for number, name in enumerate(names[:SHOWN])
    ]
    assert "5 more were written; all of them are told at the end" in lines[SHOWN]
    assert "layers.8 written: 512 bytes at offset 4096" in lines[SHOWN + 2]
    assert "25 places written to, seen in 2 complete comparisons" in lines[SHOWN + 3]
    summed = lines[SHOWN + 4 :]
    assert [line.split(":")[0].strip() for line in summed] == names
    assert "noticed 2 times from" in summed[0]
    assert "noticed at " in summed[-1]
    assert "within offsets 12288 to 12800" in summed[-1]


def test_audit_goes_on_when_the_server_is_killed_and_comes_back(server: RunningServer, tmp_path: Path) -> None:
    with stray_writer(server.socket, tmp_path, SIZE, MANIFEST) as writer, auditing(server, *SOON) as audit:
        audit.next("began")
        server.kill()
        writer.write(40_448)
        (private,) = audit.next("written")["tensors"]  # type: ignore[misc, attr-defined]
        assert (private["name"], private["shared"]) == ("norm.mean", False)
        server.kill()
        writer.write(100_000)
        assert audit.next("written")["generation"] == 1
        code, summed, complaint = audit.end(signal.SIGTERM)
        assert (code, summed["error"]) == (ExitCode.FINDINGS, None)
        assert complaint == ""


def test_generation_is_kept_and_that_is_said_when_another_one_is_committed(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"first", manifest=MANIFEST, identity=MODEL).release()
        with auditing(server, *SOON) as audit:
            audit.next("began")
            publish(session, b"other", manifest=MANIFEST, identity=MODEL).release()
            assert audit.next("superseded")["committed"] == 2
            assert [one.generation for one in session.status().pools[0].generations] == [1, 2]
            PoolGenerations(session, "weights").drop(2)
            told = audit.next("superseded")
            assert told["committed"] == 0
            assert "no generation is committed any more; this one is kept as long as it is audited" in str(told["text"])
            assert audit.end()[0] == 0
        assert [pool.generations for pool in session.status().pools] in ([], [()])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_claimed_when_it_is_ended_before_anything_was_compared(server: RunningServer, number: signal.Signals) -> None:
    with server.connect() as session:
        publish(session, b"first").release()
        with auditing(server, *NEVER) as audit:
            assert "no tensor manifest" in str(audit.next("began")["unreadable"])
            code, summed, complaint = audit.end(number)
        assert (code, summed["looks"], summed["written"], complaint) == (ExitCode.INTERRUPTED, 0, [], "")
        assert "not compared" in str(summed["text"])


def test_it_ends_with_its_report_when_the_user_does_not_wait_for_a_server_that_is_away(server: RunningServer, tmp_path: Path) -> None:
    with stray_writer(server.socket, tmp_path, SIZE, MANIFEST) as writer, auditing(server, *SOON) as audit:
        audit.next("began")
        writer.write(0)
        audit.next("written")
        os.kill(server.supervisor.pid, signal.SIGSTOP)  # so that no other server follows
        try:
            os.kill(server.supervisor_child, signal.SIGKILL)
            writer.write(100_000)
            audit.next("written")
            code, summed, _ = audit.end()
            assert (code, summed["error"], len(summed["written"])) == (ExitCode.FINDINGS, None, 2)  # type: ignore[arg-type]
        finally:
            os.kill(server.supervisor.pid, signal.SIGCONT)
        server.wait_until_ready()


def test_report_comes_with_the_error_when_the_server_has_gone_for_good(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"first", identity=MODEL).release()
    with auditing(server, *SOON) as audit:
        audit.next("began")
        server.lose_everything()
        code, summed, complaint = audit.ended()
    assert code == ExitCode.NO_SERVER
    assert summed["error"]["code"] == "connection_lost"  # type: ignore[index]
    assert json.loads(complaint.splitlines()[-1])["error"]["code"] == "connection_lost"


def test_all_pools_are_audited_when_none_is_named_and_those_of_ranks_when_they_are_meant(server: RunningServer) -> None:
    with server.connect() as session:
        for pool in ("weights", "weights.1", "draft"):
            publish(session, b"bytes", pool=pool, identity=MODEL).release()

        def pools(*arguments: str) -> list[object]:
            result = run(server.directory, *arguments, *SOON, "--rounds", "1", "-o", "json")
            assert result.exit_code == 0, result.output
            return sorted(line["pool"] for line in map(json.loads, result.stdout.splitlines()) if line["event"] == "ended")

        assert pools() == ["draft", "weights", "weights.1"]
        assert pools("weights") == ["weights"]
        assert pools("weights", "--ranks") == ["weights", "weights.1"]
        assert pools("weights.1", "--device", "host") == ["weights.1"]


def test_it_is_refused_in_a_sentence_when_an_argument_is_wrong_or_nothing_is_there(server: RunningServer, tmp_path: Path) -> None:
    def refused(code: ExitCode, *arguments: str, directory: Path = server.directory) -> str:
        result = run(directory, *arguments)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        return result.stderr

    assert "no server that answers has a published pool" in refused(ExitCode.NOT_FOUND)
    assert "gms: no server that answers has a pool 'weights'\nhint: gms pool list" in refused(ExitCode.NOT_FOUND, "weights")
    with server.connect() as session:
        lease = session.acquire("weights", "rw", MODEL, timeout_s=1)
        assert "no generation of pool 'weights' is committed" in refused(ExitCode.NOT_FOUND, "weights")
        assert "no generation of any pool is committed" in refused(ExitCode.NOT_FOUND)
        lease.release()
    for wrong in ("nan", "inf", "0", "-1", "soon", "1e9"):
        assert "Invalid value for '--every'" in refused(ExitCode.USAGE, "--every", wrong)
    for wrong in ("nan", "inf", "0", "-1"):
        assert "Invalid value for '--for'" in refused(ExitCode.USAGE, "--for", wrong)
    assert "Invalid value for '--rounds'" in refused(ExitCode.USAGE, "--rounds", "0")
    assert "do not go together" in refused(ExitCode.USAGE, "--rounds", "1", "--for", "1")
    assert "'GPU 0' is no device" in refused(ExitCode.USAGE, "--device", "GPU 0")
    assert refused(ExitCode.NO_SERVER, "--device", "GPU-00000000-0000-0000-0000-000000000000").startswith("gms: no server listens at ")
    assert refused(ExitCode.NO_SERVER, directory=tmp_path / "nowhere").startswith("gms: no server has a socket in")
