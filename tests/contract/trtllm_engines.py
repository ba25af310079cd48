"""Engines of the double of TensorRT-LLM for tests: a checkpoint, loaders in this process, and what they do in which order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gms_core.errors import GmsError
from tests.trtllm_double import NATIVE, STAGED_HOOKS, VARIANTS, WITHOUT_GMS

HIDDEN, VOCABULARY, LAYERS = 8, 16, 2
TOKENS = [1, 2, 3]

everywhere = pytest.mark.parametrize("variant", VARIANTS, indirect=True)
natively = pytest.mark.parametrize("variant", NATIVE, indirect=True)
by_the_adapter = pytest.mark.parametrize("variant", [WITHOUT_GMS], indirect=True)
in_stages = pytest.mark.parametrize("variant", [STAGED_HOOKS], indirect=True)


def write_checkpoint(folder: Path, *, seed: int = 0, lacks: tuple[str, ...] = (), **config: Any) -> Path:
    """A checkpoint of the double's model, without the tensors whose names begin so."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden": HIDDEN, "vocab": VOCABULARY, "layers": LAYERS, **config}))
    random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    weights = {"embed": random(VOCABULARY, HIDDEN), "draft.head": random(HIDDEN, HIDDEN)}
    for index in range(LAYERS):
        weights[f"blocks.{index}.norm"] = random(HIDDEN).abs()
        weights[f"blocks.{index}.qkv"] = random(3 * HIDDEN, HIDDEN)
        weights[f"blocks.{index}.out"] = random(HIDDEN, HIDDEN)
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith(lacks or ("-",))}, folder / "model.safetensors")
    return folder


class Rank:
    """Loads in this process, as a rank does."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader
        from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
        from tensorrt_llm.llmapi import llm
        from tensorrt_llm.mapping import Mapping

        self.checkpoint = checkpoint
        self.args = llm.TorchLlmArgs(model=str(checkpoint), load_format="GMS", **options)
        self.reader = HfCheckpointLoader()
        self.loader = ModelLoader(self.args, Mapping(), self.args.speculative_config, None, 64, 64)
        self.model: Any = None

    def load(self) -> Rank:
        self.model, _ = self.loader.load(str(self.checkpoint), self.reader)
        return self

    def answer(self) -> list[list[float]]:
        with torch.no_grad():
            return self.model(torch.tensor(TOKENS)).tolist()

    @property
    def client(self) -> Any:
        """None if it has none, or none any more."""
        if hasattr(self.loader, "_gms_backend"):
            backend = self.loader._gms_backend
            return backend and backend._client
        from gms_trtllm.adapter import _clients

        return _clients.get(self.loader)

    def leave(self) -> None:
        if hasattr(self.loader, "cleanup"):
            self.loader.cleanup()
            return
        from gms_trtllm.adapter import leave

        leave(self.loader)


@contextmanager
def connecting_refused(variant: str, because: str, caplog: Any) -> Iterator[None]:
    """No lease is granted meanwhile: upstream's own loader logs why, and raises an error of its own; the adapter raises why."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError if variant in NATIVE else GmsError) as caught:
        yield
    if variant in NATIVE:
        assert "Failed to connect to GMS at" in str(caught.value)
        assert because in caplog.text
    else:
        assert because in str(caught.value)


def answer_without_gms(checkpoint: Path) -> list[list[float]]:
    from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
    from tensorrt_llm.mapping import Mapping

    model, _ = ModelLoader(TorchLlmArgs(model=str(checkpoint)), Mapping(), None, None, 64, 64).load(str(checkpoint), HfCheckpointLoader())
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).tolist()


def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a load does from now on, in order."""
    from tensorrt_llm._torch.models import modeling_tiny
    from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

    events: list[str] = []
    inside: list[str] = []

    def noting(owner: Any, name: str, event: str, *, static: bool = False) -> None:
        original = getattr(owner, name, None)
        if original is None:
            return

        def noted(*args: Any, **options: Any) -> Any:
            if not inside:  # `to` calls `_apply`
                events.append(event)
            if event == "to":
                inside.append(event)
            try:
                return original(*args, **options)
            finally:
                if event == "to":
                    inside.pop()

        monkeypatch.setattr(owner, name, staticmethod(noted) if static else noted)

    def noting_scope(owner: Any, name: str) -> None:
        scope = getattr(owner, name)

        @contextmanager
        def noted_scope(*args: Any) -> Any:
            events.append("pool_enter")
            with scope(*args):
                yield
                events.append("pool_exit")

        monkeypatch.setattr(owner, name, noted_scope)

    if hasattr(ModelLoader, "cleanup"):
        from tensorrt_llm._torch.memory.gpu_memory_backend import GMSBackend

        noting_scope(GMSBackend, "mem_pool_scope")
        for name, event in {
            "materialize_module": "materialize",
            "finalize_write": "finalize",
            "move_untracked_params": "sweep",
            "cleanup": "cleanup",
        }.items():
            noting(GMSBackend, name, event)
        noting(modeling_tiny, "full_post_load", "post_load_weights")
    else:
        from gms_trtllm import adapter
        from gms_trtllm.clients import Client

        noting_scope(Client, "writing")
        for name, event in {"attach": "materialize", "publish": "finalize"}.items():
            noting(Client, name, event)
        noting(adapter, "_end", "cleanup")
        noting(modeling_tiny.TinyLlama, "post_load_weights", "post_load_weights")
    for name in ("_apply", "to"):
        noting(modeling_tiny.TinyLlama, name, name)
    noting(HfCheckpointLoader, "load_weights", "load_weights")
    for name in ("post_load_apply", "post_load_publish"):
        noting(HfCheckpointLoader, name, name)
    for name, event in {
        "_setup_aliases": "setup_aliases",
        "_walk_cache_state": "cache_derived_state",
        "_check_gms_source_identity": "identity",
    }.items():
        noting(ModelLoader, name, event, static=True)
    return events
