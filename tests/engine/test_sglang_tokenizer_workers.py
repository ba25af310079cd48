"""Real SGLang engines with several tokenizer workers: held together, promoted once, and ended as soon as one process of them is gone."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from failover_story import Client, Running
from sglang_story import SglangStory

from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

SEVERAL = ("--tokenizer-worker-num", "2")
WHOLE = ["api-server 0", "api-server 1", "detokenizer", "main", "rank 0"]
ENOUGH = 12
"""Connections, so many that each worker gets one."""


@pytest.fixture
def story(server: Any, failover_model: Path, tmp_path: Path) -> SglangStory:
    """Engines of that model on one server."""
    return SglangStory(server, failover_model, tmp_path)


def test_shadow_takes_over_as_a_whole_when_one_tokenizer_worker_is_killed(story: SglangStory) -> None:
    client = Client(story.model, free_port())
    with contextlib.ExitStack() as engines:

        def start(name: str) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(client.port), *SEVERAL))

        first = start("first")
        story.until_role(first, "primary")
        right = client.tokens()
        second = start("second")
        story.until_role(second, "standby")
        assert story.processes(second) == WHOLE
        assert client.request("GET", "/gms/status")[1]["engine"] == first.name
        client.first_token_after(story.kill(first, "api-server 1"))
        first.until_gone()
        assert first.process.returncode != 0
        assert [client.tokens() for _ in range(ENOUGH)] == [right] * ENOUGH
        told = client.request("GET", "/gms/status")[1]
        assert (told["engine"], told["role"]) == (second.name, "primary")
        os.kill(second.process.pid, signal.SIGTERM)
        second.until_gone()
        assert second.process.returncode == 0
        assert story.status().cohorts == ()
