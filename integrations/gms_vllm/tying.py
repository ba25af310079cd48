"""Tied word embeddings: vLLM decides by the checkpoint whether they are (0.30 on), a reader by what is published."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gms_core.tensor_manifest import StorageRecord


def has_own_head(storages: Iterable[StorageRecord]) -> bool:
    """Whether a language model head is published with memory of its own."""
    for storage in storages:
        for tensor in storage.tensors:
            heads = [slot for slot in tensor.slots if [step.name for step in slot.steps[-2:]] == ["lm_head", "weight"]]
            if heads and len(heads) == sum(slot.steps[-1].kind == "parameter" for slot in tensor.slots):
                return True
    return False


def follow_publication(model_config: Any, storages: Iterable[StorageRecord]) -> None:
    """Build the head apart where the writer has one, though the configuration says that it is tied.

    The writer's vLLM found a head in the checkpoint (vllm/config/model.py, maybe_untie_word_embeddings), which a reader may not be able to see.
    The flag by which vLLM would compare head and embeddings after loading stays off: the writer's vLLM has done that.
    """
    if not hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
        return
    config, own = model_config.hf_config, has_own_head(storages)
    said_tied = bool(getattr(config, "tie_word_embeddings", False)) or model_config.word_embeddings_untied_by_checkpoint
    model_config.word_embeddings_untied_by_checkpoint = False
    if said_tied:
        config.tie_word_embeddings = not own
        config.get_text_config().tie_word_embeddings = not own
