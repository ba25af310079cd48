"""Engines that end in other ways than by being killed while they serve: in order, hung, without their server, and in the middle of a promotion."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from chaos.squatter import squatting
from failover_story import Client, Running, Story, until

from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

WHOLE = ["api-server 0", "engine-core", "rank 0"]


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
        story.server.kill()
        assert story.processes(next_one) == story.processes(lonely) == WHOLE
        assert client.tokens() == right
        story.until_role(next_one, "primary")
        story.until_role(lonely, "standby")

        starting = start("starts")
        until(lambda: "of scratch memory" in starting.log.read_text(errors="replace"), "its rank has no KV cache")
        os.kill(starting.process.pid, signal.SIGSTOP)  # its API server meets the next server alone

        story.server.lose_everything()
        lonely.until_gone()
        assert lonely.process.returncode > 0
        os.kill(starting.process.pid, signal.SIGCONT)
        starting.until_gone()
        assert starting.process.returncode > 0
        assert "a server that was lost while the engine started" in starting.log.read_text(errors="replace")
        assert "is standby" not in starting.log.read_text(errors="replace")
        assert client.tokens() == right
        until(lambda: story.processes(next_one) == WHOLE, "the primary's processes have not joined the new server")
        story.until_role(next_one, "primary")


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
        until(lambda: story.is_next(failing), "the engine that is to fail is not the next one")
        story.order(failing, "")  # it would go before the squatter as well
        (pool,) = story.status().retained
        with squatting(story.server.socket, "squatter", pool) as squatter:
            story.kill(serving, "group")
            squatter.until_it("holds")
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
