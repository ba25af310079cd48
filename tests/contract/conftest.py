"""Fixtures of the contract tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trtllm_engines import write_checkpoint

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
