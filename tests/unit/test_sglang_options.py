"""What SGLang's options and variables mean for shared weights, without an SGLang: which engines share, and what is refused."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import gms_sglang.failover as failover
import gms_sglang.identity as identity
import gms_sglang.serving as serving
import gms_sglang.unsupported as unsupported
from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import ConfigurationError, EngineUnsupported
from gms_patches.for_sglang.arguments import ARGUMENTS
from gms_sglang.refused_failover import check_failover
from gms_sglang.unsupported import check_engine, check_options, check_quantisation

ADAPTER = Path(inspect.getfile(identity)).parent


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module of SGLang with what the adapter takes from it."""
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_MOONCAKE_CUSTOM_MEM_POOL", "SGLANG_ENABLE_PP_SPEC")
    switches = {name: SimpleNamespace(get=lambda name=name: identity.variables().get(name)) for name in names}
    for name in identity.variables():
        monkeypatch.delenv(name)
    stand_in(monkeypatch, "sglang.srt.environ", envs=SimpleNamespace(**switches))
    group = SimpleNamespace(rank_in_group=1, world_size=2)
    stand_in(monkeypatch, "sglang.srt.distributed.parallel_state", get_tp_group=lambda: group, get_pp_group=lambda: group)


def model(**changes: Any) -> SimpleNamespace:
    config = SimpleNamespace(architectures=["LlamaForCausalLM"], quantization_config=None, to_dict=lambda: {"hidden_size": 8})
    plain = {"dtype": "float16", "quantization": None, "hf_config": config, "model_impl": "auto", "is_draft_model": False, "context_len": 128}
    return SimpleNamespace(**{"model_path": "somebody/model", "revision": None, **plain, **changes})


def fields(monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any], **changes: Any) -> Mapping[str, str]:
    monkeypatch.setattr(identity, "argument", {"device": "cpu", **options}.get)
    monkeypatch.setattr("gms_sglang.place.argument", {"device": "cpu"}.get)
    load_config = SimpleNamespace(draft_model_idx=None)
    return identity.expected_identity(model(**changes), load_config, content="", extra={}).fields


@pytest.mark.parametrize("name", [*identity.PARALLEL, *identity.KERNELS, "init_expert_location"])
def test_engines_do_not_share_when_they_differ_in_an_option_of_the_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = fields(monkeypatch, {}), fields(monkeypatch, {name: 4}) if name != "init_expert_location" else fields(monkeypatch, {name: "{}"})
    assert {key for key in {*one, *other} if one.get(key) != other.get(key)} == {name}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"context_len": 256}, "max_model_len"),
        ({"quantization": "fp8"}, "quantization"),
        ({"model_path": "somebody/else"}, "model"),
        ({"revision": "main"}, "revision"),
        ({"model_impl": "transformers"}, "model_impl"),
        ({"is_draft_model": True}, "draft"),
        ({"hf_config": SimpleNamespace(architectures=["LlamaForCausalLM"], to_dict=lambda: {"hidden_size": 16})}, "model_config"),
    ],
)
def test_engines_do_not_share_when_their_models_differ(change: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = fields(monkeypatch, {}), fields(monkeypatch, {}, **change)
    assert {key for key in {*one, *other} if one.get(key) != other.get(key)} == {field}


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("SGLANG_SHARED_EXPERT_TP1", True),
        ("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", True),
        ("SGLANG_OPT_FUSE_WQA_WKV", True),
        ("SGLANG_DSPARK_OPT_MARKOV_W2_TP_SHARD", True),
        ("SGLANG_ROPE_CACHE_FP32", True),
        ("SGL_SOMETHING_NEW", True),
        ("SGLANG_RUN_ID", False),
        ("SGLANG_LOG_MS", False),
        ("SGLANG_TCP_STORE_PORT", False),
        ("SGLANG_PLUGINS", False),
        ("SGLANG_DG_CACHE_DIR", False),
        ("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", False),
        ("GMS_CACHE_DIR", False),
    ],
)
def test_variable_is_compared_when_it_may_decide_the_layout(name: str, matters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fields(monkeypatch, {})
    monkeypatch.setenv(name, "1")
    assert (fields(monkeypatch, {}) != one) is matters


def test_locations_of_experts_are_the_same_when_files_say_the_same(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "c.pt")]
    for path, content in zip(files, ("[1]", "[1]", "[2]"), strict=True):
        path.write_text(content)
    a, b, c = (identity.expert_location(str(path)) for path in files)
    assert a == b != c
    assert [identity.expert_location(value) for value in (None, "trivial", "gone.json")] == ["", "trivial", "gone.json"]


def asked_for(path: Path) -> set[str]:
    """Names of options in a module: what it asks ``option`` and ``argument`` for."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    asking = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id in ("option", "argument") and node.args)
    return {node.args[0].value for node in asking if isinstance(node.args[0], ast.Constant)}


def test_contract_has_every_option_that_the_adapter_asks_for() -> None:
    known = {symbol.target.rpartition(".")[2] for symbol in ARGUMENTS}
    asked = {*identity.PARALLEL, *identity.KERNELS}.union(*map(asked_for, ADAPTER.glob("*.py")))
    assert len(asked) > 40
    assert asked - known == set()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"enable_eplb": True}, "expert load balancer"),
    ({"elastic_ep_backend": "mooncake"}, "elastic expert parallelism"),
    ({"cpu_offload_gb": 1}, "offloaded to host memory"),
    ({"offload_group_size": 2}, "offloaded to host memory"),
    ({"ple_offload_embedding": True}, "offloaded to host memory"),
    ({"kt_weight_path": "x"}, "KTransformers"),
    ({"enable_weights_cpu_backup": True}, "a copy of the weights"),
    ({"enable_draft_weights_cpu_backup": True}, "a copy of the weights"),
    ({"enable_memory_saver": True}, "torch_memory_saver"),
    ({"weight_cache_mode": "client"}, "weight cache"),
    ({"quantization": "bitsandbytes"}, "load format of its own"),
    ({"quantization": "gguf"}, "load format of its own"),
    ({"modelopt_quant": "fp8"}, "ModelOpt"),
    ({"quantize_and_serve": True}, "ModelOpt"),
    ({"torchao_config": "int4wo-128"}, "torchao"),
    ({"rl_quant_profile": "x"}, "FlashRL"),
    ({"startup_weight_load_mode": "overlap"}, "CUDA graphs are captured"),
    ({"encoder_only": True}, "encoders alone"),
    ({"load_format": "runai_streamer"}, "'runai_streamer' for somebody/model by itself"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_option_is_refused_when_it_cannot_go_with_shared_weights(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineUnsupported, match=words):
        check_options({"load_format": "gms", "model_path": "somebody/model", **options}.get, asked=True)


@pytest.mark.parametrize("name", ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_MOONCAKE_CUSTOM_MEM_POOL"])
def test_variable_is_refused_when_it_brings_another_allocator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_options({"load_format": "gms"}.get, asked=True)
    monkeypatch.setenv(name, "1")
    with pytest.raises(EngineUnsupported, match=name):
        check_options({"load_format": "gms"}.get, asked=True)


def test_version_is_refused_when_nothing_was_tested_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsupported, "installed_version", lambda _: "0.5.20")
    check_engine("cpu")
    with pytest.raises(EngineUnsupported, match="not on xpu"):
        check_engine("xpu:0")
    monkeypatch.setattr(unsupported, "installed_version", lambda _: "0.5.15")
    with pytest.raises(EngineUnsupported, match=r"not with 0\.5\.15"):
        check_engine("cpu")
    monkeypatch.setenv("GMS_ALLOW_UNTESTED_ENGINE", "1")
    check_engine("cpu")


@pytest.mark.parametrize("inner", unsupported.NO_INNER)
def test_load_format_is_refused_when_it_cannot_read_for_gms(inner: str) -> None:
    with pytest.raises(ConfigurationError, match=f"inner: '{inner}' cannot be used"):
        check_options({"load_format": "gms", "model_loader_extra_config": f'{{"gms": {{"inner": "{inner}"}}}}'}.get, asked=True)


STAGES = {"load_format": "gms", "speculative_algorithm": "EAGLE", "pp_size": 2}


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (STAGES, True),
        ({**STAGES, "load_format": "auto", "speculative_draft_load_format": "gms"}, True),
        ({**STAGES, "speculative_draft_load_format": "auto"}, False),
        ({**STAGES, "pp_size": 1}, False),
        ({**STAGES, "speculative_algorithm": None}, False),
    ],
)
def test_draft_is_refused_when_only_the_last_stage_would_load_it(options: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_options(options.get, asked=False)
    monkeypatch.setenv("SGLANG_ENABLE_PP_SPEC", "1")
    if refused:
        with pytest.raises(EngineUnsupported, match="only the last pipeline stage"):
            check_options(options.get, asked=False)
    else:
        check_options(options.get, asked=False)


@pytest.mark.parametrize(
    ("method", "already", "inner", "refused"),
    [
        ("modelopt_fp8", False, "auto", True),
        ("auto-round-int8", False, "safetensors", True),
        ("modelopt_fp8", True, "auto", False),
        ("modelopt_fp8", False, "dummy", False),
        ("modelopt_fp4", False, "auto", False),  # converted by the loader that others use too
        ("fp8", False, "auto", False),
        (None, False, "auto", False),
    ],
)
def test_quantisation_is_refused_when_it_replaces_the_model_while_loading(method: str | None, already: bool, inner: str, refused: bool) -> None:
    config = model(quantization=method, _is_already_quantized=lambda: already)
    if refused:
        with pytest.raises(EngineUnsupported, match=f"--quantization {method} quantises somebody/model while it loads"):
            check_quantisation(config, inner)
    else:
        check_quantisation(config, inner)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grpc_mode": True}, "gRPC front end"),
        ({"tokenizer_worker_num": 2, "enable_ssl_refresh": True}, "certificates are not refreshed"),
        ({"detokenizer_worker_num": 2}, "several detokenizers"),
        ({"dp_size": 2}, "data parallelism"),
    ],
)
def test_option_is_refused_when_its_engine_could_not_fail_over(options: dict[str, Any], words: str) -> None:
    check_failover({"tokenizer_worker_num": 1, "detokenizer_worker_num": 1}.get)
    with pytest.raises(EngineUnsupported, match=words):
        check_failover(options.get)


@pytest.mark.parametrize("options", [{"enable_hierarchical_cache": True}, {"pp_size": 2}, {"speculative_algorithm": "EAGLE"}])
def test_option_is_refused_when_its_kv_memory_could_not_be_handed_over(options: dict[str, Any]) -> None:
    asked = {"load_format": "gms", "model_loader_extra_config": '{"gms": {"failover": {"lock": "gms:primary"}}}'}
    check_options(asked.get, asked=True)
    with pytest.raises(EngineUnsupported, match="cannot hand its KV memory over"):
        check_options({**asked, **options}.get, asked=True)


def test_engine_is_served_as_ever_when_one_that_fails_over_was_here_before(monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace(load_format="gms")
    monkeypatch.setattr(failover, "_begun", failover.Begun(record, {}.get, GmsConfig(), FailoverConfig(lock="gms:primary")))
    serving._begin_server(SimpleNamespace(load_format="auto"))
    assert failover.begun() is None
    assert serving._run_http_server(lambda *_: "served", *[None] * 6) == "served"
