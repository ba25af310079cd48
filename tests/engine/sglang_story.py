"""`failover_story` with real SGLang servers on CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chaos.reference import PROMPTS
from failover_story import Client, Story, until
from sglang_site import ENVIRONMENT, PYTHON, RENDEZVOUS

from tests.ports import free_port

OPTIONS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--context-length", "128"),
    *("--mem-fraction-static", "0.2", "--max-total-tokens", "4096", "--sleep-on-idle"),
)
KV_BYTES = 2 * 2 * 2 * 32 * 4 * 4096
"""Keys and values, layers, heads, their size, bytes of a number, tokens."""


@dataclass
class SglangStory(Story):
    """Engines of SGLang that are each other's shadows."""

    @property
    def command(self) -> Sequence[str]:
        """As `Story.command`."""
        assert PYTHON.exists(), f"{PYTHON} is missing: run `make sglang-environment`"
        return (str(PYTHON), "-m", "sglang.launch_server", "--model-path", str(self.model), *OPTIONS, RENDEZVOUS, str(free_port()))

    @property
    def parts(self) -> tuple[str, ...]:
        """As `Story.parts`."""
        return ("api-server 0", "detokenizer", "rank 0")

    @property
    def kv_bytes(self) -> int:
        """As `Story.kv_bytes`."""
        return KV_BYTES

    @property
    def environment(self) -> Mapping[str, str]:
        """As `Story.environment`."""
        return ENVIRONMENT

    def stock_answers(self) -> list[list[str]]:
        """What a stock engine answers to each of `chaos.reference.PROMPTS`."""
        client = Client(self.model, free_port())
        with self.engine("stock", "--port", str(client.port), load_format="auto"):
            until(client.listens, "the stock engine listens")
            return [client.continuation(prompt) for prompt in PROMPTS]
