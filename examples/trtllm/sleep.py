"""Let an engine in this process sleep and wake up, and compare its answers: python sleep.py MODEL RANKS. It exits with 3 if there is no sleep."""

from __future__ import annotations

import sys

import gms_trtllm

TAGS = ["model_weights", "kv_cache"]


def main(model: str, ranks: int) -> int:
    gms_trtllm.install()
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    if "sleep_config" not in TorchLlmArgs.model_fields or not hasattr(LLM, "_collective_rpc"):
        return 3
    with LLM(model=model, load_format="GMS", tensor_parallel_size=ranks, sleep_config={}) as llm:

        def answer() -> list[int]:
            (result,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0))
            return list(result.outputs[0].token_ids)

        before = answer()
        for _ in range(2):
            llm._collective_rpc("sleep", (TAGS,))  # noqa: SLF001 - there is no public way
            llm._collective_rpc("wakeup", (TAGS,))  # noqa: SLF001 - as above
            if answer() != before:
                print(f"other tokens after a sleep: {answer()}, not {before}")
                return 1
    return 0


if __name__ == "__main__":  # ranks are fresh interpreters, which may import this file
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
