"""Write a random model with a tokenizer, so that nothing has to be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32},
    "0.6b": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "head_dim": 128,
    },
    "8b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128},
}
"""Qwen3's shapes, but for a small vocabulary."""


def write_model(directory: Path, shape: str, dtype: str) -> None:
    """Write a Qwen3-shaped model with random weights.

    Its answers are nonsense, but always the same nonsense, which is what a comparison of tokens wants.

    Args:
        directory: Where config, weights and tokenizer go.
        shape: A name in `SHAPES`.
        dtype: ``float32`` or ``bfloat16``.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    config = Qwen3Config(
        num_key_value_heads=min(8, sizes["num_attention_heads"] // 2),
        max_position_embeddings=8192,
        dtype=dtype,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=shape != "8b",
        **sizes,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="4GB")
    vocabulary = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]").save_pretrained(directory)
