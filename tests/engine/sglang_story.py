"""`failover_story` with real SGLang servers on CPU."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chaos.reference import PROMPTS
from failover_story import PATIENCE_S, PROMPT, Client, Running, Story, until
from packaging.version import Version
from sglang_site import ENVIRONMENT, PYTHON, RENDEZVOUS, version

from tests.ports import free_port

OPTIONS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--context-length", "128"),
    *("--mem-fraction-static", "0.2", "--max-total-tokens", "4096", "--sleep-on-idle"),
)
KV_BYTES = 2 * 2 * 2 * 32 * 4 * 4096
"""Keys and values, layers, heads, their size, bytes of a number, tokens."""
MANY = 100
"""Tokens of an answer that takes a while."""


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

    def ended_in_order(self, engine: Running) -> bool:
        """As `Story.ended_in_order`. 0.5.16 with one tokenizer worker kills itself after its work."""
        return engine.process.returncode == (0 if version() > Version("0.5.16") else -signal.SIGKILL)

    def stock_answers(self) -> list[list[str]]:
        """What a stock engine answers to each of `chaos.reference.PROMPTS`."""
        client = Client(self.model, free_port())
        with self.engine("stock", "--port", str(client.port), load_format="auto"):
            until(client.listens, "the stock engine listens")
            return [client.continuation(prompt) for prompt in PROMPTS]


class Streamed:
    """An answer that comes token by token; it has begun to."""

    def __init__(self, client: Client) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=PATIENCE_S)
        body = {"model": str(client.model), "prompt": PROMPT, "max_tokens": MANY, "temperature": 0, "ignore_eos": True, "stream": True}
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self._lines = [self._answer.readline()]

    def tokens(self) -> list[str]:
        """All of it, once it is there."""
        with contextlib.closing(self._connection):
            self._lines += self._answer.readlines()
        pieces = [line.removeprefix(b"data:").strip() for line in self._lines if line.strip()]
        assert pieces.pop() == b"[DONE]"
        return "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces).split()
