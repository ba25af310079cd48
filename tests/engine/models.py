"""Small models with random weights, in the shapes of real ones, that the CPU engine runs in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 512
_COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# The CPU engine's attention needs heads of at least 32.
_DENSE = {**_COMMON, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}

_DEEPSEEK = {
    **_COMMON,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # with the rotary part 576, one of two widths that vLLM's MLA knows
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_DENSE, tie_word_embeddings=False),
    "qwen3-tied": lambda: Qwen3Config(**_DENSE, tie_word_embeddings=True),
    "qwen3-untied": lambda: Qwen3Config(**_DENSE, tie_word_embeddings=False),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_DENSE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1),
    "deepseek-v2": lambda: DeepseekV2Config(**_DEEPSEEK),
    "gemma3": lambda: Gemma3TextConfig(**_DENSE, sliding_window=64, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=32),
    "gpt-oss": lambda: GptOssConfig(**_DENSE, num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}

MORE_SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    # SGLang's rotary embedding for DeepSeek on CPU knows no other.
    "deepseek-v2-yarn": lambda: DeepseekV2Config(**_DEEPSEEK, rope_parameters=_YARN, moe_layer_freq=1, scoring_func="softmax"),
    "mixtral": lambda: MixtralConfig(**_DENSE, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
}


def write_model(folder: Path, shape: str, seed: int = 0) -> Path:
    """Write weights, configuration and tokenizer. The weights are spread out, so that greedy tokens are well apart."""
    torch.manual_seed(seed)
    config = {**SHAPES, **MORE_SHAPES}[shape]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Gemma multiplies its embeddings, and reads the tokens off them again: larger ones would only repeat the last token.
                parameter.normal_(std=0.02 if shape == "gemma3" and "embed" in name else 0.2)
    model.save_pretrained(folder)
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]").save_pretrained(folder)
    return folder
