"""What tests with real engines share: a model, what a stock engine makes of it, and a process that has imported vLLM already."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos.reference import ask_stock
from chaos.warden import Warden
from failover_story import Story
from models import write_model
from site_of_engines import ENVIRONMENT, Site
from zygote import Zygote


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes have that run tests of this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def vllm_cache(of_all_workers: Path) -> Iterator[None]:
    """What vLLM remembers of model classes is the same for all tests: else the first engine of each one starts a process that imports vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(of_all_workers / "vllm"))
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
def stock_answers(failover_model: Path, of_all_workers: Path) -> list[list[str]]:
    """The tokens of a stock engine for each of `chaos.reference.PROMPTS`, of which the first is that of `failover_story`. It is asked once."""
    folder = of_all_workers / "stock"
    folder.mkdir(exist_ok=True)
    answers = folder / "answers.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answers.exists():
            answers.write_text(json.dumps(ask_stock(failover_model, folder)))
    found: list[list[str]] = json.loads(answers.read_text())
    return found


@pytest.fixture
def story(server: Any, failover_model: Path, tmp_path: Path) -> Story:
    """Engines of that model on one server."""
    return Story(server, failover_model, tmp_path)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory, vllm_cache: None) -> Iterator[Zygote]:
    """What engines are forked from, rather than that each of them imports vLLM for itself."""
    zygote = Zygote(tmp_path_factory.mktemp("zygote") / "log", {**os.environ, **ENVIRONMENT})
    yield zygote
    zygote.close()


@pytest.fixture
def site(zygote: Zygote, server: Any, tmp_path: Path) -> Site:
    """Engines of any model on one server."""
    return Site(server.directory, tmp_path, zygote)
