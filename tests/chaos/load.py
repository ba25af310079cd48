"""Requests that flow all the time, each answer compared with what a stock engine says."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import NamedTuple, Self

from failover_story import Client

from chaos.reference import PROMPTS

TOKENS = 12
"""Of each answer."""
PAUSE_S = 0.1
"""Between two requests of one client, so that the machine has time left for the engines that start."""
AGAIN_S = 0.004
"""Between two attempts while nobody answers."""


class Wrong(NamedTuple):
    """An answer that a stock engine would not have given."""

    prompt: int
    expected: list[str]
    got: list[str]


class Load:
    """Clients of one address. They go on whatever happens.

    Args:
        client: Where to ask.
        expected: What a stock engine answers to each of `PROMPTS`; answers wait for it to be known.
        clients: How many ask at once.

    Attributes:
        answered: Requests with an answer.
        failed: Requests without one, by how they failed.
        wrong: Answers with wrong tokens.
    """

    def __init__(self, client: Client, expected: Future[list[list[str]]], clients: int = 2) -> None:
        self.answered = 0
        self.failed: Counter[str] = Counter()
        self.wrong: list[Wrong] = []
        self._client = client
        self._expected = expected
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._flow, args=(first,), name=f"client {first}", daemon=True) for first in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ask no more, and wait for the last answers. Idempotent."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def ask(self, prompt: int, count: int = TOKENS) -> bool:
        """Ask for some tokens; returns whether there was an answer, right or wrong."""
        body = {"model": str(self._client.model), "prompt": list(PROMPTS[prompt]), "max_tokens": count, "temperature": 0, "ignore_eos": True}
        try:
            status, answer = self._client.request("POST", "/v1/completions", body)
        except (OSError, http.client.HTTPException) as error:
            status, answer = type(error).__name__, None
        if status != 200:
            with self._guard:
                self.failed[str(status)] += 1
            return False
        got, expected = str(answer["choices"][0]["text"]).split(), self._expected.result()[prompt][:count]
        with self._guard:
            self.answered += 1
            if got != expected:
                self.wrong.append(Wrong(prompt, expected, got))
        return True

    def _flow(self, number: int) -> None:
        while not self._stop.is_set():
            number += 1
            self._stop.wait(PAUSE_S if self.ask(number % len(PROMPTS)) else AGAIN_S)


class Probe(threading.Thread):
    """One client who wants a first token, from an instant on.

    Attributes:
        seconds: From that instant to the token; None as long as there is none.
    """

    def __init__(self, load: Load, since: float, patience_s: float) -> None:
        super().__init__(name="probe", daemon=True)
        self.seconds: float | None = None
        self._load, self._since, self._patience_s = load, since, patience_s
        self.start()

    def run(self) -> None:
        while time.monotonic() < self._since + self._patience_s:
            if self._load.ask(0, 1):
                self.seconds = time.monotonic() - self._since
                return
            time.sleep(AGAIN_S)
