"""Two stock vLLM engines share one copy of the weights; then the one that serves is killed, and its shadow serves. On this machine, with figures.

Run it with ``make demo``. Without a GPU it uses a CPU build of vLLM and memory of the ``host`` device; with one, the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model import write_model
from processes import Program, ProgramError, complete, environment, free_port, program, running, serving, wait_until_healthy

from gms_core.cli.failover_benchmark import Wanted, measure
from gms_core.cli.failover_benchmark_client import Endpoint
from gms_core.cli.failover_benchmark_table import timeline
from gms_core.errors import GmsError

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
CPU_OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]
PROMPT = "w3 w14 w15 w92 w65 w35"
REQUESTS = 4
GPU_OPTIONS = ["--max-model-len", "2048", "--gpu-memory-utilization", "0.3"]


class Demo:
    """The story's stage: a scratch directory, a model, and the commands."""

    def __init__(self, directory: Path, *, gpu: bool) -> None:
        self.model = directory / "model"
        self.logs = directory / "logs"
        self.aside = directory / "moved-away"
        self.runtime = directory / "run"
        self.gpu = gpu
        self.logs.mkdir()
        self.aside.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.runtime, self.runtime / "cache") | ({} if self.gpu else CPU_ENVIRONMENT)

    def command(self, port: int) -> list[str]:
        """The command line of an engine, without GMS."""
        command = [*program("vllm"), "serve", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        return [*command, *(GPU_OPTIONS if self.gpu else CPU_OPTIONS)]

    @contextlib.contextmanager
    def engine(self, name: str, *options: str) -> Iterator[tuple[Program, int]]:
        """A ``vllm serve`` that answers."""
        port = free_port()
        with running(name, [*self.command(port), *options], self.logs / f"{name}.log", self.environment) as engine:
            ready = wait_until_healthy(engine, port)
            say(f"  {name} answers on port {port}, {ready:.1f} s after its start")
            yield engine, port

    def server(self) -> contextlib.AbstractContextManager[float]:
        """A ``gms serve``; gives the seconds from its start to a socket that accepts."""
        return serving(self.runtime, self.logs / "gms.log", self.environment, *([] if self.gpu else ["--device", "host"]))

    def tokens(self, port: int) -> list[str]:
        """What an engine answers to the story's prompt."""
        return complete(port, str(self.model), PROMPT, 24)

    def move_weights_away(self) -> int:
        """Take the weights out of the checkpoint; returns their bytes."""
        files = list(self.model.glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
        for file in files:
            shutil.move(file, self.aside / file.name)
        return total

    def put_weights_back(self) -> None:
        """Undo `move_weights_away`."""
        for file in self.aside.iterdir():
            shutil.move(file, self.model / file.name)

    def weight_bytes_in_checkpoint(self) -> int:
        """Bytes of weights that an engine could read from the checkpoint."""
        return sum(file.stat().st_size for file in self.model.glob("*.safetensors"))


def say(text: str) -> None:
    """Tell the next part of the story."""
    print(text, flush=True)


def share(demo: Demo) -> dict[str, object]:
    """The story's first part, one copy of the weights; returns its figures."""
    say(f"A random Qwen3-shaped model is written ({'0.6 billion parameters' if demo.gpu else 'tiny'}).")
    write_model(demo.model, *(("0.6b", "bfloat16") if demo.gpu else ("tiny", "float32")))
    say("A stock engine, without GMS, says which tokens are right.")
    with demo.engine("stock") as (_, port):
        right = demo.tokens(port)
    with demo.server() as server_ready_s:
        say(f"gms serve is ready after {server_ready_s * 1000:.0f} ms.")
        say("Engine 1 starts with --load-format gms. Nothing is published yet, so it loads the checkpoint and publishes.")
        with demo.engine("engine-1", "--load-format", "gms") as (first, first_port):
            published = first.figures("event=published")
            say(f"  published {published['bytes'] / 2**20:.1f} MiB in {published['seconds']:.2f} s")
            moved = demo.move_weights_away()
            say(f"The checkpoint's weights ({moved / 2**20:.1f} MiB) are moved away. Engine 2 starts with the same command.")
            with demo.engine("engine-2", "--load-format", "gms") as (second, second_port):
                attached = second.figures("event=attached")
                read = int(attached["checkpoint_bytes"]) + demo.weight_bytes_in_checkpoint()
                say(f"  attached {attached['bytes'] / 2**20:.1f} MiB in {attached['seconds'] * 1000:.0f} ms; read {read} bytes of the checkpoint")
                answers = [demo.tokens(first_port), demo.tokens(second_port)]
                equal = answers == [right, right]
                say(f"Both engines answer, and their tokens {'are those' if equal else 'DIFFER from those'} of the stock engine.")
                return {
                    "device": "gpu" if demo.gpu else "host",
                    "server_ready_s": server_ready_s,
                    "publish_s": published["seconds"],
                    "attach_s": attached["seconds"],
                    "attach_checkpoint_bytes": read,
                    "shared_bytes": int(attached["bytes"]),
                    "tokens_equal": equal,
                }


def fail_over(demo: Demo) -> dict[str, object]:
    """The story's second part, kill -9; returns its figures."""
    demo.put_weights_back()
    os.environ.update(demo.environment)
    port = free_port()
    command = tuple(demo.command(port))
    say("The weights are put back. As under `gms run --shadows 1 -- vllm serve ...`, a primary and its shadow start on one and the same port.")
    wanted = Wanted(
        command=command,
        restart_command=command,
        endpoint=Endpoint("127.0.0.1", port),
        kills=1,
        load=REQUESTS,
        restarts=("warm",),
        devices=() if demo.gpu else ("host",),
        log_dir=demo.logs / "failover",
    )
    found = measure(wanted, lambda line: say(f"  {line}"))
    killed = found.failovers[0] if found.failovers else None
    if killed is None or found.faults():
        raise ProgramError("; ".join(found.faults()))
    first_s, restart_s = killed.events["first_token"], found.restarts["warm"].start_to_first_token_s
    flying, failed = killed.requests.in_flight, killed.requests.in_flight_failed
    say(f"kill -9 of all processes of the primary: its shadow answers a new request at the same port after {first_s * 1000:.0f} ms.")
    say(f"  {failed} of {flying} requests in flight failed, and {killed.requests.failed - failed} that came too early after the kill;")
    say(f"  the shadow's tokens are those of the dead engine: {killed.compared_tokens} compared, {killed.wrong_tokens} wrong.")
    say(f"To start that engine again instead takes {restart_s:.1f} s to the first token, {restart_s / first_s:.0f} times as long.")
    for line in timeline(killed):
        say(f"  {line}")
    return {
        "kill_to_first_token_s": first_s,
        "failed_requests": killed.requests.failed,
        "restart_s": restart_s,
        "kill_to_gone_s": killed.events["gone"],
        "wrong_tokens": found.wrong_tokens,
        "max_primaries": found.max_primaries,
    }


def main() -> int:
    """Run the demonstration and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo.json"), help="where the figures go (default: %(default)s)")
    parser.add_argument("--gpu", choices=["auto", "yes", "no"], default="auto", help="use a GPU (default: if torch sees one)")
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed in this Python; `make demo` installs a CPU build of it.", file=sys.stderr)
        return 1
    import torch

    gpu = torch.cuda.is_available() if options.gpu == "auto" else options.gpu == "yes"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gms-demo-") as directory:
        try:
            demo = Demo(Path(directory), gpu=gpu)
            figures = {**share(demo), **fail_over(demo)}
        except (ProgramError, GmsError) as failure:
            print(f"The demonstration failed: {failure}", file=sys.stderr)
            return 1
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    say(f"The figures are in {options.out}.")
    return 0 if figures["tokens_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
