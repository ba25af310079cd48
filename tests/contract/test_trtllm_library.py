"""The name `gpu_memory_service`: whose library it is, and what TensorRT-LLM finds in ours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trtllm_engines import natively

from gms_core.devices import HOST
from gms_core.errors import ConfigurationError

SYMBOLS = {
    "client.torch.allocator": ["get_or_create_gms_client_memory_manager", "gms_use_mem_pool", "evict_gms_client_memory_manager"],
    "client.torch.module": ["_iter_module_tensors", "materialize_module_from_gms"],
    "client.torch.tensor": ["_tensor_from_pointer"],
    "common.locks": ["RequestedLockType", "GrantedLockType"],
    "common.utils": ["get_socket_path"],
    "integrations.common.patches": ["patch_empty_cache"],
    "integrations.common.utils": ["finalize_gms_write"],
}

pytestmark = natively


def test_all_that_upstream_imports_is_there_when_it_is_installed(variant: str) -> None:
    import gms_trtllm

    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gpu_memory_service")
    gms_trtllm.install()
    for module, names in SYMBOLS.items():
        found = importlib.import_module(f"gpu_memory_service.{module}")
        assert [name for name in names if not hasattr(found, name)] == []
    from gpu_memory_service.common.locks import GrantedLockType, RequestedLockType

    assert {"RW", "RO", "RW_OR_RO"} == set(RequestedLockType.__members__)
    assert {"RW", "RO"} == set(GrantedLockType.__members__)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gpu_memory_service.server")
    gms_trtllm.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gpu_memory_service.common.locks")


def test_the_real_library_is_used_when_there_is_one(variant: str, tmp_path: Path, monkeypatch: Any) -> None:
    import gms_trtllm
    from gms_trtllm.library import is_ours

    real = tmp_path / "gpu_memory_service"
    (real / "common").mkdir(parents=True)
    for folder in (real, real / "common"):
        (folder / "__init__.py").write_text("")
    (real / "common/locks.py").write_text("REAL = True")
    gms_trtllm.install()
    monkeypatch.syspath_prepend(str(tmp_path))
    from gpu_memory_service.common.locks import REAL

    assert REAL
    assert not is_ours()
    with pytest.raises(ModuleNotFoundError):  # what it lacks does not come from elsewhere
        importlib.import_module("gpu_memory_service.common.utils")
    gms_trtllm.uninstall()
    assert "gpu_memory_service.common.locks" in sys.modules


def test_socket_is_filled_in_when_its_path_has_fields(variant: str, runtime_dir: Path, monkeypatch: Any) -> None:
    from gms_trtllm.place import default_socket, named_socket, pool_name

    assert named_socket("/run/{uuid}/{device}-{rank}-{tag}.sock", 3, "llama") == Path(f"/run/{HOST}/3-0-llama.sock")
    for path, problem in {"/run/{gpu}.sock": "{gpu} stands for nothing", "run/host.sock": "not an absolute path"}.items():
        with pytest.raises(ConfigurationError, match=problem):
            named_socket(path, 0, "llama")
    monkeypatch.setenv("GMS_RUNTIME_DIR", str(runtime_dir))
    assert default_socket(1, "llama") == str(runtime_dir / "host.sock")
    assert [pool_name("llama", index) for index in (0, 1)] == ["llama", "llama.1"]


def test_tensor_lies_at_its_address_when_it_is_made_of_one(variant: str) -> None:
    from gms_trtllm.tensors import tensor_from_pointer

    base = torch.arange(12, dtype=torch.int32)
    found = tensor_from_pointer(base.data_ptr() + 4, [2, 3], [6, 2], torch.int32, 0)
    assert found.tolist() == [[1, 3, 5], [7, 9, 11]]
    found[0, 0] = -1
    assert base[1] == -1
    assert tensor_from_pointer(0, [0, 3], [3, 1], torch.float32, 0).shape == (0, 3)


def test_each_tensor_is_named_once_when_a_module_is_searched(variant: str) -> None:
    from gms_trtllm.tensors import module_tensors

    module = torch.nn.Linear(2, 2, bias=False)
    module.tied = module.weight
    module.register_buffer("steps", torch.zeros(1))
    module.scale = torch.zeros(1)
    assert [(name, kind) for name, _, kind in module_tensors(module)] == [("weight", "parameter"), ("steps", "buffer"), ("scale", "tensor_attr")]


def test_options_count_as_their_values_when_they_may_decide_what_weights_are(variant: str) -> None:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    from gms_trtllm.identity import options

    class Loader:
        pass

    assert options(TorchLlmArgs(model="m", tokenizer="t", load_format="GMS", max_batch_size=3, kv_cache_config={"max_tokens": 9})) == {}
    found = options(TorchLlmArgs(model="m", dtype="float16", tensor_parallel_size=2, kv_cache_config={"dtype": "fp8", "max_tokens": 9}))
    assert found.pop("option kv_cache_config") == options(TorchLlmArgs(model="m", kv_cache_config={"dtype": "fp8"}))["option kv_cache_config"]
    assert found == {"option dtype": "float16", "option tensor_parallel_size": "2"}
    loaders = [options(TorchLlmArgs(model="m", checkpoint_loader=Loader())) for _ in range(2)]
    assert loaders[0] == loaders[1] != {}


def test_ranks_are_refused_when_upstream_does_not_tell_them_apart(variant: str, monkeypatch: Any) -> None:
    from tensorrt_llm import _utils

    from gms_core.errors import EngineUnsupported
    from gms_trtllm.ranks import all_ranks, rank

    assert all_ranks() is None
    monkeypatch.delattr(_utils, "mpi_rank")
    with pytest.raises(EngineUnsupported, match=r"no tensorrt_llm\._utils\.mpi_rank"):
        rank()
