"""Metrics: from a server's counts to what Prometheus reads, over HTTP and from the command, with servers that hang or are gone."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import PoolGenerations, connect
from gms_core.client.question import ask_once
from gms_core.errors import ConfigurationError, ConnectionLost, GmsError, IdentityMismatch, InvalidArgument, ServerUnavailable
from gms_core.layout import Identity
from gms_core.metrics.endpoint import Endpoint
from gms_core.metrics.exposition import as_text
from gms_core.metrics.samples import samples
from gms_core.metrics.scrape import scrape
from gms_core.metrics.table import METRICS
from gms_core.protocol.messages import Acquire, Done, Events, Status, StatusReport
from tests.conftest import RunningServer
from tests.unit.engine_processes import processes
from tests.unit.publishing import MODEL, PAGE, publish

GMS = [sys.executable, "-m", "gms_core.cli"]

Values = dict[str, dict[tuple[str, ...], float]]


def values_of(text: str) -> Values:
    """Values by name and labels, the device's left out."""
    found: Values = {}
    for family in parse(text):
        for sample in family.samples:
            assert sample.labels.pop("device") == "host"
            found.setdefault(sample.name, {})[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def scraped(server: RunningServer) -> Values:
    return values_of(as_text(lambda: scrape([server.socket])).decode())


@contextlib.contextmanager
def serving(directory: Path, *arguments: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A ``gms serve --metrics``, and the URL that it has."""
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(directory), "--metrics", f"127.0.0.1:{port}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            url = re.fullmatch(r"metrics at (http://127\.0\.0\.1:\d+/metrics)\n", process.stdout.readline())
            assert url is not None
            assert process.stdout.readline() == f"host ready at {directory}/host.sock\n"
            yield process, url[1]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def fetch(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def test_every_metric_of_the_table_has_its_kind_and_its_labels_when_it_is_exposed(server: RunningServer) -> None:
    with processes() as start, server.connect() as session:
        lease = publish(session, b"bytes")
        engine = start(server.socket, "a cohort")
        engine.ask("plan", "kv", "a")
        engine.ask("provide", "plan", [PAGE])
        assert (engine.ask("hold", 5.0), engine.ask("elect", "primary", 1.0)) == (1, 1)
        text = as_text(lambda: scrape([server.socket])).decode()
        lease.release()
    families = {}
    for family in parse(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        families[name] = family
    assert families.keys() == METRICS.keys()
    for name, metric in METRICS.items():
        assert re.fullmatch(r"gms_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        family = families[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, f"{name} has no value"
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == {"device", *metric.labels}, name


def test_values_are_those_of_the_server_when_it_is_scraped(server: RunningServer) -> None:
    with processes() as start, server.connect() as session, server.connect() as reader:
        leases = [publish(session, b"bytes"), reader.acquire("weights", "ro", MODEL, timeout_s=5)]
        PoolGenerations(session, "weights").pin(1)
        with server.connect() as stranger, pytest.raises(IdentityMismatch):
            stranger.acquire("weights", "ro", Identity({"content": "other"}), timeout_s=0)
        engine = start(server.socket, "a cohort")
        engine.ask("plan", "kv", "a")
        engine.ask("provide", "plan", [4 * PAGE])
        assert (engine.ask("hold", 5.0), engine.ask("elect", "primary", 1.0)) == (1, 1)
        engine.ask("report", "primary")
        found = scraped(server)
        for lease in leases:
            lease.release()
        engine.kill()
        while (after := scraped(server))["gms_lock_held"][("primary",)]:
            pass
        while (after := scraped(server))["gms_fence_seconds_count"][()] == 0:
            pass
    assert found["gms_up"] == {(): 1}
    assert found["gms_pool_generation"] == {("weights",): 1}
    assert found["gms_pool_bytes"] == {("committed", "weights"): PAGE, ("draft", "weights"): 0, ("retired", "weights"): 0}
    assert found["gms_pool_readers"] == {("weights",): 2}
    assert found["gms_pool_pinned"] == {("weights",): 1}
    assert found["gms_memory_allocated_bytes"] == {(): 5 * PAGE}
    assert found["gms_allocations"] == {(): 2}
    assert found["gms_memory_free_bytes"][()] <= found["gms_memory_total_bytes"][()]
    assert found["gms_retained_epoch"] == {("kv",): 1}
    assert found["gms_retained_held"] == {("kv",): 1}
    assert found["gms_lock_term"] == {("primary",): 1}
    assert found["gms_engines"] == {("init",): 0, ("standby",): 0, ("promoting",): 0, ("primary",): 1, ("fenced",): 0}
    assert found["gms_leases_granted_total"] == {("write",): 1, ("read",): 1, ("hold",): 1}
    assert found["gms_commits_total"] == {(): 1}
    assert found["gms_requests_total"]["ok", "commit"] == 1
    assert found["gms_requests_total"]["identity_mismatch", "acquire"] == 1
    assert found["gms_sessions"][()] >= 4
    assert found["gms_fences_total"] == {(): 0}
    assert after["gms_fences_total"] == {(): 1}
    assert after["gms_fence_seconds_bucket"][("+Inf",)] == 1
    assert after["gms_fence_seconds_sum"][()] > 0
    assert sum(after["gms_engines"].values()) == 0


def test_restarts_are_counted_on_when_servers_are_killed_one_after_the_other(server: RunningServer) -> None:
    for number in (1, 2):
        server.kill()
        assert scraped(server)["gms_server_restarts_total"] == {("adopted",): number, ("lost",): 0}


def test_gauges_are_there_when_the_server_is_of_a_version_that_counts_nothing(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"bytes").release()
        report = session.status()
        old = msgspec.structs.replace(report, observation=None)
    found = {sample.name for sample in samples("host", old)}
    assert {"gms_up", "gms_sessions", "gms_pool_bytes"} <= found
    assert "gms_commits_total" not in found


def test_scrape_over_http_is_what_prometheus_reads_in_both_formats(runtime_dir: Path) -> None:
    with serving(runtime_dir) as (_, url), connect(socket_path=runtime_dir / "host.sock") as session:
        publish(session, b"bytes").release()
        assert values_of(fetch(url))["gms_commits_total"] == {(): 1}
        text = fetch(url, Accept="application/openmetrics-text; version=1.0.0")
        assert text.endswith("# EOF\n")
        names = {family.name for family in parse_openmetrics(text)}
        assert {"gms_up", "gms_commits", "gms_fence_seconds"} <= names


def test_scrape_says_down_in_a_short_time_and_up_again_later_when_a_device_server_hangs(runtime_dir: Path) -> None:
    with serving(runtime_dir) as (_, url):
        assert values_of(fetch(url))["gms_up"] == {(): 1}
        os.kill(child := int((runtime_dir / "host.lock").read_text()), signal.SIGSTOP)
        try:
            assert values_of(fetch(url)) == {"gms_up": {(): 0}}
        finally:
            os.kill(child, signal.SIGCONT)
        assert values_of(fetch(url))["gms_up"] == {(): 1}
        os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while values_of(fetch(url)).get("gms_server_restarts_total", {}).get(("adopted",)) != 1:
            assert time.monotonic() < deadline


def test_address_goes_over_to_the_next_serve_when_it_replaces_the_first(runtime_dir: Path) -> None:
    with serving(runtime_dir) as (first, url):
        port = int(url.split(":")[2].partition("/")[0])
        with serving(runtime_dir, "--replace", port=port) as (_, again):
            assert first.wait(20) == 0
            assert again == url
            assert values_of(fetch(url))["gms_server_restarts_total"] == {("adopted",): 1, ("lost",): 0}


def test_devices_are_served_without_metrics_when_the_address_is_another_programs_after_a_replacement(runtime_dir: Path) -> None:
    with serving(runtime_dir) as (first, _), socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--replace", "--metrics", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
            try:
                assert second.stdout is not None
                assert second.stdout.readline() == f"host ready at {runtime_dir}/host.sock\n"
            finally:
                second.send_signal(signal.SIGTERM)
            assert "Address already in use" in second.communicate(timeout=20)[1]
        assert (first.wait(20), second.returncode) == (0, 0)


def test_clients_that_say_nothing_or_nonsense_or_leave_cost_no_other_its_answer(runtime_dir: Path) -> None:
    with serving(runtime_dir) as (_, url):
        host, port = url.split("/")[2].split(":")
        for said in (b"", b"nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\n"):
            with socket.create_connection((host, int(port))) as rude:
                rude.sendall(said)
        with socket.create_connection((host, int(port))) as slow:
            assert values_of(fetch(url))["gms_up"] == {(): 1}
            assert slow.recv(1) == b"", "it was given up"
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("POST", "/metrics", body=b"x")
        assert connection.getresponse().status in {200, 405}
        connection.close()


def test_serve_refuses_with_a_sentence_and_starts_nothing_when_the_address_is_taken_or_unknown(runtime_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve = ["serve", "--device", "host", "--runtime-dir", str(runtime_dir / "x"), "--metrics"]
        result = CliRunner().invoke(gms, [*serve, f"127.0.0.1:{port}"])
        assert result.exit_code == ExitCode.USAGE
        assert f"metrics cannot be served at 127.0.0.1 port {port}: Address already in use" in result.stderr
    for wrong in ("9464", ":9464", "127.0.0.1", "127.0.0.1:70000", "[]:1"):
        result = CliRunner().invoke(gms, [*serve, wrong])
        assert (result.exit_code, "is not HOST:PORT" in result.stderr) == (ExitCode.USAGE, True), wrong
    assert not (runtime_dir / "x").exists()
    with pytest.raises(InvalidArgument):
        Endpoint("no.such.host.invalid", 1, None)
    with pytest.raises(ConfigurationError), Endpoint("192.0.2.1", 1, None).listening():
        pass


def test_endpoint_has_an_ipv6_address_when_it_is_named(runtime_dir: Path) -> None:
    def application(_: object, start: object) -> list[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])  # type: ignore[operator]
        return [b"hello"]

    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").read_text():
        with pytest.raises(GmsError), Endpoint("::1", 0, application).listening():
            pass
        return
    with Endpoint("::1", 0, application).listening() as url:
        assert url.startswith("http://[::1]:")
        assert fetch(url) == "hello"


@pytest.mark.parametrize("arguments", [["metrics"], ["serve", "--device", "host", "--metrics", "127.0.0.1:0"]])
def test_what_to_install_is_said_when_the_library_is_missing(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "gms_core.metrics.exposition", raising=False)
    monkeypatch.delattr("gms_core.metrics.exposition", raising=False)
    result = CliRunner().invoke(gms, [*arguments, "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.USAGE
    assert "needs prometheus_client" in result.stderr
    assert "hint: Install it: pip install 'gms[metrics]'" in result.stderr


def test_metrics_are_printed_once_for_a_file_when_the_command_is_run(server: RunningServer) -> None:
    result = CliRunner().invoke(gms, ["metrics", "--runtime-dir", str(server.directory)])
    assert result.exit_code == 0
    assert values_of(result.stdout)["gms_up"] == {(): 1}
    os.kill(child := server.supervisor_child, signal.SIGSTOP)
    try:
        result = CliRunner().invoke(gms, ["metrics", "--runtime-dir", str(server.directory)])
    finally:
        os.kill(child, signal.SIGCONT)
    assert (result.exit_code, values_of(result.stdout)) == (0, {"gms_up": {(): 0}})
    empty = CliRunner().invoke(gms, ["metrics", "--runtime-dir", str(server.directory / "none")])
    assert empty.exit_code == ExitCode.NO_SERVER


def test_question_leaves_no_session_and_says_what_is_wrong_when_it_is_not_answered_as_it_should_be(server: RunningServer) -> None:
    def ask(request, kind):  # type: ignore[no-untyped-def]
        return ask_once(server.socket, request, kind, client="a question", limit_s=10.0)

    report = ask(Status(), StatusReport)
    assert [session.client for session in report.sessions] == ["a question"]
    assert ask(Status(brief=True), StatusReport).sessions == ()
    with pytest.raises(GmsError, match="where Done was due"):
        ask(Status(), Done)
    with pytest.raises(InvalidArgument):
        ask(Events(after=-1), Done)
    with pytest.raises(ConnectionLost, match="did not answer"):
        ask_once(server.socket, Acquire("nothing", "ro", MODEL, 30.0), Done, client="x", limit_s=0.3)
    with pytest.raises(ServerUnavailable):
        ask_once(server.directory / "none.sock", Status(), StatusReport, client="x", limit_s=1.0)
