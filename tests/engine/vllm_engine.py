"""One vLLM engine in this process, on CPU: start it, generate greedily, say what was seen in one line of JSON, and stay until told to end.

    python vllm_engine.py MODEL LOAD_FORMAT [EXTRA [ARGUMENTS]]

EXTRA is the JSON of ``--model-loader-extra-config``, ARGUMENTS that of further engine arguments. On standard input ``again`` generates again,
``write`` writes to a weight, ``sleep LEVEL`` and ``wake [TAG...]`` do what they say, ``step [METHOD]`` asks the worker for a step past the scheduler,
``promote SECONDS`` gives an engine that fails over its KV memory, and any other line ends it. Such an engine does not generate before it is told to.
An error ends it with a line of JSON too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

PROMPTS = [[5, 17, 33, 101, 7], [11, 12, 13], [400, 3, 250, 77, 8, 9, 10, 44]]
TOKENS = 24
MEMORY = r"memfd:gms-\d"
"""In the name of a memory file."""

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "kv_cache_memory_bytes": 16 * 2**20,
    "max_num_seqs": 4,
    "seed": 0,
    "disable_log_stats": True,
}


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def load() -> None:
    """Import what every engine imports first."""
    from vllm import LLM, SamplingParams  # noqa: F401


def start(model: str, load_format: str, extra: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(model=model, load_format=load_format, model_loader_extra_config=extra, **{**DEFAULTS, **arguments})


def generate(engine: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def pss_of(path: str) -> int:
    """Bytes of this process's share in mappings whose name contains ``path``."""
    total, counted = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            if "-" in line.split(" ", 1)[0]:
                counted = path in line
            elif counted and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def memory() -> dict[str, int]:
    """Bytes of memory files that this process has mapped, and that it keeps through descriptors."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        ends = [line.split(" ", 1)[0].split("-") for line in file if re.search(MEMORY, line)]
    held = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if re.search(MEMORY, os.readlink(f"/proc/self/fd/{name}")):
                held += os.stat(f"/proc/self/fd/{name}").st_size
    return {"mapped": sum(int(end, 16) - int(start, 16) for start, end in ends), "held": held}


def figures() -> dict[str, Any] | None:
    import msgspec

    from gms_core.weights import holdings

    holding = holdings.current()
    return None if holding is None or holding.figures is None else msgspec.to_builtins(holding.figures)


def write_to_a_weight(engine: Any) -> None:
    def write(module: Any) -> None:
        next(module.parameters()).data.zero_()

    engine.apply_model(write)


def call(engine: Any, method: str, *arguments: Any) -> dict[str, Any]:
    """What the workers answer to a call that vLLM's scheduler has not made."""
    return or_error(lambda: {"error": None, "answers": engine.collective_rpc(method, args=arguments)})


def or_error(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What comes of it, or the error."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the test asks which
        return {"error": getattr(error, "code", type(error).__name__), "message": str(error)}


def obey(engine: Any, command: str, *words: str) -> dict[str, Any] | None:
    """Carry out one line; None ends it."""
    if command == "sleep":
        engine.sleep(int(words[0]))
    elif command == "wake":
        engine.wake_up(list(words) or None)
    elif command == "step":
        return call(engine, "execute_dummy_batch") if not words else call(engine, words[0], None)
    elif command == "promote":
        return call(engine, "gms_promote", float(words[0]))
    elif command == "beat":
        return call(engine, "gms_beat")
    elif command in ("again", "write"):
        if command == "write":
            write_to_a_weight(engine)
        return or_error(lambda: {"tokens": generate(engine), "pss": pss_of("memfd:")})
    else:
        return None
    return memory()


def main(model: str, load_format: str, extra: str = "{}", arguments: str = "{}") -> int:
    try:
        engine = start(model, load_format, json.loads(extra), json.loads(arguments))
        cache = engine.llm_engine.vllm_config.cache_config
        result = {"blocks": cache.num_gpu_blocks, "kv_bytes": cache.kv_cache_memory_bytes}
        if not json.loads(extra).get("gms", {}).get("failover"):
            result["tokens"] = generate(engine)
        result |= {"pss": pss_of("memfd:"), **memory(), "figures": figures() if load_format == "gms" else None}
    except Exception as error:  # noqa: BLE001 - the test asks what went wrong
        traceback.print_exc()
        cause: BaseException | None = error
        while cause is not None and not hasattr(cause, "hint"):
            cause = cause.__cause__ or cause.__context__
        found = cause or error
        say({"error": getattr(found, "code", type(found).__name__), "message": str(found)})
        return 1
    say(result)
    for line in sys.stdin:
        answer = obey(engine, *(line.split() or ["end"]))
        if answer is None:
            break
        say(answer)
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    os._exit(code)  # vLLM's own end takes seconds, and is not what is tested
