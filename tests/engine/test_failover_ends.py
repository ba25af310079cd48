"""Engines that end in other ways than by being killed while they serve: in order, hung, without their server, and in the middle of a promotion."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from failover_story import Client, Running, Story, free_port, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

WHOLE = ["api-server 0", "engine-core", "rank 0"]
SQUATTER = """
import json, sys
from pathlib import Path
from gms_core.client import Membership, RetainedPool, connect
from gms_core.layout import Identity

session = connect(socket_path=Path(sys.argv[1]), client="squatter")
membership = Membership.join(session, "squatter", "squatter", "rank 0")
pool = RetainedPool(session, "kv_cache")
pool.plan(Identity(json.loads(sys.argv[2])), 30.0)
news = []
pool.hold(600.0, lambda reason: news.append(reason) or len(news) > 1 or print("asks", flush=True))  # once it is in the queue, before others
print("holds", flush=True)
sys.stdin.readline()
membership.depart(5.0)
"""


@pytest.fixture
def story(server: Any, failover_model: Path, tmp_path: Path) -> Story:
    return Story(server, failover_model, tmp_path)


def test_engine_serves_on_when_others_end_in_whatever_way(story: Story) -> None:
    port = free_port()
    client = Client(story.model, port)
    with contextlib.ExitStack() as engines:

        def start(name: str, **failover: Any) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port), failover=failover))

        hanging = start("hangs", deadline_s=3.0)
        story.until_role(hanging, "primary")
        right = client.tokens()

        parked, next_one = start("parked"), start("next")
        story.until_role(parked, "standby")
        story.until_role(next_one, "standby")
        os.kill(parked.process.pid, signal.SIGTERM)
        parked.until_gone()
        assert parked.process.returncode == 0
        assert story.primaries() == [hanging.name]
        assert client.tokens() == right

        os.kill(story.pid_of(hanging, "rank 0"), signal.SIGSTOP)
        story.until_role(next_one, "primary")
        hanging.until_gone()
        assert client.tokens() == right

        lonely = start("lonely")
        story.until_role(lonely, "standby")
        os.kill(story.server.pid, signal.SIGKILL)
        lonely.until_gone()
        assert lonely.process.returncode > 0
        assert client.tokens() == right
        story.server.wait_until_ready()
        until(lambda: story.processes(next_one) == WHOLE, "the primary's processes have not joined the new server")
        story.until_role(next_one, "primary")


@contextlib.contextmanager
def squatter(story: Story) -> Iterator[subprocess.Popen[str]]:
    """Somebody who asks for the KV memory before any shadow does."""
    (pool,) = story.status().retained
    command = [sys.executable, "-c", SQUATTER, str(story.server.socket), json.dumps(pool.identity)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asks\n"
        yield process
    finally:
        process.communicate("\n")


def test_next_shadow_takes_its_turn_when_a_promotion_fails(story: Story) -> None:
    port = free_port()
    client = Client(story.model, port)
    with contextlib.ExitStack() as engines:

        def start(name: str, **failover: Any) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port), failover=failover))

        serving = start("serves")
        story.until_role(serving, "primary")
        right = client.tokens()
        failing, last = start("fails", promotion_timeout_s=2.0), start("last", promotion_timeout_s=120.0)
        story.until_role(failing, "standby")
        story.until_role(last, "standby")
        story.order(failing, "promote")
        with squatter(story) as holder:
            story.kill(serving, "group")
            assert holder.stdout is not None
            assert holder.stdout.readline() == "holds\n"
            failing.until_gone()
            assert failing.process.returncode > 0
            assert "2 s" in failing.tail()
            story.until_role(last, "promoting")
            assert not client.listens()
        story.until_role(last, "primary")
        assert client.tokens() == right
        serving.until_gone()


def test_nothing_is_left_when_an_engine_is_killed_as_soon_as_it_has_started_its_engine_core(story: Story) -> None:
    with story.engine("early") as engine:
        until(lambda: any("spawn_main" in Path(f"/proc/{pid}/cmdline").read_text() for pid in engine.pids()), "it has not started its engine core")
        engine.process.kill()  # it alone: the engine core has not shaken hands with it, and knows of no plugin yet
        engine.until_gone()


def test_demoted_engine_ends_although_its_engine_core_hangs(story: Story) -> None:
    port = free_port()
    with story.engine("hangs", "--port", str(port), failover={"drain_timeout_s": 1.0}) as engine:
        story.until_role(engine, "primary")
        os.kill(story.pid_of(engine, "engine-core"), signal.SIGSTOP)
        story.order(engine, "demote")
        engine.until_gone()
        assert not Client(story.model, port).listens()
