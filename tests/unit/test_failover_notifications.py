"""Who learns of a change of role, when, and what a failure of theirs does not do."""

from __future__ import annotations

import http.server
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gms_core.failover.notifications import Command, Notifier, Webhook, facts
from gms_core.failover.status import EngineState, Promoted, RoleChange

InstallPlugin = Callable[[str, str], Path]
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "")


class Listener:
    """A web server that answers with what the test wants, and keeps what was posted."""

    def __init__(self) -> None:
        self.posted: list[dict[str, object]] = []
        self.answers: list[int] = []
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["Content-Type"] == "application/json"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = listener.answers.pop(0) if listener.answers else 204
                if 200 <= answer < 300:
                    listener.posted.append(body)
                if answer:
                    self.send_response(answer)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/roles"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def new_state() -> EngineState:
    return EngineState("engine-1", "c0ffee", "gms:primary", address="127.0.0.1:8000")


def promote(state: EngineState) -> None:
    state.ready()
    state.elected(7)
    state.promoted(Promoted({"0": 3, "1": 5}))


def a_change(role: str = "primary") -> RoleChange:
    return RoleChange(role, "promoting", "engine-1", "c0ffee", "gms:primary", 7, {"0": 3, "1": 5}, "127.0.0.1:8000", "why", 1.5)  # type: ignore[arg-type]


def script(path: Path, body: str) -> tuple[str, ...]:
    path.write_text(body)
    return sys.executable, str(path)


def test_primary_is_told_only_once_the_gate_is_open_when_all_else_is_told_at_once(listener: Listener) -> None:
    state = new_state()
    notifier = Notifier(state, webhook=listener.url)
    promote(state)
    notifier.gate_opened()
    notifier.gate_opened()
    state.end("stopped")
    notifier.close(PATIENCE_S)
    assert [post["role"] for post in listener.posted] == ["standby", "promoting", "primary", "fenced"]
    assert listener.posted[2].items() >= {"engine": "engine-1", "cohort": "c0ffee", "term": 7, "epochs": {"0": 3, "1": 5}}.items()
    assert listener.posted[2]["address"] == "127.0.0.1:8000"


def test_primary_is_never_told_when_the_gate_did_not_open(listener: Listener) -> None:
    state = new_state()
    notifier = Notifier(state, webhook=listener.url)
    promote(state)
    state.end("stopped")
    notifier.gate_opened()
    notifier.close(PATIENCE_S)
    assert [post["role"] for post in listener.posted] == ["standby", "promoting", "fenced"]


def test_command_is_run_with_the_facts_when_the_engine_serves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = script(tmp_path / "told.py", f"import os, sys\nopen({str(out)!r}, 'a').write(repr((os.environ['GMS_ROLE'], sys.argv[1:])))")
    state = new_state()
    notifier = Notifier(state, on_promoted=(*command, "a b", "$HOME"))
    promote(state)
    notifier.gate_opened()
    state.end("stopped")
    notifier.close(PATIENCE_S)
    assert out.read_text() == repr(("primary", ["a b", "$HOME"]))


def test_facts_are_text_when_they_go_into_an_environment() -> None:
    assert facts(a_change()) == {
        "GMS_ROLE": "primary",
        "GMS_ENGINE": "engine-1",
        "GMS_COHORT": "c0ffee",
        "GMS_TERM": "7",
        "GMS_EPOCH": "5",
        "GMS_ADDRESS": "127.0.0.1:8000",
    }


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("import sys; print('no such', 'host'); sys.exit(3)", "ended with 3: no such host"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
    ],
)
def test_failure_is_logged_with_its_output_when_the_command_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture, body: str, sentence: str) -> None:
    command = Command(script(tmp_path / "fails.py", body))
    command.gms_role_changed(a_change())
    command.deliveries.close(PATIENCE_S)
    assert sentence in caplog.text


def test_failure_is_logged_when_there_is_no_such_command(caplog: pytest.LogCaptureFixture) -> None:
    command = Command(("/nowhere/command",))
    command.gms_role_changed(a_change())
    command.deliveries.close(PATIENCE_S)
    assert "the command /nowhere/command cannot be run: No such file or directory" in caplog.text


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_command_and_what_it_started_are_killed_when_they_take_too_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pids = tmp_path / "pids"
    body = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({str(pids)!r} + ".part", "w") as file:
    file.write(str(child.pid))
os.rename({str(pids)!r} + ".part", {str(pids)!r})
time.sleep(600)
"""
    command = Command(script(tmp_path / "slow.py", body), timeout_s=3.0)
    command.gms_role_changed(a_change())
    command.deliveries.close(PATIENCE_S)
    assert "did not end within 3 s and was killed" in caplog.text
    pid, deadline = pids.read_text(), time.monotonic() + PATIENCE_S
    while is_alive(pid):  # killed, and not yet gone
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_command_is_not_run_when_the_engine_is_not_the_primary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = Command(script(tmp_path / "told.py", f"open({str(out)!r}, 'w')"))
    command.gms_role_changed(a_change("fenced"))
    command.deliveries.close(PATIENCE_S)
    assert not out.exists()


def test_post_is_tried_again_when_it_fails(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    listener.answers = [503, 0]  # refused, then a connection that ends without an answer
    webhook = Webhook(listener.url, pauses_s=(0.01, 0.01))
    webhook.gms_role_changed(a_change())
    webhook.deliveries.close(PATIENCE_S)
    assert [post["role"] for post in listener.posted] == ["primary"]
    assert caplog.text.count("was not told that engine-1 is primary") == 2
    assert "not tried again" not in caplog.text


def test_post_is_given_up_when_every_attempt_fails_and_the_next_one_is_made(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    listener.answers = [500, 500]
    webhook = Webhook(listener.url, pauses_s=(0.01,))
    webhook.gms_role_changed(a_change("primary"))
    webhook.gms_role_changed(a_change("fenced"))
    webhook.deliveries.close(PATIENCE_S)
    assert "was not told that engine-1 is primary; it is not tried again" in caplog.text
    assert [post["role"] for post in listener.posted] == ["fenced"]


def test_failure_is_logged_when_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    webhook = Webhook("http://127.0.0.1:9/", timeout_s=PATIENCE_S, pauses_s=())
    webhook.gms_role_changed(a_change())
    webhook.deliveries.close(PATIENCE_S)
    assert "Connection refused" in caplog.text


@pytest.mark.parametrize("path", ["/services/s3cret?key=s3cret", "/s3cret with a space", "?s3cret"])
def test_log_has_no_secrets_when_a_post_fails(caplog: pytest.LogCaptureFixture, path: str) -> None:
    webhook = Webhook(f"http://user:s3cret@127.0.0.1:9{path}", timeout_s=PATIENCE_S, pauses_s=())
    webhook.gms_role_changed(a_change())
    webhook.deliveries.close(PATIENCE_S)
    assert "http://127.0.0.1:9 was not told that engine-1 is primary" in caplog.text
    assert "s3cret" not in caplog.text


PLUGIN = """
import pathlib
from gms_core.plugins.hookspecs import hookimpl

@hookimpl
def gms_role_changed(change):
    with open({path!r}, "a") as file:
        file.write(change.role + " ")
    {end}
"""


def test_plugin_and_webhook_are_told_when_another_plugin_fails(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    install_plugin("good", PLUGIN.format(path=str(out), end=""))
    install_plugin("wreck", PLUGIN.format(path=str(out), end="raise ZeroDivisionError('no rack')"))
    monkeypatch.setenv("GMS_PLUGINS", "good,wreck,missing")
    state = new_state()
    notifier = Notifier(state, webhook=listener.url)
    state.ready()
    state.end("stopped")
    notifier.close(PATIENCE_S)
    assert out.read_text() in {"standby standby fenced fenced "}
    assert [post["role"] for post in listener.posted] == ["standby", "fenced"]
    assert caplog.text.count("its hook gms_role_changed failed: ZeroDivisionError: no rack") == 2
    assert caplog.text.count("'missing' is named by GMS_PLUGINS and not installed") == 1


def test_nothing_is_delivered_when_it_was_closed(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    state = new_state()
    notifier = Notifier(state, webhook=listener.url)
    notifier.close(PATIENCE_S)
    with caplog.at_level(logging.ERROR):
        state.ready()
    notifier.close(PATIENCE_S)
    assert listener.posted == []
    assert caplog.text == ""
