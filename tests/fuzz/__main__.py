"""``make fuzz``: hostile frames against a live server, as many as wanted, and as many inputs for the codec under a coverage-guided fuzzer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import running_server
from tests.fuzz.hostile import REPLIES, REQUESTS, payload
from tests.fuzz.live import run

MISSING = "not run: atheris is not installed (pip install 'gms[fuzz]')"


def coverage_guided(seed: int, runs: int) -> str:
    """Run the coverage-guided fuzzer in a process of its own; returns what came of it, in words."""
    if importlib.util.find_spec("atheris") is None:
        return MISSING
    with tempfile.TemporaryDirectory(prefix="gms-fuzz-") as folder:
        chance, corpus = random.Random(seed), Path(folder, "corpus")
        corpus.mkdir()
        for number in range(500):  # messages to begin with: by chance alone none would come in a million
            (corpus / f"{number}").write_bytes(payload(chance, REQUESTS + REPLIES)[:3000] + b"\xff\xff\0")
        words = [str(corpus), f"-runs={runs}", f"-seed={seed}", "-timeout=10", "-rss_limit_mb=2048", "-verbosity=0", f"-artifact_prefix={folder}/"]
        done = subprocess.run([sys.executable, "-m", "tests.fuzz.coverage_guided", *words], capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            return "ok"
        found = [path.read_bytes().hex() for path in Path(folder).iterdir() if path.is_file()]
        return f"exit code {done.returncode}, input {found[:1]}: {done.stderr[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 10**6))
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--senders", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/fuzz.json"))
    options = parser.parse_args()
    sys.stdout.write(f"seed {options.seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="gms-") as folder, running_server(Path(folder) / "run", host_memory=64 * 2**20) as server:
        outcome = run(server, options.seed, options.frames, options.senders)
    codec = coverage_guided(options.seed, options.frames)
    result = {**outcome.as_dict(), "codec_inputs": options.frames, "codec": codec}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 1 if outcome.findings or codec not in ("ok", MISSING) else 0


if __name__ == "__main__":
    sys.exit(main())
