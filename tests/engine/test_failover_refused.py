"""What an engine that is to fail over refuses, and which cohort it begins, with vLLM's own classes and without an engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig, NodesConfig
from gms_core.errors import ConfigurationError, EngineUnsupported
from gms_patches.apply import apply
from gms_patches.for_vllm import CREATE_ENGINE_CONFIG

pytestmark = pytest.mark.engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn about things that are not ours
    from vllm.config.load import LoadConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    import gms_vllm
    from gms_vllm.loader import GmsModelLoader
    from gms_vllm.unsupported import check_failover

FAILOVER = {"gms": {"failover": {"lock": "gms:test"}}}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    gms_vllm.register()
    yield
    apply(CREATE_ENGINE_CONFIG, lambda original: original).revert()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine tells its children is gone after the test."""
    for name in ("GMS_COHORT", "GMS_ENGINE", "GMS_FAILOVER"):
        monkeypatch.setenv(name, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import write_model

    return write_model(tmp_path_factory.mktemp("model"), "qwen3-tied")


def config_of(model: Path, extra: dict[str, Any], context: UsageContext | None = None) -> Any:
    arguments = EngineArgs(
        model=str(model), load_format="gms", dtype="float32", max_model_len=64, enforce_eager=True, model_loader_extra_config=extra
    )
    return arguments.create_engine_config(usage_context=context)


@pytest.mark.parametrize(
    ("section", "name", "value", "named"),
    [
        ("parallel_config", "data_parallel_size", 2, "data parallelism"),
        ("parallel_config", "nnodes", 2, "several nodes"),
        ("parallel_config", "distributed_executor_backend", "ray", "ray"),
        (None, "kv_transfer_config", SimpleNamespace(), "KV connector"),
    ],
)
def test_configuration_is_refused_when_such_engines_do_not_fail_over(model: Path, section: str | None, name: str, value: Any, named: str) -> None:
    config = config_of(model, {"gms": {}})
    check_failover(config, FailoverConfig(), api_servers=1, headless=False)
    object.__setattr__(config if section is None else getattr(config, section), name, value)
    with pytest.raises(EngineUnsupported, match=named):
        check_failover(config, FailoverConfig(), api_servers=1, headless=False)


def test_headless_engine_is_refused_when_it_is_on_one_node(model: Path) -> None:
    with pytest.raises(EngineUnsupported, match="without an API server"):
        check_failover(config_of(model, {"gms": {}}), FailoverConfig(), api_servers=1, headless=True)


def test_engine_over_several_nodes_is_refused_when_something_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model, {"gms": {}})
    object.__setattr__(config.parallel_config, "nnodes", 2)
    nodes = FailoverConfig(nodes=NodesConfig(secret_file=Path("/secret"), port=29600))
    monkeypatch.delenv("GMS_ENGINE", raising=False)
    with pytest.raises(EngineUnsupported, match="needs a name"):
        check_failover(config, nodes, api_servers=1, headless=True)
    monkeypatch.setenv("GMS_ENGINE", "engine-0")
    with pytest.raises(EngineUnsupported, match="can have one API server"):
        check_failover(config, nodes, api_servers=2, headless=False)
    check_failover(config, nodes, api_servers=1, headless=True)


def test_rust_front_end_is_refused_when_it_is_to_be_held(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(EngineUnsupported, match="Rust"):
        config_of(model, FAILOVER)
    config_of(model, {"gms": {}})


@pytest.mark.parametrize("context", [UsageContext.OPENAI_API_SERVER, UsageContext.OPENAI_BATCH_RUNNER])
def test_front_end_is_refused_when_nothing_holds_it(model: Path, context: UsageContext) -> None:
    with pytest.raises(EngineUnsupported, match="cannot be held") as caught:
        config_of(model, FAILOVER, context)
    assert "vllm serve" in caught.value.hint
    config_of(model, {"gms": {}}, context)


def test_wrong_lock_is_refused_when_the_configuration_is_made(model: Path) -> None:
    with pytest.raises(ConfigurationError, match="lock"):
        config_of(model, {"gms": {"failover": {"lock": "etcd:somewhere"}}})


def test_every_engine_has_a_cohort_of_its_own_when_it_is_to_fail_over(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of(model, {"gms": {}})
    assert settings().cohort == ""
    monkeypatch.setenv("GMS_COHORT", "of-an-outer-engine")
    monkeypatch.setenv("GMS_ENGINE", "engine-7")
    seen = set()
    for _ in range(2):
        config_of(model, FAILOVER, UsageContext.LLM_CLASS)
        seen.add(settings().cohort)
    assert len(seen) == 2
    assert "of-an-outer-engine" not in seen
    assert settings().engine == "engine-7"


def test_environment_decides_when_the_block_does_not_say(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_FAILOVER", '{"lock": "gms:test"}')
    config_of(model, {"gms": {"failover": None}})
    assert settings().cohort == ""
    config_of(model, {"gms": {}})
    assert settings().cohort != ""


def test_loader_refuses_when_the_worker_does_not_understand_shared_weights(model: Path) -> None:
    extra: dict[str, Any] = {"gms": {"socket_path": "/nowhere/gms.sock"}}
    config = config_of(model, extra)
    config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    loader = GmsModelLoader(LoadConfig(load_format="gms", model_loader_extra_config=extra))
    with pytest.raises(EngineUnsupported, match="does not understand"):
        loader.load_model(config, config.model_config)
