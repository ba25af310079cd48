"""What the adapter decides, with vLLM's own classes and without an engine: options, refusals, the worker class, memory accounting."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gms_core.engine_config import GmsConfig
from gms_core.errors import CheckpointNotFound, ConfigurationError, EngineUnsupported, OutOfMemory
from gms_core.layout import Identity
from gms_core.pytorch.discover import discover
from gms_core.pytorch.regions import regions
from gms_core.pytorch.slots import never
from gms_core.tensor_manifest import StorageRecord
from gms_patches.apply import apply
from gms_patches.for_vllm import CREATE_ENGINE_CONFIG

pytestmark = pytest.mark.engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn about things that are not ours
    import torch
    from vllm.config.load import LoadConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.mem_utils import MemorySnapshot

    import gms_vllm
    from gms_core.weights.holdings import Figures, Holding
    from gms_vllm import accounting, files
    from gms_vllm.config import inner_load_config, loader_options, streaming_inner
    from gms_vllm.loader import GmsModelLoader
    from gms_vllm.processed import already_processed, check_model
    from gms_vllm.reader import check_sizes
    from gms_vllm.sleep_mode import stock_sleep_mode_off
    from gms_vllm.unsupported import WORKER, check_config
    from gms_vllm.worker import GmsWorker, GmsWorkerMixin
    from gms_vllm.writer import COMMUNICATION

GIB = 2**30


class OwnWorker(GmsWorker):
    """A user's worker that understands shared weights."""


class ForeignWorker:
    """A user's worker that does not."""


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    gms_vllm.register()
    yield
    apply(CREATE_ENGINE_CONFIG, lambda original: original).revert()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import write_model

    return write_model(tmp_path_factory.mktemp("model"), "qwen3-tied")


def arguments(model: Path, **changes: Any) -> EngineArgs:
    return EngineArgs(model=str(model), load_format="gms", dtype="float32", max_model_len=64, enforce_eager=True, **changes)


def test_options_are_split_when_the_inner_loader_has_its_own() -> None:
    options = loader_options({"gms": {"mode": "ro", "inner": "safetensors"}, "enable_multithread_load": True})
    assert options.gms.mode == "ro"
    inner = inner_load_config(LoadConfig(load_format="gms", model_loader_extra_config={"gms": {}}), options)
    assert inner.load_format == "safetensors"
    assert inner.model_loader_extra_config == {"enable_multithread_load": True}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"gms": {"mdoe": "ro"}}, "mdoe"),
        ({"gms": {"mode": "read"}}, "mode"),
        ({"gms": []}, "list"),
        ([], "list"),
        ({"gms": {"inner": "gms"}}, "inner"),
        ({"gms": {"inner": "ipc_cache"}}, "inner"),
    ],
)
def test_configuration_error_names_the_key_when_an_option_is_wrong(extra: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        loader_options(extra)


def test_loader_connects_to_nothing_when_it_is_made() -> None:
    loader = GmsModelLoader(LoadConfig(load_format="gms", model_loader_extra_config={"gms": {"socket_path": "/nowhere/gms.sock"}}))
    assert loader.options.gms.socket_path == Path("/nowhere/gms.sock")


def test_streaming_loader_is_chosen_when_the_model_is_in_an_object_store() -> None:
    assert streaming_inner(loader_options({}), "s3://bucket/model") == "runai_streamer"
    assert streaming_inner(loader_options({"gms": {"inner": "modelexpress"}}), "s3://bucket/model") == "modelexpress"
    with pytest.raises(EngineUnsupported, match="object store"):
        streaming_inner(loader_options({"gms": {"inner": "safetensors"}}), "s3://bucket/model")


def test_worker_is_ours_when_the_load_format_is_gms(model: Path) -> None:
    config = arguments(model).create_engine_config()
    assert config.parallel_config.worker_cls == WORKER
    assert config.load_config.load_format == "gms"


def test_nothing_is_changed_when_the_load_format_is_another(model: Path) -> None:
    config = EngineArgs(model=str(model), dtype="float32", max_model_len=64).create_engine_config()
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_own_worker_is_kept_when_it_derives_from_the_mixin(model: Path) -> None:
    name = f"{__name__}.OwnWorker"
    assert arguments(model, worker_cls=name).create_engine_config().parallel_config.worker_cls == name


@pytest.mark.parametrize("name", [f"{__name__}.ForeignWorker", "no.such.Worker", "nomodule"])
def test_own_worker_is_refused_when_it_does_not_understand_shared_weights(model: Path, name: str) -> None:
    with pytest.raises(EngineUnsupported, match="worker-cls") as caught:
        arguments(model, worker_cls=name).create_engine_config()
    assert "GmsWorkerMixin" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
        ({"quantization": "bitsandbytes"}, "bitsandbytes"),
        ({"model_loader_extra_config": {"gms": {"nonsense": 1}}}, "nonsense"),
    ],
)
def test_engine_is_refused_early_when_an_option_cannot_be_combined(model: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises((EngineUnsupported, ConfigurationError), match=named):
        arguments(model, **changes).create_engine_config()


@pytest.mark.parametrize(
    ("section", "name", "value", "named"),
    [
        ("parallel_config", "enable_eplb", True, "--enable-eplb"),
        ("parallel_config", "enable_elastic_ep", True, "--enable-elastic-ep"),
        (None, "weight_transfer_config", SimpleNamespace(), "--weight-transfer-config"),
        ("load_config", "load_format", "bitsandbytes", "bitsandbytes"),
        ("load_config", "device", "cuda", "load device"),
    ],
)
def test_configuration_is_refused_when_it_moves_or_rewrites_weights(model: Path, section: str | None, name: str, value: Any, named: str) -> None:
    config = arguments(model).create_engine_config()
    check_config(config)
    object.__setattr__(config if section is None else getattr(config, section), name, value)
    with pytest.raises(EngineUnsupported, match=named):
        check_config(config)


def test_gms_is_the_mechanism_when_sleep_mode_is_wanted(model: Path) -> None:
    wanted = arguments(model, enable_sleep_mode=True)
    config = wanted.create_engine_config().model_config
    assert (config.enable_sleep_mode, config.sleep_mode_backend, config.enable_cumem_allocator) == (True, "gms", False)
    assert wanted.enable_sleep_mode
    assert not arguments(model).create_engine_config().model_config.enable_sleep_mode


@pytest.mark.parametrize(
    ("section", "name", "value", "named"),
    [(None, "kv_transfer_config", SimpleNamespace(), "--kv-transfer-config"), ("model_config", "sleep_mode_offload_cudagraph", True, "cudagraph")],
)
def test_configuration_is_refused_when_it_cannot_be_combined_with_sleep_mode(
    model: Path, section: str | None, name: str, value: Any, named: str
) -> None:
    config = arguments(model, enable_sleep_mode=True).create_engine_config()
    check_config(config)
    object.__setattr__(config if section is None else getattr(config, section), name, value)
    with pytest.raises(EngineUnsupported, match=named):
        check_config(config)


def test_another_mechanism_is_refused_when_it_would_move_the_weights() -> None:
    wanted = SimpleNamespace(enable_sleep_mode=True, sleep_mode_backend="criu")
    with pytest.raises(EngineUnsupported, match="criu"), stock_sleep_mode_off(wanted):
        pass
    assert wanted.enable_sleep_mode


def test_other_version_is_refused_when_untested_engines_are_not_allowed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_vllm.unsupported.TESTED", ">=99")
    with pytest.raises(EngineUnsupported, match="GMS_ALLOW_UNTESTED_ENGINE"):
        arguments(model).create_engine_config()
    monkeypatch.setenv("GMS_ALLOW_UNTESTED_ENGINE", "1")
    arguments(model).create_engine_config()


def test_layer_is_named_when_it_cannot_take_over_processed_weights() -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Packed(QuantizeMethodBase):
        def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            pass

        def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise AssertionError

    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    check_model(module)
    module[0].quant_method = Packed()
    with pytest.raises(EngineUnsupported, match="layer 0: Packed"):
        check_model(module)


def test_checkpoint_not_found_names_folder_and_patterns_when_there_are_no_weights(tmp_path: Path) -> None:
    config = SimpleNamespace(model=str(tmp_path), model_weights="", revision=None)
    with pytest.raises(CheckpointNotFound, match=r"\*\.safetensors") as caught:
        files.check_checkpoint(config, "auto")
    assert str(tmp_path) in str(caught.value)
    files.check_checkpoint(config, "dummy")
    (tmp_path / "model.safetensors").write_bytes(b"")
    files.check_checkpoint(config, "auto")


def test_files_are_those_that_the_inner_loader_prefers_when_there_are_several_kinds(tmp_path: Path) -> None:
    config = SimpleNamespace(model=str(tmp_path), model_weights="", revision=None)
    for name in ("b.safetensors", "a.safetensors", "a.bin", "consolidated.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in files.weight_files(config, "auto")] == ["consolidated.safetensors"]
    assert [path.name for path in files.weight_files(config, "safetensors")] == ["a.safetensors", "b.safetensors", "consolidated.safetensors"]
    assert [path.name for path in files.weight_files(config, "pt")] == ["a.pt"]
    assert files.weight_files(config, "dummy") == []


@dataclass
class Worker:
    """What accounting needs of vLLM's GPU worker."""

    init_snapshot: MemorySnapshot
    cache_config: Any
    requested_memory: int = field(default=0)


def gpu_worker_with(free: int, total: int = 100 * GIB, utilization: float = 0.5, kv_bytes: int | None = None) -> Worker:
    snapshot = MemorySnapshot(
        free_memory=free, total_memory=total, cuda_memory=total - free, non_torch_memory=total - free, device="cpu", auto_measure=False
    )
    return Worker(snapshot, SimpleNamespace(gpu_memory_utilization=utilization, kv_cache_memory_bytes=kv_bytes))


def holding(neighbours: int = 0, external: int = 0) -> Holding:
    return Holding(SimpleNamespace(), SimpleNamespace(), neighbours=neighbours, external_bytes=external)


def test_budget_is_the_whole_share_when_this_engine_published() -> None:
    worker = gpu_worker_with(free=90 * GIB)
    accounting.settle(worker, holding())
    assert worker.requested_memory == 50 * GIB
    assert worker.init_snapshot.free_memory == 90 * GIB


def test_shared_weights_leave_the_budget_when_this_engine_attached() -> None:
    worker = gpu_worker_with(free=45 * GIB)
    accounting.settle(worker, holding(external=10 * GIB))
    assert worker.requested_memory == 40 * GIB


def test_what_others_took_is_not_this_engines_when_it_waited() -> None:
    worker = gpu_worker_with(free=98 * GIB)
    accounting.settle(worker, holding(neighbours=50 * GIB, external=10 * GIB))
    assert worker.requested_memory == 40 * GIB
    snapshot = worker.init_snapshot
    assert snapshot.free_memory == 48 * GIB
    assert snapshot.cuda_memory == snapshot.total_memory - snapshot.free_memory
    assert snapshot.non_torch_memory == snapshot.cuda_memory


def test_out_of_memory_when_the_budget_does_not_fit_beside_the_neighbours() -> None:
    with pytest.raises(OutOfMemory, match="gpu-memory-utilization"):
        accounting.settle(gpu_worker_with(free=98 * GIB), holding(neighbours=70 * GIB, external=10 * GIB))
    with pytest.raises(OutOfMemory):
        accounting.settle(gpu_worker_with(free=98 * GIB, utilization=0.05), holding(external=10 * GIB))


def test_budget_is_not_checked_when_the_user_gave_the_size_of_the_kv_cache() -> None:
    accounting.settle(gpu_worker_with(free=1 * GIB, kv_bytes=GIB), holding(external=10 * GIB))


def request_memory_without_seam(init_snapshot: Any, cache_config: Any) -> int:
    """As vLLM had it before it knew of weights in other processes."""
    requested = math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization)
    if init_snapshot.free_memory < requested:
        raise ValueError("less than desired")
    return requested


def test_start_up_check_leaves_shared_weights_out_when_vllm_has_no_seam_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.v1.worker.gpu_worker as gpu_worker

    monkeypatch.setattr(gpu_worker, "request_memory", request_memory_without_seam)
    monkeypatch.setattr(accounting, "external_bytes", lambda config, options: 10 * GIB)
    worker = gpu_worker_with(free=45 * GIB)
    with pytest.raises(ValueError, match="less than desired"):
        gpu_worker.request_memory(worker.init_snapshot, worker.cache_config)
    with accounting.startup_check(SimpleNamespace(), GmsConfig()):
        assert gpu_worker.request_memory(worker.init_snapshot, worker.cache_config) == 40 * GIB
        small = gpu_worker_with(free=39 * GIB)
        with pytest.raises(ValueError, match="less than desired"):
            gpu_worker.request_memory(small.init_snapshot, small.cache_config)
    assert gpu_worker.request_memory is request_memory_without_seam
    assert worker.init_snapshot.free_memory == 45 * GIB


def test_start_up_check_is_vllms_own_when_it_has_a_seam() -> None:
    import vllm.v1.worker.gpu_worker as gpu_worker

    before = gpu_worker.request_memory
    with accounting.startup_check(SimpleNamespace(), GmsConfig()):
        assert gpu_worker.request_memory is before


def test_external_bytes_are_those_of_the_pool_when_something_is_published_or_being_written(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_RUNTIME_DIR", str(server.directory))
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_rank=0, world_size=1, rank=0))
    assert accounting.external_bytes(config, GmsConfig()) == 0
    with server.connect() as session, session.acquire("weights", "rw", Identity({}), timeout_s=5) as lease:
        lease.arena.allocate(8192)
        assert accounting.external_bytes(config, GmsConfig()) == lease.arena.length
        with lease.commit(b"", Identity({})) as published:
            assert accounting.external_bytes(config, GmsConfig()) == published.layout.size
            assert accounting.external_bytes(config, GmsConfig(mode="rw")) == 0
            assert accounting.external_bytes(config, GmsConfig(tag="other")) == 0


def test_scales_are_taken_over_when_vllm_knows_no_processed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    monkeypatch.setattr("gms_vllm.processed.has_processed_flag", lambda: False)
    layer = torch.nn.Module()
    for name, value in (("_k_scale", 0.5), ("_v_scale", 0.25), ("_q_scale", 2.0)):
        layer.register_buffer(name, torch.tensor(value))
    layer.k_scale = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)
    method = layer.quant_method = BaseKVCacheMethod(None)
    check_model(layer)
    with already_processed(layer):
        layer.quant_method.process_weights_after_loading(layer)
    assert (layer._k_scale_float, layer._v_scale_float, layer._q_scale_float) == (0.5, 0.25, 2.0)
    assert layer._k_scale_cpu.item() == 0.5
    assert not hasattr(layer, "k_scale")
    assert "process_weights_after_loading" not in vars(method)


def test_figures_are_key_value_pairs_when_they_are_logged() -> None:
    line = Figures("attached", "weights", 2, 100, 0.5, 0.25, 0).line()
    assert line == "gms event=attached pool=weights generation=2 bytes=100 seconds=0.500000 wait_seconds=0.250000 checkpoint_bytes=0"


@pytest.mark.parametrize("call", ["reload_weights", "update_weights", "reset_weights"])
def test_new_weights_are_refused_when_weights_are_shared(call: str) -> None:
    class Worker(GmsWorkerMixin):
        def __init__(self) -> None:
            self.vllm_config = SimpleNamespace(load_config=SimpleNamespace(load_format="gms"))

    with pytest.raises(EngineUnsupported, match=call):
        getattr(Worker(), call)()


def test_reader_is_refused_when_a_work_buffer_has_another_size_here() -> None:
    class Model(torch.nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))
            self.register_buffer("cache", torch.zeros(length, 2))

    published = describe(Model(8))
    check_sizes(Model(8), published)
    with pytest.raises(EngineUnsupported, match=r"cache is \[8, 2\] and here \[16, 2\]"):
        check_sizes(Model(16), published)


def test_buffers_of_communicators_are_not_published_when_a_kernel_holds_them() -> None:
    from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase

    manager = All2AllManagerBase.__new__(All2AllManagerBase)
    manager.workspace = torch.zeros(4)
    model = torch.nn.Linear(2, 2)
    model.kernel = SimpleNamespace(all2all_manager=manager)
    assert [item.name for item in discover(model, opaque=COMMUNICATION)] == ["weight", "bias"]


def describe(model: torch.nn.Module) -> tuple[StorageRecord, ...]:
    """The storages of a model as a manifest lists them, published or not."""
    found = regions(discover(model))
    return tuple(StorageRecord(offset=0, size=one.size, place="arena", shared=one.has_weight(never), tensors=one.records()) for one in found)
