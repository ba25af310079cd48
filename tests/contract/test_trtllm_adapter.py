"""What GMS does in the loader of a TensorRT-LLM that has no load format of that name: what it looks at, what it refuses, and what it leaves alone."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trtllm_engines import TOKENS, Rank, answer_without_gms, by_the_adapter, connecting_refused, everywhere, record, write_checkpoint

from gms_core.client import connect
from gms_core.errors import ConfigurationError, EngineUnsupported, LeaseConflict, UnpopulatedModule
from gms_core.weights.holdings import all_kept
from tests.trtllm_double import NATIVE, ROOT, WITHOUT_GMS

LOADER = "tensorrt_llm._torch.pyexecutor.model_loader"


def published(path: Path) -> set[str]:
    with connect(socket_path=path) as session:
        return {pool.name for pool in session.status().pools if any(generation.committed for generation in pool.generations)}


def engine(checkpoint: Path, **options: Any) -> Any:
    """The double's own, in this process."""
    from tensorrt_llm.llmapi import llm
    from tensorrt_llm.rank import Rank as Engine

    return Engine(llm.TorchLlmArgs(model=str(checkpoint), load_format="GMS", **options), 0, 1)


@everywhere
def test_draft_has_weights_of_its_own_when_it_has_a_loader_of_its_own(variant: str, gms: Path, checkpoint: Path, tmp_path: Path, caplog: Any) -> None:
    draft = write_checkpoint(tmp_path / "draft", seed=3)
    speculation = {"speculative_model": str(draft)}
    if variant in NATIVE:  # there upstream chooses the tag
        with connecting_refused(variant, "such as a draft, would get the first one's memory", caplog):
            engine(checkpoint, speculative_config=speculation)
        return
    from gms_trtllm.adapter import leave

    first = engine(checkpoint, speculative_config=speculation)
    assert published(gms) == {"weights", "weights-draft"}
    assert (first.forward(TOKENS), first.forward_draft(TOKENS)) == (answer_without_gms(checkpoint), answer_without_gms(draft))
    for loader in first.loaders:
        leave(loader)
    second = engine(checkpoint, speculative_config=speculation)
    assert (second.reads, second.forward(TOKENS), second.forward_draft(TOKENS)) == (0, first.forward(TOKENS), first.forward_draft(TOKENS))
    for loader in second.loaders:
        leave(loader)
    write_checkpoint(draft, seed=4)
    with connecting_refused(variant, f"the checkpoint in {draft} is not what is published: content: ", caplog):
        engine(checkpoint, speculative_config=speculation)
    gc.collect()  # the target of the engine that was refused
    other = write_checkpoint(tmp_path / "other", seed=4)
    with connecting_refused(variant, "holds generation 1 of something else: option speculative_config: ", caplog):
        engine(checkpoint, speculative_config={"speculative_model": str(other)})


@by_the_adapter
def test_draft_is_refused_when_its_weights_are_made_up(variant: str, gms: Path, checkpoint: Path, tmp_path: Path) -> None:
    draft = write_checkpoint(tmp_path / "draft", seed=3)
    with pytest.raises(ConfigurationError, match="the load format of this model is DUMMY now"):
        engine(checkpoint, speculative_config={"speculative_model": str(draft), "load_format": "dummy"})
    assert published(gms) == {"weights"}


@by_the_adapter
def test_nothing_is_committed_when_the_checkpoint_of_the_draft_is_empty(variant: str, gms: Path, tmp_path: Path) -> None:
    checkpoint, draft = write_checkpoint(tmp_path / "checkpoint", draft=True), tmp_path / "draft"
    draft.mkdir()
    rank = Rank(checkpoint, speculative_config={"speculative_model": str(draft), "in_target": True})
    with pytest.raises(UnpopulatedModule, match=rf"returned empty weights \({draft}\).* Refusing to commit"):
        rank.load()
    assert published(gms) == set()
    write_checkpoint(draft, seed=3)
    assert Rank(checkpoint, speculative_config={"speculative_model": str(draft), "in_target": True}).load().reader.reads == 2
    assert published(gms) == {"weights"}


@by_the_adapter
def test_nothing_is_committed_when_a_model_with_memory_was_not_loaded_whole(variant: str, gms: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", no_meta_init=True, lacks=("blocks.1.norm",))
    with pytest.raises(UnpopulatedModule, match=r"blocks\.1\.norm"):
        Rank(checkpoint).load()
    assert published(gms) == set()


@by_the_adapter
def test_nothing_is_committed_when_the_loader_was_not_asked_for_weights(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.pyexecutor import model_loader
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    with monkeypatch.context() as lazy:
        lazy.setattr(ModelLoader, "_fill", lambda self, model, *_: model.to_empty(device="cpu"))
        with pytest.raises(UnpopulatedModule, match=r"'HfCheckpointLoader' was not asked for weights\. Refusing to commit"):
            Rank(checkpoint).load()
    with monkeypatch.context() as odd:
        odd.setattr(ModelLoader, "_construct", lambda self, config: (model_loader.AutoModelForCausalLM.from_config(config), False))
        odd.setattr(ModelLoader, "_fill", lambda *_: None)
        with pytest.raises(EngineUnsupported, match=r"expected a model of AutoModelForCausalLM\.from_config to get its memory by Module\._apply"):
            Rank(checkpoint).load()
    assert published(gms) == set()
    assert Rank(checkpoint).load().reader.reads == 1


@by_the_adapter
def test_empty_answer_is_taken_when_the_loader_has_filled_the_model_itself(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.models import modeling_tiny

    rank, models = Rank(checkpoint), []
    build = modeling_tiny.TinyLlama.__init__
    monkeypatch.setattr(modeling_tiny.TinyLlama, "__init__", lambda self, config: models.append(self) or build(self, config))
    original = rank.reader.load_weights
    monkeypatch.setattr(rank.reader, "load_weights", lambda folder, **_: models[-1].load_weights(original(folder)) or {})
    rank.reader.is_weights_preloaded = lambda: True
    assert rank.load().answer() == answer_without_gms(checkpoint)
    assert published(gms) == {"weights"}


@by_the_adapter
def test_checkpoint_loader_passes_for_itself_when_it_is_watched(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    seen: list[bool] = []
    original = ModelLoader._load_and_validate_config

    def look(self: Any, folder: Any, loader: Any) -> Any:
        seen.append(isinstance(loader, HfCheckpointLoader))
        loader.note = "kept"
        return original(self, folder, loader)

    monkeypatch.setattr(ModelLoader, "_load_and_validate_config", look)
    writer = Rank(checkpoint).load()
    writer.leave()
    reader = Rank(checkpoint).load()
    assert seen == [True, True]
    assert (writer.reader.note, reader.reader.note) == ("kept", "kept")


@by_the_adapter
@pytest.mark.parametrize("name", ["load_weights", "open_weight_session", "get_initialized_weight_mapper"])
def test_reader_is_refused_when_it_would_ask_for_weights(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any, name: str) -> None:
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    Rank(checkpoint).load().leave()
    monkeypatch.setattr(ModelLoader, "_load_and_validate_config", lambda self, folder, loader: getattr(loader, name)(folder, None))
    reader = Rank(checkpoint)
    with pytest.raises(LeaseConflict, match="a reader has asked its checkpoint loader for weights"):
        reader.load()
    assert (reader.reader.reads, reader.client) == (0, None)


@by_the_adapter
def test_engine_does_not_start_when_it_is_unclear_whether_it_writes(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from gms_trtllm import adapter

    original = adapter.get_or_create

    def unclear(*args: Any, **options: Any) -> Any:
        client = original(*args, **options)
        client.granted_lock_type = None
        return client

    with monkeypatch.context() as odd:
        odd.setattr(adapter, "get_or_create", unclear)
        rank = Rank(checkpoint)
        with pytest.raises(LeaseConflict, match="lock state is unset"):
            rank.load()
    assert rank.client is None
    assert Rank(checkpoint).load().reader.reads == 1  # the tag is free, and so is the pool


@by_the_adapter
def test_modules_are_made_outside_of_shared_memory_when_a_model_is_written(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.distributed import AllReduce
    from tensorrt_llm._torch.models.modeling_utils import AutoModelForCausalLM
    from tensorrt_llm._torch.pyexecutor import model_loader

    events = record(monkeypatch)
    build = AllReduce.__init__
    monkeypatch.setattr(AllReduce, "__init__", lambda self: events.append("communicator") or build(self))
    Rank(checkpoint).load()
    assert events[:4] == ["communicator", "communicator", "pool_enter", "_apply"]
    assert model_loader.AutoModelForCausalLM is AutoModelForCausalLM


@by_the_adapter
def test_second_model_is_refused_when_the_first_could_not_get_its_memory(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any) -> None:
    from tensorrt_llm._torch.models import modeling_tiny

    with monkeypatch.context() as broken:  # upstream takes any error here for a model that cannot be made without memory, and makes another
        broken.setattr(modeling_tiny.TinyLlama, "_apply", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(EngineUnsupported, match="was to make a second model for one load"):
            Rank(checkpoint).load()
    assert published(gms) == set()


@by_the_adapter
def test_weights_lie_in_no_memory_of_upstreams_own_when_they_are_written(variant: str, gms: Path, checkpoint: Path) -> None:
    rank, seen = Rank(checkpoint), []
    rank.loader.model_weights_memory_tag = "model_weights"
    original = rank.reader.load_weights
    rank.reader.load_weights = lambda *args, **options: seen.append(rank.loader.model_weights_memory_tag) or original(*args)
    rank.load()
    assert (seen, rank.loader.model_weights_memory_tag) == ([None], "model_weights")


@by_the_adapter
def test_lease_ends_when_the_model_is_gone(variant: str, gms: Path, checkpoint: Path) -> None:
    writer = Rank(checkpoint).load()
    assert len(all_kept()) == 1
    del writer
    gc.collect()
    assert all_kept() == ()
    assert Rank(checkpoint).load().reader.reads == 0


@by_the_adapter
def test_leaving_raises_nothing_when_the_session_cannot_be_closed(variant: str, gms: Path, checkpoint: Path, monkeypatch: Any, caplog: Any) -> None:
    writer = Rank(checkpoint).load()
    with monkeypatch.context() as broken:
        broken.setattr(type(writer.client), "close", lambda _: (_ for _ in ()).throw(OSError("odd")))
        for _ in range(2):
            writer.leave()
    assert "the session with GMS could not be closed: odd" in caplog.text


@by_the_adapter
def test_engines_are_left_alone_when_they_do_not_ask_for_gms(variant: str, gms: Path, checkpoint: Path) -> None:
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    rank = Rank(checkpoint)
    rank.args = rank.loader.llm_args = type(rank.args)(model=str(checkpoint))
    assert rank.load().answer() == answer_without_gms(checkpoint)
    rank.loader.reload(rank.model, {})
    assert (published(gms), rank.client) == (set(), None)
    assert ModelLoader.load.__gms_patch__ == "trtllm-load-model"


@by_the_adapter
def test_model_is_not_loaded_once_more_when_it_is_shared(variant: str, gms: Path, checkpoint: Path) -> None:
    writer = Rank(checkpoint).load()
    with pytest.raises(LeaseConflict, match="cannot be loaded once more: its weights are shared"):
        writer.loader.reload(writer.model, {"embed": torch.zeros(1)})


@by_the_adapter
def test_loader_is_refused_when_it_lacks_something(variant: str, gms: Path, checkpoint: Path) -> None:
    rank = Rank(checkpoint)
    del rank.loader.mapping
    with pytest.raises(
        EngineUnsupported, match=r"ModelLoader\.load: expected an object with llm_args, mapping, spec_config, found none of the name map"
    ):
        rank.load()


def break_load(monkeypatch: Any) -> None:
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    monkeypatch.setattr(ModelLoader, "load", lambda self, folder: None)


def break_reload(monkeypatch: Any) -> None:
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    monkeypatch.setattr(ModelLoader, "reload", lambda self, weights: None)


def break_models(monkeypatch: Any) -> None:
    from tensorrt_llm._torch.models.modeling_utils import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", staticmethod(lambda config, device: None))


def break_configuration(monkeypatch: Any) -> None:
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    monkeypatch.delattr(ModelLoader, "_load_and_validate_config")


def break_ranks(monkeypatch: Any) -> None:
    from tensorrt_llm import _utils

    monkeypatch.setattr(_utils, "mpi_broadcast", lambda obj, src: obj)


@by_the_adapter
@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (break_load, r"ModelLoader\.load takes \(self, folder\), expected \(self, checkpoint_dir, checkpoint_loader\)"),
        (break_reload, r"ModelLoader\.reload takes \(self, weights\), expected \(self, model, weights\) or "),
        (break_models, r"AutoModelForCausalLM\.from_config, .* expected \(config\), found \(config, device\)"),
        (break_configuration, r"ModelLoader\._load_and_validate_config, .* expected \(self, checkpoint_dir, checkpoint_loader\), found nothing"),
        (break_ranks, r"mpi_broadcast, .* expected \(obj, root=\), found \(obj, src\)"),
    ],
)
def test_nothing_is_changed_when_a_symbol_is_not_as_it_is_known(variant: str, monkeypatch: Any, broken: Any, sentence: str) -> None:
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
    from tensorrt_llm.llmapi import llm, llm_args

    import gms_trtllm
    from gms_patches.apply import in_force

    with monkeypatch.context() as changed:
        broken(changed)
        load = ModelLoader.load
        with pytest.raises(EngineUnsupported, match=sentence):
            gms_trtllm.install()
        assert in_force() == []
        assert ModelLoader.load is load
        assert llm.TorchLlmArgs is llm_args.TorchLlmArgs
    gms_trtllm.install()
    assert set(in_force()) == {"trtllm-load-model", "trtllm-reload-model", "trtllm-release-memory", "trtllm-materialise-memory"}
    gms_trtllm.uninstall()
    assert in_force() == []


@everywhere
def test_installing_is_refused_when_the_native_loader_is_half_there(variant: str, monkeypatch: Any) -> None:
    import gms_trtllm

    if variant == WITHOUT_GMS:
        gms_trtllm.install()  # it needs none
        return
    from tensorrt_llm._torch.memory import gpu_memory_backend

    monkeypatch.delattr(gpu_memory_backend, "GMSBackend")
    with pytest.raises(EngineUnsupported, match=r"GMSBackend, which is needed for .* found nothing"):
        gms_trtllm.install()


RANK = f"""
import pickle, sys
from {LOADER} import ModelLoader
ModelLoader.load = lambda self, folder: None
try:
    pickle.loads(sys.stdin.buffer.read())
except Exception as error:
    print(type(error).__name__, error)
"""


@by_the_adapter
def test_rank_does_not_start_when_its_engine_is_not_as_it_is_known(variant: str) -> None:
    from tensorrt_llm.llmapi import llm

    import gms_trtllm
    from gms_core.config import child_environment

    gms_trtllm.install()
    args = llm.TorchLlmArgs(model="model", load_format="GMS")
    environment = child_environment(PYTHONPATH=":".join([str(ROOT), *filter(None, sys.path)]))
    result = subprocess.run([sys.executable, "-c", RANK], input=pickle.dumps(args), capture_output=True, check=True, env=environment)
    assert result.stdout.decode().startswith("EngineUnsupported patch trtllm-load-model: ")
