"""Engines of several ranks, each a process of its own, which share weights, die and come back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trtllm_engines import TOKENS, everywhere, write_checkpoint

from tests.conftest import RunningServer
from tests.trtllm_double import NATIVE, STAGED_HOOKS
from tests.unit.publishing import until

pytestmark = pytest.mark.timeout(300)
POOLS = ["weights", "weights.1"]


@pytest.fixture
def engines(variant: str, server: RunningServer, tmp_path: Path, monkeypatch: Any) -> Iterator[Any]:
    """Makes engines; they end with the test."""
    from tensorrt_llm.llmapi import LLM

    import gms_trtllm

    monkeypatch.setenv("GMS_RUNTIME_DIR", str(server.directory))
    monkeypatch.setenv("GMS_CACHE_DIR", str(tmp_path / "cache"))
    gms_trtllm.install()
    made: list[Any] = []

    def engine(checkpoint: Path, *, load_format: str = "GMS", **options: Any) -> Any:
        made.append(LLM(checkpoint, load_format=load_format, tensor_parallel_size=2, **options))
        return made[-1]

    yield engine
    for one in made:
        one.kill()


def committed(server: RunningServer) -> list[str]:
    with server.connect() as session:
        return sorted(pool.name for pool in session.status().pools if any(generation.committed for generation in pool.generations))


def writers(server: RunningServer) -> int:
    with server.connect() as session:
        return sum(bool(pool.writer) for pool in session.status().pools)


@everywhere
def test_engine_that_comes_back_reads_nothing_when_the_last_one_was_killed(engines: Any, server: RunningServer, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", draft=True)
    plain = engines(checkpoint, load_format="AUTO").wait_until_ready()
    expected = torch.tensor(plain.generate(TOKENS))
    first = engines(checkpoint).wait_until_ready()
    assert first.ask("was_read") == [1, 1]
    torch.testing.assert_close(torch.tensor(first.generate(TOKENS)), expected)
    assert committed(server) == POOLS
    first.kill()
    (checkpoint / "model.safetensors").unlink()
    second = engines(checkpoint).wait_until_ready()
    assert second.ask("was_read") == [0, 0]
    torch.testing.assert_close(torch.tensor(second.generate(TOKENS)), expected)


def module_for_ranks(name: str, source: str, folder: Path, monkeypatch: Any) -> Any:
    """A module that this process and the ranks can import."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


SLOW = """
import os, time
from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader
class Slow(HfCheckpointLoader):
    def load_weights(self, folder, **options):
        weights = super().load_weights(folder, **options)
        open(os.path.join(folder, f"loading-{os.getpid()}"), "w").close()
        time.sleep(600)
        return weights
"""


@everywhere
def test_next_engine_writes_when_the_first_one_was_killed_before_it_had_published(
    engines: Any, server: RunningServer, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    slow = module_for_ranks("slow_checkpoints", SLOW, tmp_path, monkeypatch)
    first = engines(checkpoint, checkpoint_loader=slow.Slow())
    until(lambda: len(list(checkpoint.glob("loading-*"))) == 2, patience_s=120)
    assert (committed(server), writers(server)) == ([], 2)
    first.kill()
    second = engines(checkpoint).wait_until_ready()
    assert second.ask("was_read") == [1, 1]
    assert committed(server) == POOLS


PARTIAL = """
from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader

class Partial(HfCheckpointLoader):
    # The second rank does not get all.
    def load_weights(self, folder, mapping, **options):
        weights = super().load_weights(folder)
        if mapping.rank == 1:
            del weights["blocks.1.norm"]
        return weights
"""


@everywhere
def test_no_rank_publishes_when_one_has_not_loaded_all(
    engines: Any, server: RunningServer, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    partial = module_for_ranks("partial_checkpoints", PARTIAL, tmp_path, monkeypatch)
    engine = engines(checkpoint, checkpoint_loader=partial.Partial())
    with pytest.raises(RuntimeError) as caught:
        engine.wait_until_ready()
    assert str(caught.value).count("nothing was loaded into 1 of 9 parameters: blocks.1.norm") == 2
    assert committed(server) == []
    assert engines(checkpoint).wait_until_ready().ask("was_read") == [1, 1]


FAILING = """
from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader

class Failing(HfCheckpointLoader):
    # The second rank gets no weights, or its model cannot be processed.
    def __init__(self, where):
        super().__init__()
        self.where = where

    def __setstate__(self, state):
        self.__dict__.update(state)
        from tensorrt_llm._torch.models import modeling_tiny
        from tensorrt_llm._utils import mpi_rank
        original = modeling_tiny.Block.post_load_weights
        def process(block):
            if self.where == "processing" and mpi_rank() == 1:
                raise ValueError("odd")
            original(block)
        modeling_tiny.Block.post_load_weights = process

    def load_weights(self, folder, mapping, **options):
        weights = super().load_weights(folder)
        return {} if self.where == "loading" and mapping.rank == 1 else weights
"""


@everywhere
def test_no_rank_goes_on_when_one_could_not_load_or_attach(
    variant: str, engines: Any, server: RunningServer, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    failing = module_for_ranks("failing_checkpoints", FAILING, tmp_path, monkeypatch)

    def refused(where: str, reason: str) -> None:
        with pytest.raises(RuntimeError) as caught:
            engines(checkpoint, checkpoint_loader=failing.Failing(where)).wait_until_ready()
        assert f"rank 1 of this engine could not: {reason}" in str(caught.value)

    refused("loading", "GMS RW: checkpoint loader 'Failing' returned empty weights")
    assert committed(server) == []
    assert engines(checkpoint, checkpoint_loader=failing.Failing("")).wait_until_ready().ask("was_read") == [1, 1]
    if variant != STAGED_HOOKS:  # its readers process nothing
        refused("processing", "odd")


ELSEWHERE = """
from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader

class Elsewhere(HfCheckpointLoader):
    # This machine has no GPUs. What a rank gets with its options says that it has one: every rank but the first, another than the server's.
    def __setstate__(self, state):
        self.__dict__.update(state)
        from gms_core.devices import DeviceId
        from gms_trtllm import clients, place
        found = place.device_id
        clients.device_id = lambda index: DeviceId(f"GPU-{index}") if index else found(index)
"""


@everywhere
def test_one_socket_is_refused_when_the_ranks_have_different_gpus(
    variant: str, engines: Any, server: RunningServer, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    elsewhere = module_for_ranks("elsewhere_checkpoints", ELSEWHERE, tmp_path, monkeypatch)
    options = {"socket_path": str(server.socket), "mode": "rw"}
    engine = engines(checkpoint, gms_config=options, checkpoint_loader=elsewhere.Elsewhere())
    with pytest.raises(RuntimeError) as caught:
        engine.wait_until_ready()
    if variant in NATIVE:
        assert str(caught.value).count("Failed to connect to GMS at") == 2
        assert "GPU-1" in capfd.readouterr().err
    else:
        assert str(caught.value).count("WrongDevice: ") == 2
        assert "GPU-1" in str(caught.value)
