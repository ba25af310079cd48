"""Shared weights in TensorRT-LLM's sleep: they are unmapped with the rest, and come back at the same addresses."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trtllm_ranks import module_for_ranks
from trtllm_engines import TOKENS, Rank, by_the_adapter, everywhere, write_checkpoint

from gms_core.client import connect
from gms_core.errors import EngineUnsupported
from gms_core.layout import Identity
from gms_core.plugins.findings import Status
from tests.conftest import RunningServer
from tests.unit.publishing import publish

pytestmark = pytest.mark.timeout(300)

WEIGHTS, DRAFT_WEIGHTS, KV_CACHE = "model_weights", "draft_model_weights", "kv_cache"


class Kind(enum.StrEnum):
    MODEL_WEIGHTS = WEIGHTS


def mapped() -> int:
    """How many mappings of published memory this process has."""
    return sum("memfd:gms" in line for line in Path("/proc/self/maps").read_text().splitlines())


@everywhere
@pytest.mark.parametrize("tag", [WEIGHTS, Kind.MODEL_WEIGHTS])
def test_weights_are_unmapped_and_come_back_when_their_memory_is_taken_away(variant: str, gms: Path, checkpoint: Path, tag: str) -> None:
    from tensorrt_llm._torch import virtual_memory

    writer = Rank(checkpoint).load()
    expected, before = writer.answer(), mapped()
    addresses = [tensor.data_ptr() for tensor in writer.model.parameters()]
    assert before
    for _ in range(2):
        virtual_memory.release_with_tag(KV_CACHE, tag)
        assert (writer.client.is_asleep, mapped()) == (True, 0)
    for _ in range(2):
        virtual_memory.materialize_with_tag(tag)
        assert (writer.client.is_asleep, mapped()) == (False, before)
    assert writer.answer() == expected
    assert [tensor.data_ptr() for tensor in writer.model.parameters()] == addresses


@everywhere
def test_weights_stay_when_other_memory_is_taken_away(variant: str, gms: Path, checkpoint: Path) -> None:
    from tensorrt_llm._torch import virtual_memory

    writer = Rank(checkpoint).load()
    assert virtual_memory.release_with_tag(KV_CACHE, "model", DRAFT_WEIGHTS) == 3
    assert not writer.client.is_asleep
    writer.answer()


@by_the_adapter
def test_target_and_draft_sleep_by_tags_of_their_own(variant: str, gms: Path, tmp_path: Path) -> None:
    from tensorrt_llm._torch import virtual_memory
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
    from tensorrt_llm.mapping import Mapping

    from gms_trtllm.adapter import _clients

    draft = write_checkpoint(tmp_path / "draft", seed=1)
    target = Rank(write_checkpoint(tmp_path / "target"), speculative_config={"speculative_model": str(draft)}).load()
    loader = ModelLoader(target.args, Mapping(), target.args.speculative_config, None, 64, 64)
    _model, _ = loader.load(str(draft), target.reader)
    for tag, asleep in ((WEIGHTS, [True, False]), (DRAFT_WEIGHTS, [False, True])):
        virtual_memory.release_with_tag(tag)
        assert [target.client.is_asleep, _clients[loader].is_asleep] == asleep
        virtual_memory.materialize_with_tag(tag)


@everywhere
def test_weights_sleep_on_when_the_engine_cannot_be_woken_up(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch import virtual_memory

    writer = Rank(checkpoint).load()
    expected = writer.answer()
    virtual_memory.release_with_tag(WEIGHTS, KV_CACHE)
    with monkeypatch.context() as full:
        full.setattr(virtual_memory, "_change", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            virtual_memory.materialize_with_tag(WEIGHTS, KV_CACHE)
    assert (writer.client.is_asleep, mapped()) == (True, 0)
    virtual_memory.materialize_with_tag(WEIGHTS, KV_CACHE)
    assert writer.answer() == expected


@everywhere
def test_engine_wakes_up_with_its_own_weights_when_others_were_published_meanwhile(variant: str, gms: Path, checkpoint: Path) -> None:
    from tensorrt_llm._torch import virtual_memory

    rank = Rank(checkpoint).load()
    expected, generation = rank.answer(), rank.client.lease.layout.generation
    virtual_memory.release_with_tag(WEIGHTS)
    with connect(socket_path=gms) as session:
        publish(session, b"other" * 1000, rank.client.lease.pool, Identity({"model": "other"})).release()
    newer = rank.client.lease.newer()
    assert newer is not None
    assert newer.generation > generation
    virtual_memory.materialize_with_tag(WEIGHTS)
    assert rank.client.lease.layout.generation == generation
    assert rank.answer() == expected


def test_check_names_what_sleep_needs_when_it_has_changed() -> None:
    from gms_patches.for_trtllm import REQUIREMENTS

    class Source:
        version, where = "0", "here"

        def text(self, module: str) -> str | None:
            text = "def release_with_tag(*tags): ...\ndef materialize_with_tag(tags, stream): ...\n"
            return text if module == "tensorrt_llm._torch.virtual_memory" else None

    told = {verdict.target: verdict for verdict in (judge(Source()) for judge in REQUIREMENTS)}  # type: ignore[arg-type]
    assert told["trtllm-release-memory"].status is Status.OK
    assert told["trtllm-materialise-memory"].status is Status.FAIL
    assert "parameters (tags, stream), expected (*tags)" in told["trtllm-materialise-memory"].evidence


@everywhere
def test_modules_that_have_the_functions_by_name_are_reached_too(variant: str, gms: Path, checkpoint: Path) -> None:
    import gms_trtllm

    gms_trtllm.uninstall()
    from tensorrt_llm._torch import virtual_memory
    from tensorrt_llm.llmapi import rlhf_utils

    originals = rlhf_utils.release_with_tag, rlhf_utils.materialize_with_tag
    gms_trtllm.install()
    writer, worker = Rank(checkpoint).load(), rlhf_utils.WorkerExtension()
    worker.sleep([WEIGHTS])
    assert writer.client.is_asleep
    worker.wakeup([WEIGHTS])
    assert not writer.client.is_asleep
    gms_trtllm.uninstall()
    assert (rlhf_utils.release_with_tag, rlhf_utils.materialize_with_tag) == originals
    assert (virtual_memory.release_with_tag, virtual_memory.materialize_with_tag) == originals


@everywhere
def test_weights_stay_mapped_when_this_version_does_not_sleep(variant: str, monkeypatch: Any, caplog: Any) -> None:
    from tensorrt_llm._torch import virtual_memory

    import gms_trtllm

    monkeypatch.delattr(virtual_memory, "release_with_tag")
    with caplog.at_level(logging.INFO):
        gms_trtllm.install()
    assert "it does not sleep, and shared weights stay mapped" in caplog.text


@everywhere
def test_nothing_is_installed_when_sleep_is_not_as_it_is_known(variant: str, monkeypatch: Any) -> None:
    from tensorrt_llm._torch import virtual_memory

    import gms_trtllm
    from gms_patches.apply import in_force

    monkeypatch.setattr(virtual_memory, "materialize_with_tag", lambda tag: 0)
    with pytest.raises(EngineUnsupported, match=r"patch trtllm-materialise-memory: .* takes \(tag\), expected \(\*tags\)"):
        gms_trtllm.install()
    assert in_force() == []


@pytest.fixture
def engines(variant: str, server: RunningServer, tmp_path: Path, monkeypatch: Any) -> Iterator[Any]:
    """Makes engines of two ranks; they end with the test."""
    from tensorrt_llm.llmapi import LLM

    import gms_trtllm

    monkeypatch.setenv("GMS_RUNTIME_DIR", str(server.directory))
    monkeypatch.setenv("GMS_CACHE_DIR", str(tmp_path / "cache"))
    gms_trtllm.install()
    made: list[Any] = []

    def engine(checkpoint: Path, **options: Any) -> Any:
        made.append(LLM(checkpoint, load_format="GMS", tensor_parallel_size=2, **options))
        return made[-1].wait_until_ready()

    yield engine
    for one in made:
        one.kill()


@everywhere
def test_answers_are_equal_when_engines_sleep_by_turns_and_one_is_killed_meanwhile(engines: Any, checkpoint: Path) -> None:
    writer, reader = engines(checkpoint), engines(checkpoint)
    expected = torch.tensor(writer.generate(TOKENS))
    for awake, asleep in ((reader, writer), (writer, reader)):
        asleep._collective_rpc("sleep", ([WEIGHTS, KV_CACHE],))
        assert asleep.ask("mapped") == [0, 0]
        assert torch.equal(torch.tensor(awake.generate(TOKENS)), expected)
        asleep._collective_rpc("wakeup", ([WEIGHTS, KV_CACHE],))
        assert torch.equal(torch.tensor(asleep.generate(TOKENS)), expected)
    reader._collective_rpc("sleep", ([WEIGHTS],))
    writer.kill()
    reader._collective_rpc("wakeup", ([WEIGHTS],))
    assert torch.equal(torch.tensor(reader.generate(TOKENS)), expected)


REFUSING = """
import os
from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader

class Refusing(HfCheckpointLoader):
    # As long as a file is there, the second rank cannot unmap, map, or change memory of TensorRT-LLM's own.
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__.update(state)
        from gms_core.client.lease import ReadLease
        from gms_core.errors import DriverError
        from tensorrt_llm._torch import virtual_memory
        from tensorrt_llm._utils import mpi_rank
        for owner, name in ((ReadLease, "unmap"), (ReadLease, "remap"), (virtual_memory, "_change")):
            def change(*given, original=getattr(owner, name), name=name):
                if mpi_rank() == 1 and os.path.exists(os.path.join(state["folder"], name)):
                    raise DriverError(f"no {name}")
                return original(*given)
            setattr(owner, name, change)
"""


@everywhere
def test_weights_of_all_ranks_stay_as_they_are_when_one_cannot_sleep_or_wake_up(
    variant: str, engines: Any, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    refusing = module_for_ranks("refusing_checkpoints", REFUSING, tmp_path, monkeypatch)
    engine = engines(checkpoint, checkpoint_loader=refusing.Refusing(str(tmp_path)))
    expected = torch.tensor(engine.generate(TOKENS))
    awake = engine.ask("mapped")
    assert 0 not in awake

    def refused(name: str, method: str, mapped: list[int]) -> None:
        (tmp_path / name).touch()
        first, second = engine._collective_rpc(method, ([WEIGHTS, KV_CACHE],))
        assert (f"rank 1 of this engine could not: no {name}" in first, f"no {name}" in second) == (True, True)
        (tmp_path / name).unlink()
        assert engine.ask("mapped") == mapped

    refused("unmap", "sleep", awake)
    refused("_change", "sleep", awake)
    assert torch.equal(torch.tensor(engine.generate(TOKENS)), expected)
    assert engine._collective_rpc("sleep", ([WEIGHTS, KV_CACHE],)) == [None, None]
    refused("remap", "wakeup", [0, 0])
    refused("_change", "wakeup", [0, 0])
    assert engine._collective_rpc("wakeup", ([WEIGHTS, KV_CACHE],)) == [None, None]
    assert torch.equal(torch.tensor(engine.generate(TOKENS)), expected)
