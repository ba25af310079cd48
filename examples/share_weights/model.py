"""Write a random model with a tokenizer, so that nothing has to be downloaded.

python examples/share_weights/model.py 8b DIRECTORY
"""

from __future__ import annotations

import argparse
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
    "32b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "head_dim": 128,
    },
}
"""Qwen3's shapes, but for a small vocabulary."""
SPREAD = {"tiny": 0.2}
"""Standard deviation of the weights, where the usual one would make a model that repeats itself."""


def write_model(directory: Path, shape: str, dtype: str, *, weights: bool = True) -> None:
    """Write a Qwen3-shaped model with random weights.

    Its answers are nonsense, but always the same nonsense, which is what a comparison of tokens wants.

    Args:
        directory: Where config, weights and tokenizer go.
        shape: A name in `SHAPES`.
        dtype: ``float32`` or ``bfloat16``.
        weights: Whether to write them too; an engine with dummy weights needs none.
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
        tie_word_embeddings=shape == "0.6b",
        initializer_range=SPREAD.get(shape, 0.02),
        **sizes,
    )
    if weights:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="4GB")
    else:
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(directory)
    vocabulary = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]").save_pretrained(directory)


def main() -> None:
    """Write a model as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--no-weights", action="store_true", help="for engines with --load-format dummy")
    options = parser.parse_args()
    write_model(options.directory, options.shape, options.dtype, weights=not options.no_weights)


if __name__ == "__main__":
    main()
