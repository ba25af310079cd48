"""A shadow on a real GPU, with both model runners: CUDA graphs that were captured on scratch answer as a stock engine does after the promotion."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.story import EXAMPLES, PATIENCE_S, Story, used_gib

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("driver"),  # the model is written on the GPU, too
]


def tokens_of_cache(engine: Any) -> str:
    """What the engine says of the size of its KV cache."""
    found = re.search(r"GPU KV cache size: ([0-9,]+) tokens", engine.log.read_text(errors="replace"))
    assert found is not None, engine.tail()
    return found.group(1)


def until_whole(engine: Any) -> None:
    """Wait until an engine that began with its bridge has all blocks."""
    deadline = time.monotonic() + 60
    while not re.search(r"all \d+ blocks of the KV cache can be used", engine.log.read_text(errors="replace")):
        assert time.monotonic() < deadline, engine.tail()
        time.sleep(0.02)


@pytest.mark.parametrize(("runner", "bridge_bytes"), [("V1", 0), ("V2", 0), ("V1", 2**28), ("V2", 2**28)], ids=["V1", "V2", "V1-bridge", "V2-bridge"])
def test_graphs_that_were_captured_on_scratch_are_right_when_the_shadow_is_promoted(
    tmp_path: Path, runtime_dir: Path, runner: str, bridge_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import model
    import processes

    model.write_model(tmp_path / "model", "0.6b", "bfloat16")
    story = Story(tmp_path, runtime_dir, runner, processes, bridge_bytes)
    with story.engine("stock") as stock:
        processes.wait_until_healthy(stock, story.port, PATIENCE_S)
        right = story.answers()
    with story.server():
        status = processes.free_port(), processes.free_port()
        with story.engine("engine-0", status[0]) as primary:
            story.until_role(primary, status[0], "primary")
            assert story.answers() == right
            before = used_gib()
            with story.engine("engine-1", status[1]) as shadow:
                story.until_role(shadow, status[1], "standby")
                standing = used_gib() - before
                assert tokens_of_cache(shadow) == tokens_of_cache(primary)
                assert story.answers() == right  # the primary's: warming up beside it has changed nothing
                os.killpg(primary.process.pid, signal.SIGKILL)
                story.until_role(shadow, status[1], "primary")
                assert story.answers() == right
                if bridge_bytes:
                    until_whole(shadow)
                    assert story.answers() == right
                held = used_gib()
    sys.stdout.write(f"{runner}: a shadow costs {standing:.2f} GiB; once it is alone {held:.2f} GiB are in use\n")
    assert standing < 4.0
