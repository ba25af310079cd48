"""What tests with real engines share: a model, and what a stock engine makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos.reference import ask_stock
from chaos.warden import Warden
from failover_story import Story
from models import write_model


@pytest.fixture(scope="session", autouse=True)
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM remembers of model classes is the same for all tests: else the first engine of each one starts a process that imports vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm")))
        yield


@pytest.fixture
def warden() -> Iterator[Warden]:
    """To be asked for before the server: whatever is started from then on ends with the test, even if the test itself is killed."""
    with Warden() as warden:
        yield warden


@pytest.fixture(scope="session")
def failover_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="session")
def stock_answers(failover_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The tokens of a stock engine for each of `chaos.reference.PROMPTS`, of which the first is that of `failover_story`."""
    return ask_stock(failover_model, tmp_path_factory.mktemp("stock"))


@pytest.fixture
def story(server: Any, failover_model: Path, tmp_path: Path) -> Story:
    """Engines of that model on one server."""
    return Story(server, failover_model, tmp_path)
