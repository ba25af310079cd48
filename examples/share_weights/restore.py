"""An engine that comes up from a snapshot, with no checkpoint on the machine, beside one that loads the checkpoint.

    python examples/share_weights/restore.py 8b --dir /nvme0

Options that it does not know itself go to vllm serve, such as --enforce-eager.

A stock engine is asked, and one that publishes. The weights are saved, all programs end, and the checkpoint's weights are removed. Then
`gms run --restore` brings an engine up from files that are not in the page cache, and once more from files that are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from model import SHAPES
from processes import (
    ProgramError,
    complete,
    environment,
    free_port,
    kept_logs,
    program,
    running,
    serving,
    tell,
    used_gib,
    wait_until_healthy,
    write_model,
)

NAME = "model"


class Bench:
    """The programs under test, on one model."""

    def __init__(self, directory: Path, runtime: Path, shape: str, options: Sequence[str]) -> None:
        self.model = directory / "model"
        self.runtime = runtime
        self.root = directory / "snapshots"
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.options = options
        self.environment = environment(self.runtime, directory / "cache")
        self.device = ["--device", "host"] if used_gib() is None else []
        write_model(shape, self.model)

    def gms(self, *arguments: str) -> dict[str, object]:
        """What a command of gms says with ``-o json``."""
        ended = subprocess.run(
            [*program("gms"), *arguments, "-o", "json"], capture_output=True, text=True, check=False, env={**os.environ, **self.environment}
        )
        if ended.returncode:
            raise ProgramError(f"gms {' '.join(arguments)} exited with code {ended.returncode}:\n{ended.stdout}{ended.stderr}")
        told: dict[str, object] = json.loads(ended.stdout)
        return told

    @contextlib.contextmanager
    def engine(self, name: str, *options: str, before: Sequence[str] = ()) -> Iterator[dict[str, object]]:
        """An engine that answers: the seconds until it did, and what it answered."""
        port = free_port()
        command = [*before, *program("vllm"), "serve", str(self.model), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096"]
        with running(name, [*command, *self.options, *options], self.logs / f"{name}.log", self.environment) as engine:
            ready_s = wait_until_healthy(engine, port)
            yield {"ready_s": ready_s, "answers": [complete(port, str(self.model), f"w{3 + number} w14 w15 w92", 32) for number in range(8)]}

    def restored(self, name: str) -> dict[str, object]:
        """An engine that `gms run --restore` brings up, where nothing runs."""
        logs = self.logs / name
        run = [*program("gms"), "run", "--shadows", "0", *self.device, "--log-dir", str(logs), "-o", "json"]
        with self.engine(name, before=[*run, "--restore", NAME, "--root", str(self.root), "--"]) as figures:
            changes = [json.loads(line) for line in (self.logs / f"{name}.log").read_text().splitlines() if line.startswith("{")]
        times = {one["state"]: one["time"] for one in changes if one["subject"] == "restore"}
        return figures | {"restore_s": times["done"] - times["starting"]}

    def forget_files(self) -> None:
        """Drop the snapshot's files from the page cache."""
        for file in self.root.rglob("*.shard"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def read_files(self) -> None:
        """Bring the snapshot's files into the page cache."""
        piece = bytearray(16 * 2**20)
        for file in self.root.rglob("*.shard"):
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(piece):
                    pass


def measure(bench: Bench) -> dict[str, object]:
    """Run the engines; returns the figures."""
    with bench.engine("stock") as stock:
        pass
    with serving(bench.runtime, bench.logs / "gms.log", bench.environment, *bench.device):
        with bench.engine("writer", "--load-format", "gms") as writer:
            pass
        saved = bench.gms("snapshot", "save", NAME, "--root", str(bench.root), "--runtime-dir", str(bench.runtime))
    for file in bench.model.glob("*.safetensors"):
        file.unlink()
    bench.forget_files()
    cold = bench.restored("cold")
    bench.read_files()
    warm = bench.restored("warm")
    engines = {"stock": stock, "writer": writer, "cold": cold, "warm": warm}
    right = stock["answers"]
    equal = {name: figures.pop("answers") == right for name, figures in engines.items()}
    return {"bytes": sum(file.stat().st_size for file in bench.root.rglob("*.shard")), "save": saved, "tokens_equal": all(equal.values()), **engines}


def main() -> int:
    """Write a model, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument(
        "--dir", type=Path, help="directory on a disk, where model and snapshot lie meanwhile (default: the system's temporary directory)"
    )
    parser.add_argument("--out", type=Path, help="write the figures here too")
    parser.add_argument("--logs", type=Path, help="keep the programs' logs here")
    options, others = parser.parse_known_args()
    # A socket's path may not be long, so sockets are not where the user wants the files.
    with tempfile.TemporaryDirectory(prefix="gms-bench-", dir=options.dir) as name, tempfile.TemporaryDirectory(prefix="gms-") as runtime:
        bench = Bench(Path(name), Path(runtime), options.shape, others)
        try:
            with kept_logs(bench.logs, options.logs, f"restore-{options.shape}"):
                figures = {"shape": options.shape, **measure(bench)}
        except ProgramError as failure:
            print(f"The benchmark failed: {failure}", file=sys.stderr)
            return 1
    tell(figures, options.out)
    return 0 if figures["tokens_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
