"""TensorRT-LLM's client of the library: what its own tests say of it, with GMS's library beneath and without any."""

from __future__ import annotations

import builtins
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trtllm_engines import Rank, natively

METHODS = {
    "connect",
    "has_committed_weights",
    "mem_pool_scope",
    "materialize_module",
    "finalize_write",
    "move_untracked_params",
    "cleanup",
    "is_rw",
}


def backend(socket_path: str | None = None, **options: Any) -> Any:
    from tensorrt_llm._torch.memory.gpu_memory_backend import GMSBackend

    return GMSBackend(socket_path, None, **options)


@natively
def test_mode_is_checked_when_it_is_given(variant: str) -> None:
    for mode in ("auto", "rw", "ro"):
        backend(mode=mode)
    for mode in ("", "AUTO", "Rw", "read", "write", "shadow", "rwx", None):
        with pytest.raises(ValueError, match="GMS mode must be"):
            backend(mode=mode)


@natively
def test_tag_and_socket_are_kept_when_they_are_given(variant: str) -> None:
    assert (backend()._tag, backend(tag="llama")._tag) == ("weights", "llama")
    assert (backend()._socket_path, backend("/run/s")._socket_path) == (None, "/run/s")


@natively
def test_nothing_works_but_cleaning_up_when_it_is_not_connected(variant: str) -> None:
    one = backend()
    assert (one.is_rw, one.has_committed_weights()) == (None, False)
    one.cleanup()
    calls = [
        one.mem_pool_scope().__enter__,
        lambda: one.finalize_write(None),
        lambda: one.materialize_module(None),
        lambda: one.move_untracked_params(None),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="not connected"):
            call()


@natively
def test_connecting_fails_when_the_library_is_missing(variant: str, monkeypatch: Any) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("gpu_memory_service"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not backend().connect()


@natively
def test_connecting_fails_when_there_is_no_client(variant: str, gms: Any, checkpoint: Any, caplog: Any) -> None:
    Rank(checkpoint)  # says what is loaded
    one = backend("/nowhere/host.sock")
    assert not one.connect()
    assert one._client is None
    assert "no server listens at /nowhere/host.sock" in caplog.text


@natively
def test_nothing_can_be_written_when_it_reads(variant: str, gms: Any, checkpoint: Any) -> None:
    Rank(checkpoint).load().leave()
    reader = Rank(checkpoint).load().loader._gms_backend
    assert (reader.is_rw, reader.has_committed_weights()) == (False, True)
    with pytest.raises(RuntimeError, match="only valid in RW mode"):
        reader.mem_pool_scope().__enter__()
    with pytest.raises(RuntimeError, match="only valid in RW mode"):
        reader.finalize_write(None)


@natively
def test_socket_is_found_when_none_is_given(variant: str, gms: Any, checkpoint: Any) -> None:
    writer = Rank(checkpoint).load()
    assert writer.loader._gms_backend._socket_path == str(gms)


@natively
def test_pointer_belongs_to_a_mapping_when_it_lies_in_it(variant: str) -> None:
    one = backend()
    one._client = SimpleNamespace(
        _mappings={1: SimpleNamespace(va=4096, size=4096), 2: SimpleNamespace(va=0, size=9), 3: SimpleNamespace(va=99, size=0)}
    )
    assert [one._owns(address) for address in (4095, 4096, 8191, 8192, 0, 5, 99)] == [False, True, True, False, False, False, False]
    one._client = SimpleNamespace()
    assert not one._owns(4096)


@natively
def test_storage_counts_whole_when_a_tensor_is_a_view(variant: str) -> None:
    base = torch.zeros(4, 4)
    assert backend()._storage_bytes(base[1]) == backend()._storage_bytes(base) == 64


@natively
def test_protocol_is_followed_when_it_is_looked_at(variant: str) -> None:
    from tensorrt_llm._torch.memory.gpu_memory_backend import GPUMemoryBackend

    assert isinstance(backend(), GPUMemoryBackend)
    assert {name for name in vars(GPUMemoryBackend) if not name.startswith("_")} == METHODS


@pytest.mark.parametrize("variant", ["without_gms"], indirect=True)
def test_there_is_no_such_client_when_upstream_does_not_know_gms(variant: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        import tensorrt_llm._torch.memory  # noqa: F401
