"""``gms pool list|pin|unpin|rollback|drop``, against real servers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from click.testing import CliRunner, Result

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import Session
from gms_core.protocol.messages import StatusReport
from tests.conftest import RunningServer
from tests.unit.publishing import MODEL, PAGE, publish, read_all


def _gms(server: RunningServer, *arguments: str) -> Result:
    return CliRunner().invoke(gms, [*arguments, "--runtime-dir", str(server.directory)])


def _done(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def _refused(result: Result, code: ExitCode) -> str:
    assert result.exit_code == code, result.output
    return result.stderr


def _listed(server: RunningServer) -> list[tuple[object, ...]]:
    document = json.loads(_done(_gms(server, "pool", "list", "-o", "json")))
    assert document["schema"] == "gms-pool/1"
    return [
        (pool["name"], one["generation"], one["committed"], one["pinned"], len(one["readers"]))
        for pool in document["pools"]
        for one in pool["generations"]
    ]


def test_older_generation_serves_again_when_it_was_pinned_and_is_rolled_back_to(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"first").release()
        assert _done(_gms(server, "pool", "pin", "weights")) == "weights on host: generation 1 is pinned\n"
        publish(session, b"other").release()
        assert _listed(server) == [("weights", 1, False, True, 0), ("weights", 2, True, False, 0)]
        told = _done(_gms(server, "pool", "rollback", "weights", "1", "--expect", "2"))
        assert told == "weights on host: generation 1 is the committed one again, as generation 3\n"
        assert _listed(server) == [("weights", 1, False, True, 0), ("weights", 3, True, False, 0)]
        with session.acquire("weights", "ro", MODEL, timeout_s=1) as lease:
            assert read_all(session, lease, 5) == b"first"
        assert _done(_gms(server, "pool", "unpin", "weights", "1")) == "weights on host: generation 1 is not pinned any more, and is freed\n"
        assert _listed(server) == [("weights", 3, True, False, 0)]
        assert session.status().allocated_bytes == PAGE


def test_rollback_is_refused_when_another_generation_is_committed_than_expected(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"first").release()
        _done(_gms(server, "pool", "pin", "weights", "1"))
        publish(session, b"other").release()
        assert "but 2 is committed" in _refused(_gms(server, "pool", "rollback", "weights", "1", "--expect", "1"), ExitCode.IDENTITY)
        assert "It has: 1, 2." in _refused(_gms(server, "pool", "rollback", "weights", "7", "--expect", "2"), ExitCode.NOT_FOUND)
        assert "already" in _refused(_gms(server, "pool", "rollback", "weights", "2", "--expect", "2"), ExitCode.USAGE)
        assert "--expect" in _refused(_gms(server, "pool", "rollback", "weights", "1"), ExitCode.USAGE)
        assert _listed(server) == [("weights", 1, False, True, 0), ("weights", 2, True, False, 0)]


def test_nothing_is_rolled_back_when_one_of_the_ranks_lacks_the_generation(server: RunningServer) -> None:
    """On the device host each rank has a pool of its own; with --ranks they go together."""
    with server.connect() as session:
        for pool in ("weights", "weights.1"):
            publish(session, b"first", pool=pool).release()
        _done(_gms(server, "pool", "pin", "weights.1", "1"))
        for pool in ("weights", "weights.1"):
            publish(session, b"other", pool=pool).release()
        assert "'weights' has no generation 1" in _refused(
            _gms(server, "pool", "rollback", "weights", "1", "--expect", "2", "--ranks"), ExitCode.NOT_FOUND
        )
        assert [one for one in _listed(server) if one[2]] == [("weights", 2, True, False, 0), ("weights.1", 2, True, False, 0)]
        assert len(_done(_gms(server, "pool", "pin", "weights", "--ranks")).splitlines()) == 2


def test_only_the_pool_of_that_name_is_changed_when_ranks_are_not_asked_for(server: RunningServer) -> None:
    with server.connect() as session:
        for pool in ("llama-3", "llama-3.1", "llama-3.1-long"):
            publish(session, b"first", pool=pool).release()
        assert _done(_gms(server, "pool", "pin", "llama-3.1", "1")) == "llama-3.1 on host: generation 1 is pinned\n"
        assert _done(_gms(server, "pool", "drop", "llama-3", "1")) == "llama-3 on host: generation 1 is freed\n"
        assert _listed(server) == [("llama-3.1", 1, True, True, 0), ("llama-3.1-long", 1, True, False, 0)]
        _refused(_gms(server, "pool", "drop", "llama-3", "1"), ExitCode.NOT_FOUND)
        assert _done(_gms(server, "pool", "unpin", "llama-3.1", "1", "--ranks")) == "llama-3.1 on host: generation 1 is not pinned any more\n"


def test_generation_is_dropped_when_nobody_reads_it_and_else_its_readers_are_named(server: RunningServer) -> None:
    with server.connect("engine-0 rank 0") as session:
        lease = publish(session, b"first")
        _done(_gms(server, "pool", "pin", "weights"))
        assert "read by engine-0 rank 0 (pid" in _refused(_gms(server, "pool", "drop", "weights", "1"), ExitCode.FAILURE)
        lease.release()
        assert "hint: gms pool unpin weights 1" in _refused(_gms(server, "pool", "drop", "weights", "1"), ExitCode.FAILURE)
        _done(_gms(server, "pool", "unpin", "weights", "1"))
        told = json.loads(_done(_gms(server, "pool", "drop", "weights", "1", "-o", "json")))
        assert told == {
            "schema": "gms-pool/1",
            "action": "drop",
            "device": "host",
            "pool": "weights",
            "generation": 1,
            "outcome": "generation 1 is freed",
        }
        assert _listed(server) == []
        assert _done(_gms(server, "pool", "list")) == "no generation\n"
        assert "no generation of pool 'weights' is committed" in _refused(_gms(server, "pool", "pin", "weights"), ExitCode.NOT_FOUND)


def test_error_says_what_is_missing_when_there_is_no_such_pool_or_server(server: RunningServer) -> None:
    assert "has a pool 'weights'" in _refused(_gms(server, "pool", "pin", "weights"), ExitCode.NOT_FOUND)
    assert _gms(server, "pool", "list", "--device", "GPU-0", "-o", "json").exit_code in (ExitCode.NO_SERVER, ExitCode.USAGE)
    server.stop()
    error = json.loads(_refused(_gms(server, "pool", "list", "-o", "json"), ExitCode.NO_SERVER))
    assert error["error"]["code"] == "server_unavailable"


def test_status_shows_pins_when_there_are_any(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"first").release()
        _done(_gms(server, "pool", "pin", "weights"))
        server.kill()
        assert "1 (pinned: 1)" in _done(_gms(server, "status"))
        assert "yes" in _done(_gms(server, "pool", "list"))


@pytest.fixture
def silent(server: RunningServer) -> Iterator[str]:
    """The socket of another device, at which nobody answers; gives the device."""
    device = "GPU-00000000-0000-0000-0000-000000000000"
    path = server.directory / f"{device}.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(path))
        os.chmod(path, 0o600)
        yield device
    path.unlink()


@pytest.mark.parametrize(
    "words", [["pin", "weights"], ["unpin", "weights", "1"], ["rollback", "weights", "1", "--expect", "2"], ["drop", "weights", "2"]]
)
def test_nothing_is_changed_when_one_of_the_servers_does_not_answer(server: RunningServer, silent: str, words: list[str]) -> None:
    with server.connect() as session:
        publish(session, b"first").release()
        _done(_gms(server, "pool", "pin", "weights", "--device", "host"))
        publish(session, b"other").release()
        before = session.status().pools
        told = _refused(_gms(server, "pool", *words), ExitCode.NO_SERVER)
        assert silent in told
        assert "--device" in told
        assert session.status().pools == before
        _done(_gms(server, "pool", *words, "--device", "host"))
        assert session.status().pools != before


def test_list_says_whose_generations_it_does_not_show_when_a_server_does_not_answer(server: RunningServer, silent: str) -> None:
    with server.connect() as session:
        publish(session, b"first").release()
        result = _gms(server, "pool", "list")
        assert "committed" in _done(result)
        assert silent in result.stderr
        result = _gms(server, "pool", "list", "-o", "json")
        assert [pool["name"] for pool in json.loads(_done(result))["pools"]] == ["weights"]
        assert silent in result.stderr


@pytest.mark.parametrize(
    "words", [["list"], ["pin", "weights"], ["unpin", "weights", "1"], ["rollback", "weights", "2", "--expect", "1"], ["drop", "weights", "1"]]
)
def test_older_server_is_called_too_old_when_it_tells_of_no_generations(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def older(session: Session) -> StatusReport:
        report = status(session)
        return msgspec.structs.replace(report, pools=tuple(msgspec.structs.replace(pool, generations=()) for pool in report.pools))

    status = Session.status
    with server.connect() as session:
        publish(session, b"first").release()
        monkeypatch.setattr(Session, "status", older)
        told = _refused(_gms(server, "pool", *words), ExitCode.UNSUPPORTED)
        assert "too old" in told
        assert "gms serve --replace" in told
