"""Fixtures of the contract tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trtllm_engines import write_checkpoint
from trtllm_servers import PATHS, Engine, Start

from gms_core.config import child_environment
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.trtllm_double import upstream
from tests.unit.server_threads import server_in_thread


@pytest.fixture
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A variant of the double of TensorRT-LLM can be imported, and GMS's adapter for it anew."""
    with upstream(request.param, monkeypatch):
        yield request.param


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of the double's model."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def gms(variant: str, runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server, and this process as one of TensorRT-LLM's that was told to use GMS; the socket. What is mapped goes with the test."""
    import gms_trtllm
    from gms_trtllm import clients

    monkeypatch.setenv("GMS_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setenv("GMS_CACHE_DIR", str(tmp_path / "cache"))
    opened: list[Any] = []
    original = clients._open

    def noted(*asked: Any) -> Any:
        client = original(*asked)
        opened.append(client)
        return client

    monkeypatch.setattr(clients, "_open", noted)
    with server_in_thread(runtime_dir, memory_bytes=2**28) as path:
        gms_trtllm.install()
        yield path
        for client in opened:
            client.close()
            client.lease.release()


@pytest.fixture
def start(variant: str, server: RunningServer, checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts engines at one port; they end with the test."""
    port, engines = free_port(), []

    def engine(name: str, *words: str, failover: str = "{}", **variables: str) -> Engine:
        command = [sys.executable, "-m", "gms_trtllm", "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--tp_size", "2"]
        environment = child_environment(
            PYTHONPATH=PATHS,
            GMS_RUNTIME_DIR=str(server.directory),
            GMS_CACHE_DIR=str(tmp_path / "cache"),
            GMS_ENGINE=name,
            GMS_FAILOVER=failover,
            **variables,
        )
        engines.append(Engine(name, [*command, "--load-format", "gms", *words], environment, tmp_path / f"{name}.log", server, port))
        return engines[-1]

    yield engine
    for one in engines:
        one.end()
