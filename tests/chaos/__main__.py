"""`make chaos`: seeded random kills in a row; see `chaos.run`."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conftest import running_server
from failover_story import Story
from models import write_model

from chaos.run import Run, first_kinds, write
from chaos.warden import Warden


def sglang(server: Any, model: Path, logs: Path) -> tuple[Story, list[list[str]]]:
    """Engines of SGLang, and what a stock one of these answers."""
    from sglang_story import SglangStory

    story = SglangStory(server, model, logs)
    return story, story.stock_answers()


def main() -> int:
    """Run it; returns the exit code: 0 only if there was one primary at all times, and nothing else was wrong."""
    parser = argparse.ArgumentParser(prog="make chaos", description="Kill real engines again and again, and see that one serves, and rightly.")
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--seed", type=int, default=None, help="of whatever is left to chance; new each time if not given")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--shadows", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=2, help="engines that may be starting at the same time")
    parser.add_argument("--out", type=Path, default=Path("build/chaos.json"))
    parser.add_argument("--logs", type=Path, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="gms-chaos-"))
    began = time.monotonic()

    def tell(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - began:7.1f} s  {line}\n")
        sys.stdout.flush()

    tell(f"ENGINE={options.engine} SEED={seed} KILLS={options.kills}; logs are in {logs}")
    os.environ.setdefault("VLLM_CACHE_ROOT", str(logs / "vllm"))
    model = write_model(logs / "model", "llama")
    with Warden() as warden, tempfile.TemporaryDirectory(prefix="gms-") as directory, running_server(Path(directory)) as server:
        story, stock = (Story(server, model, logs), None) if options.engine == "vllm" else sglang(server, model, logs)
        run = Run(story, seed, tell, shadows=options.shadows, at_once=options.at_once)
        result = run.go(first_kinds(random.Random(seed), options.kills, story), warden, stock)
    write(result, options.out)
    for finding in result.findings:
        tell(f"FOUND {finding}")
    tell(
        f"{options.out}: kills {result.kills}, max_primaries {result.max_primaries}, wrong_tokens {result.wrong_tokens}, "
        f"failed_promotions {result.failed_promotions}, leftovers {result.leftovers}, requests {result.requests}"
    )
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
