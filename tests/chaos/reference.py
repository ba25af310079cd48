"""What a stock engine answers to some prompts, greedily.

    python -m chaos.reference MODEL OUT

It writes the tokens of all prompts as JSON, in the order of `PROMPTS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from failover_story import ENVIRONMENT, KV_BYTES, PROMPT, TOKENS

VOCABULARY = 512
LENGTHS = (40, 17, 90, 1, 64, 33, 8)
"""Of the further prompts. Some have whole blocks of KV memory in common with others, which a later request finds cached."""
PROMPTS = (tuple(PROMPT), *(tuple(3 + (7 * i * i + 13 * i + 5 * (length % 3)) % (VOCABULARY - 3) for i in range(length)) for length in LENGTHS))


def ask_stock(model: Path, folder: Path) -> list[list[str]]:
    """Run a stock engine for a moment; returns its tokens for each of `PROMPTS`."""
    out = folder / "stock.json"
    tests = Path(__file__).parents[1]
    variables = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": f"{tests}:{tests / 'engine'}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, "-m", "chaos.reference", str(model), str(out)]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    answers: list[list[str]] = json.loads(out.read_text())
    return answers


def main(model: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        seed=0,
        kv_cache_memory_bytes=KV_BYTES,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], sampling, use_tqdm=False)
    Path(out).write_text(json.dumps([output.outputs[0].text.split() for output in outputs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # vLLM's own end takes seconds, and is not what is tested
