"""How TensorRT-LLM's loader writes and reads through GMS's library: the order of its steps, what it refuses, and what GMS refuses besides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trtllm_engines import Rank, answer_without_gms, connecting_refused, everywhere, in_stages, natively, record, write_checkpoint

from gms_core.client import ReadLease, connect
from gms_core.errors import EngineUnsupported, LeaseConflict, ManifestError, UnpopulatedModule
from gms_core.layout import Identity
from gms_core.weights.holdings import all_kept
from tests.trtllm_double import MERGED_FIRST, NATIVE, STAGED_HOOKS, WITHOUT_GMS

SWEEP = ["pool_enter", "_apply", "to", "load_weights", "post_load_weights", "sweep", "pool_exit", "finalize"]
STAGED_SWEEP = [*SWEEP[:4], "post_load_apply", "post_load_weights", "sweep", "post_load_publish", "pool_exit", "finalize"]
STEPS = {WITHOUT_GMS: [step for step in SWEEP if step != "sweep"], MERGED_FIRST: SWEEP, STAGED_HOOKS: STAGED_SWEEP}
READ = ["post_load_weights", "materialize"]
STAGED_READ = ["post_load_apply", "setup_aliases", "identity", "materialize", "cache_derived_state", "post_load_publish"]


def is_published(path: Path, pool: str = "weights") -> bool:
    with connect(socket_path=path) as session:
        return any(one.name == pool and any(generation.committed for generation in one.generations) for one in session.status().pools)


@everywhere
def test_writer_goes_its_steps_when_nothing_is_published(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    events = record(monkeypatch)
    writer = Rank(checkpoint).load()
    assert events == STEPS[variant]
    assert writer.answer() == answer_without_gms(checkpoint)
    assert isinstance(writer.client.lease, ReadLease)
    if variant in NATIVE:
        assert writer.loader._gms_backend.is_rw is False
    assert writer.client.total_bytes == writer.client.lease.layout.size > 0


@natively
def test_loader_is_told_the_model_when_it_writes(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    rank, seen = Rank(checkpoint), {}
    original = rank.reader.load_weights
    monkeypatch.setattr(rank.reader, "load_weights", lambda folder, **options: seen.update(options) or original(folder))
    rank.load()
    assert seen["model"] is rank.model
    assert seen["mapping"] is rank.loader.mapping
    assert ("source_identity" in seen) == (variant == STAGED_HOOKS)


@everywhere
def test_reader_reads_nothing_when_weights_are_published(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    writer = Rank(checkpoint).load()
    expected = writer.answer()
    writer.leave()
    (checkpoint / "model.safetensors").unlink()
    events = record(monkeypatch)
    reader = Rank(checkpoint, gms_config={"mode": "ro"}).load()
    assert events == (STAGED_READ if variant == STAGED_HOOKS else READ)
    assert reader.reader.reads == 0
    assert reader.answer() == expected
    with pytest.raises((RuntimeError, LeaseConflict), match="cannot be loaded once more"):
        reader.loader.reload(reader.model, {})


@everywhere
def test_names_views_and_values_of_its_own_come_back_when_it_is_read(variant: str, gms: Path, checkpoint: Path) -> None:
    Rank(checkpoint).load().leave()
    model = Rank(checkpoint).load().model
    assert model.lm_head.weight is model.embed
    block = model.blocks[0]
    assert torch.equal(block.values, block.qkv[2 * block.part :])
    if variant != MERGED_FIRST:  # there the sweep of the writer parted them
        assert block.values.data_ptr() == block.qkv[2 * block.part :].data_ptr()
    for own in (block.steps, block.scale):
        own.add_(1)  # memory of this process: shared memory cannot be written to
    assert isinstance(model.blocks[0].qkv, torch.nn.Parameter)


@everywhere
def test_no_value_but_parameters_lies_in_shared_memory_when_it_was_written(variant: str, gms: Path, checkpoint: Path) -> None:
    writer = Rank(checkpoint).load()
    (mapped,) = writer.client._mappings.values()
    shared = {name for name, tensor in writer.model.named_parameters() if mapped.va <= tensor.data_ptr() < mapped.va + mapped.size}
    assert shared == {name for name, _ in writer.model.named_parameters()}
    for block in writer.model.blocks:
        block.steps.add_(1)
        block.scale.add_(1)


@everywhere
def test_draft_inside_the_model_comes_along_when_it_is_read(variant: str, gms: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", draft=True)
    expected = Rank(checkpoint).load()
    answer = expected.answer()
    expected.leave()
    reader = Rank(checkpoint).load()
    assert (reader.answer(), reader.reader.reads) == (answer, 0)


@everywhere
def test_model_that_cannot_be_made_without_memory_is_shared_when_it_is_written(variant: str, gms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", no_meta_init=True)
    events = record(monkeypatch)
    writer = Rank(checkpoint).load()
    assert events[:2] == (["pool_enter", "to"] if variant in NATIVE else ["to", "pool_enter"])  # upstream's `to` calls what the adapter waits for
    answer = writer.answer()
    writer.leave()
    assert Rank(checkpoint).load().answer() == answer


@natively
def test_mapping_is_skipped_when_the_loader_has_filled_the_model(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    rank = Rank(checkpoint)
    original = rank.reader.load_weights

    def preload(folder: str, **options: Any) -> dict[str, Any]:
        options["model"].load_weights(original(folder))
        return {}

    monkeypatch.setattr(rank.reader, "load_weights", preload)
    monkeypatch.setattr(rank.reader, "is_weights_preloaded", lambda: True, raising=False)
    assert rank.load().loader.weight_mapper is None
    assert is_published(gms)


@everywhere
def test_nothing_is_committed_when_the_checkpoint_is_empty(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    events = record(monkeypatch)
    rank = Rank(checkpoint)
    monkeypatch.setattr(rank.reader, "load_weights", lambda *_, **__: {})
    with pytest.raises((RuntimeError, UnpopulatedModule), match="Refusing to commit an unpopulated model"):
        rank.load()
    assert "finalize" not in events
    assert events.count("cleanup") == 1
    assert rank.client is None
    assert not is_published(gms)


@everywhere
def test_nothing_is_committed_when_the_mapping_fails(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.models.modeling_tiny import TinyLlama

    events = record(monkeypatch)
    rank = Rank(checkpoint)
    with monkeypatch.context() as broken:
        broken.setattr(TinyLlama, "load_weights", lambda *_: (_ for _ in ()).throw(KeyError("odd")))
        with pytest.raises(KeyError, match="odd"):
            rank.load()
    assert "finalize" not in events
    assert events.count("cleanup") == 1
    assert not is_published(gms)
    assert Rank(checkpoint).load().reader.reads == 1  # the next one becomes the writer


@everywhere
def test_engine_does_not_start_when_no_server_is_there(variant: str, gms: Path, checkpoint: Path, caplog: Any) -> None:
    with connecting_refused(variant, "no server listens at /nowhere/host.sock", caplog):
        Rank(checkpoint, gms_config={"socket_path": "/nowhere/host.sock"}).load()


@natively
def test_engine_does_not_start_when_it_is_unclear_whether_it_writes(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.memory.gpu_memory_backend import GMSBackend

    original = GMSBackend.connect

    def connected(self: Any) -> bool:
        original(self)
        self._is_rw = None
        return True

    monkeypatch.setattr(GMSBackend, "connect", connected)
    rank = Rank(checkpoint)
    with pytest.raises(RuntimeError, match="lock state is unset"):
        rank.load()
    assert rank.loader._gms_backend is None


@in_stages
def test_upstreams_identity_is_made_when_weights_come_from_elsewhere(variant: str, gms: Path, checkpoint: Path) -> None:
    from types import SimpleNamespace

    from tensorrt_llm._torch.source_identity import SourceIdentityMismatchError
    from tensorrt_llm.llmapi.llm_args import LoadFormat

    rank = Rank(checkpoint)
    made = {}
    for load_format in LoadFormat:
        for checkpoint_format in ("HF", "MX"):
            rank.loader.llm_args = SimpleNamespace(load_format=load_format)
            identity = rank.loader._source_identity(rank, SimpleNamespace(checkpoint_format=checkpoint_format))
            made[load_format.name, checkpoint_format] = identity is not None
    assert {key for key, wanted in made.items() if wanted} == {("GMS", "HF"), *((name, "MX") for name in LoadFormat.__members__)}
    identity.check(identity)
    identity.check(None)
    with pytest.raises(SourceIdentityMismatchError):
        identity.check("another")


@everywhere
def test_reader_is_refused_when_other_weights_are_published(
    variant: str, gms: Path, checkpoint: Path, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    from tensorrt_llm import _utils

    other = write_checkpoint(tmp_path / "other", seed=1)
    Rank(checkpoint).load().leave()
    with connecting_refused(variant, "holds generation 1 of something else: model: ", caplog):
        Rank(other).load()
    with connecting_refused(variant, "option moe_config", caplog):
        Rank(checkpoint, moe_config={"backend": "TRTLLM"}).load()
    with monkeypatch.context() as moved:  # a GPU that was another rank's
        moved.setattr(_utils, "mpi_rank", lambda: 1)
        moved.setattr(_utils, "mpi_world_size", lambda: 2)
        moved.setattr(_utils, "mpi_broadcast", lambda obj, root: "auto")
        if variant == WITHOUT_GMS:
            from gms_trtllm import adapter

            moved.setattr(adapter, "current_index", lambda: 0)
        with connecting_refused(variant, "rank: '1/2' != '0/1'", caplog):
            Rank(checkpoint).load()
    Rank(checkpoint, max_batch_size=4, kv_cache_config={"max_tokens": 100}).load()  # what decides no weight


@everywhere
def test_reader_is_refused_when_the_files_of_the_checkpoint_have_changed(variant: str, gms: Path, checkpoint: Path, caplog: Any) -> None:
    Rank(checkpoint).load().leave()
    write_checkpoint(checkpoint, seed=1)
    rank = Rank(checkpoint)
    with connecting_refused(variant, f"the checkpoint in {checkpoint} is not what is published: content: ", caplog):
        rank.load()
    with connect(socket_path=gms) as session:
        (pool,) = session.status().pools
    assert [len(generation.readers) for generation in pool.generations] == [0]


@everywhere
def test_reader_is_refused_when_a_tensor_would_be_left_without_content(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.models import modeling_tiny

    Rank(checkpoint).load().leave()
    build = modeling_tiny.TinyLlama.__init__

    def build_more(self: Any, config: Any) -> None:
        build(self, config)
        self.blocks[0].extra = torch.nn.Parameter(torch.empty(4), requires_grad=False)

    monkeypatch.setattr(modeling_tiny.TinyLlama, "__init__", build_more)
    rank = Rank(checkpoint)
    with pytest.raises(UnpopulatedModule, match=r"blocks\.0\.extra"):
        rank.load()
    assert rank.client is None


@everywhere
def test_reader_is_refused_when_published_tensors_have_no_place(variant: str, gms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from gms_trtllm import identity

    monkeypatch.setattr(identity, "_CONFIGURATION", ())  # else it would be refused for that
    checkpoint = write_checkpoint(tmp_path / "checkpoint", draft=True)
    Rank(checkpoint).load().leave()
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text().replace("true", "false"))
    with pytest.raises(ManifestError, match="draft_model"):
        Rank(checkpoint).load()


@everywhere
@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_reader_is_refused_when_its_checkpoint_is_to_be_read_otherwise(variant: str, gms: Path, checkpoint: Path, name: str, caplog: Any) -> None:
    Rank(checkpoint).load().leave()
    with (checkpoint / name).open("a") as file:
        file.write(" ")
    with connecting_refused(variant, "holds generation 1 of something else: configuration: ", caplog):
        Rank(checkpoint).load()


@everywhere
@pytest.mark.parametrize("lacks", ["blocks.1.norm", "blocks.1.out", "blocks.0.qkv", "draft."])
def test_nothing_is_committed_when_a_part_was_not_loaded(variant: str, gms: Path, tmp_path: Path, lacks: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", draft=True, lacks=(lacks,))
    rank = Rank(checkpoint)
    with pytest.raises(UnpopulatedModule, match=lacks.replace("draft.", r"draft_model\.head")):
        rank.load()
    assert rank.client is None
    assert not is_published(gms)


@everywhere
def test_second_loader_is_refused_when_the_process_has_the_tag(variant: str, gms: Path, checkpoint: Path, tmp_path: Path, caplog: Any) -> None:
    target = Rank(checkpoint).load()
    with connecting_refused(variant, "such as a draft, would get the first one's memory", caplog):
        Rank(checkpoint).load()
    draft = Rank(write_checkpoint(tmp_path / "draft", seed=2), gms_config={"tag": "weights-draft"}).load()
    assert is_published(gms, "weights-draft")
    target.leave()
    draft.leave()
    assert Rank(checkpoint).load().reader.reads == 0  # it has left: the tag is free


@everywhere
def test_blank_name_of_a_pool_is_refused_when_upstream_would_take_it(variant: str, gms: Path, checkpoint: Path, caplog: Any) -> None:
    with connecting_refused(variant, "gms_config: tag: must be 1 to 64 letters", caplog):
        Rank(checkpoint, gms_config={"tag": "not/a name"}).load()


@everywhere
def test_client_ends_once_when_it_is_cleaned_up_again(variant: str, gms: Path, checkpoint: Path) -> None:
    writer = Rank(checkpoint).load()
    client = writer.client
    assert [holding.lease for holding in all_kept()] == [client.lease]
    for _ in range(2):
        client.close()
        writer.leave()
    assert all_kept() == ()
    assert is_published(gms)


@everywhere
def test_memory_of_upstreams_own_pools_is_left_when_weights_are_loaded(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch import virtual_memory

    pools: list[str] = []

    @contextlib.contextmanager
    def use_pool(pool: str) -> Iterator[None]:
        pools.append(f"enter {pool}")
        yield
        pools.append(f"exit {pool}")

    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator: allocator.removeprefix("allocator of "))
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_pool)
    with virtual_memory.scope("outer"), virtual_memory.scope("inner"):
        rank = Rank(checkpoint)
        original = rank.reader.load_weights
        rank.reader.load_weights = lambda *args, **options: seen.extend(pools) or original(*args)
        rank.load()
        assert pools[len(seen) :] == ["enter inner"]
    assert seen == ["enter outer", "exit outer", "enter inner", "exit inner"]
    assert pools[len(seen) :] == ["enter inner", "exit inner", "enter outer", "exit outer"]


@everywhere
def test_nothing_is_loaded_when_a_pool_of_upstreams_could_not_be_entered_again(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch import virtual_memory

    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator: (_ for _ in ()).throw(TypeError("no allocator")))
    virtual_memory._pool_stack.append((None, "allocator"))
    with pytest.raises(EngineUnsupported, match="cannot be entered again: no allocator"):
        Rank(checkpoint).load()
    assert not is_published(gms)


@everywhere
def test_sleep_is_refused_when_upstreams_pools_cannot_be_left(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from pydantic import ValidationError
    from tensorrt_llm._torch import virtual_memory

    Rank(checkpoint, sleep_config={})
    monkeypatch.delattr(virtual_memory, "_pool_stack")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises((EngineUnsupported, ValidationError), match="does not nest pools"):
        Rank(checkpoint, sleep_config={})


@natively
def test_result_of_publishing_is_a_number_when_upstream_makes_one_of_it(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.memory import gpu_memory_backend

    results: list[int] = []
    original = gpu_memory_backend.GMSBackend.finalize_write
    monkeypatch.setattr(gpu_memory_backend.GMSBackend, "finalize_write", lambda self, model: results.append(original(self, model)) or results[-1])
    writer = Rank(checkpoint).load()
    assert results == [writer.client.total_bytes]


@pytest.mark.parametrize("variant", [MERGED_FIRST], indirect=True)
def test_nothing_is_compared_with_when_nobody_said_what_is_loaded(variant: str, gms: Path, checkpoint: Path, caplog: Any) -> None:
    from tensorrt_llm._torch.memory.gpu_memory_backend import GMSBackend

    assert not GMSBackend(None, None).connect()
    assert "it is not known what this process loads" in caplog.text
    with connect(socket_path=gms) as session:
        session.acquire("weights", "rw", Identity(), timeout_s=5).release()
