"""What the adapter for SGLang takes for granted in SGLang's code beyond names and parameters: parts of the wheels' sources, run by themselves."""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import logging
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import uvicorn
from engine_wheels import SGLANG

from gms_core.plugins.engines import EngineSource
from gms_core.sleep import TAGS
from gms_patches.patch import Kind, Patch
from gms_sglang.hooks import Hook, is_in_place
from gms_sglang.tokenizer_workers import APP

pytestmark = pytest.mark.wheels

ORIGIN = """
def answer(number, *, more=0):
    return number + more


class Saver:
    @staticmethod
    def create(enable):
        return enable

    @classmethod
    def launch(cls):
        return cls
"""


@pytest.fixture(params=SGLANG.versions)
def source(request: pytest.FixtureRequest) -> Iterator[EngineSource]:
    with SGLANG.wheel(request.param) as wheel:
        yield wheel


def tree(source: EngineSource, module: str) -> ast.Module:
    text = source.text(module)
    assert text is not None
    return ast.parse(text)


def defined(body: ast.Module | ast.ClassDef, name: str) -> Any:
    (node,) = (node for node in body.body if getattr(node, "name", "") == name)
    return node


def run_alone(function: ast.FunctionDef, **names: object) -> Any:
    """A function of the engine without its module; `names` are the globals that it finds."""
    code = ast.Module([function], [])
    # Annotations stay text, as in this module, so nothing has to be there for them.
    exec(compile(code, function.name, "exec"), names)
    return names[function.name]


def calls(node: ast.AST) -> list[str]:
    """Names of the functions that are called, in the order of the text."""
    found = sorted((call for call in ast.walk(node) if isinstance(call, ast.Call)), key=lambda call: (call.lineno, call.col_offset))
    return [call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in found]


def known(prefix: str) -> set[str]:
    return {entry.target.removeprefix(prefix) for entry in (*SGLANG.symbols, *SGLANG.patches) if entry.target.startswith(prefix)}


@pytest.fixture
def registry(source: EngineSource, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's registry of hooks, and two modules for it to hook: one defines, the other has imported from it."""
    module = types.ModuleType("hook_registry")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    text = source.text("sglang.srt.plugins.hook_registry")
    assert text is not None
    exec(text, vars(module))
    origin, importer = types.ModuleType("hooked_origin"), types.ModuleType("hooked_importer")
    exec(ORIGIN, vars(origin))
    importer.answer = origin.answer
    for hooked in (origin, importer):
        monkeypatch.setitem(sys.modules, hooked.__name__, hooked)
    return SimpleNamespace(hooks=module.HookRegistry, kind=module.HookType, origin=origin, importer=importer)


def test_hooks_take_effect_in_every_module_when_they_are_applied(registry: Any) -> None:
    registry.hooks.register("hooked_origin.answer", lambda number, *, more=0: ((number * 10,), {"more": more}), registry.kind.BEFORE)
    registry.hooks.apply_hooks()
    assert registry.origin.answer(1, more=2) == 12
    assert registry.importer.answer(1, more=2) == 12


def test_a_hook_applies_to_a_static_method_when_it_is_registered_later(registry: Any) -> None:
    registry.hooks.apply_hooks()
    registry.hooks.register("hooked_origin.Saver.create", lambda original, enable: ("ours", original(enable)), registry.kind.AROUND)
    registry.hooks.apply_hooks()
    assert registry.origin.Saver.create(enable=True) == ("ours", True)
    assert registry.origin.Saver().create(False) == ("ours", False)


def test_a_replacement_stands_in_for_a_function_when_it_is_applied(registry: Any) -> None:
    registry.hooks.register("hooked_origin.answer", lambda number, *, more=0: "replaced", registry.kind.REPLACE)
    registry.hooks.apply_hooks()
    assert registry.importer.answer(1) == "replaced"


def _hook(target: str) -> Hook:
    patch = Patch("test", target, Kind.WRAP, ("sglang",), "", (), "")
    return Hook(patch, "after", lambda result, *_, **__: None)


METHODS = ("hooked_origin:Saver.create", "hooked_origin:Saver.launch")


def test_a_hook_is_seen_to_be_in_place_when_it_was_applied(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    hooks = [_hook("hooked_origin:gone"), _hook("hooked_origin:answer"), *map(_hook, METHODS)]
    for hook in hooks:
        registry.hooks.register(hook.target, hook.function, registry.kind.AFTER)
        registry.hooks.register(hook.target, lambda *_, **__: None, registry.kind.BEFORE)
    assert not any(map(is_in_place, hooks))
    with caplog.at_level(logging.CRITICAL):
        registry.hooks.apply_hooks()
    assert [is_in_place(hook) for hook in hooks] == [False, True, True, True]


def test_a_hook_is_not_in_place_when_it_comes_after_those_that_were_applied(registry: Any) -> None:
    early, late = _hook("hooked_origin:answer"), _hook("hooked_origin:answer")
    for hook in (early, late):
        registry.hooks.register(hook.target, hook.function, registry.kind.AFTER)
        registry.hooks.apply_hooks()
    assert [is_in_place(hook) for hook in (early, late)] == [True, False]


def test_an_error_of_a_hook_reaches_the_caller_when_it_refuses(registry: Any) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("refused")

    registry.hooks.register("hooked_origin.answer", refuse, registry.kind.BEFORE)
    registry.hooks.apply_hooks()
    with pytest.raises(ValueError, match="refused"):
        registry.origin.answer(1)


def test_plugins_are_found_under_the_group_that_the_package_registers_them_in(source: EngineSource) -> None:
    groups = {
        node.targets[0].id: node.value.value
        for node in tree(source, "sglang.srt.plugins").body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    assert groups["GENERAL_PLUGINS_GROUP"] == "sglang.srt.plugins"


def test_plugins_are_loaded_before_arguments_are_parsed_and_before_a_scheduler_is_made(source: EngineSource) -> None:
    launched = calls(tree(source, "sglang.launch_server"))
    assert launched.index("load_plugins") < launched.index("prepare_server_args")
    scheduler = calls(defined(tree(source, "sglang.srt.managers.scheduler"), "run_scheduler_process"))
    assert scheduler.index("load_plugins") < scheduler.index("Scheduler")


def test_a_load_format_that_is_a_class_is_left_as_it_is_and_made_the_loader(source: EngineSource) -> None:
    class Loader:
        def __init__(self, load_config: object) -> None:
            self.load_config = load_config

    chosen = SimpleNamespace(load_format=Loader)
    config = defined(tree(source, "sglang.srt.configs.load_config"), "LoadConfig")
    run_alone(defined(config, "_verify_load_format"))(chosen)
    assert chosen.load_format is Loader
    get_model_loader = run_alone(
        defined(tree(source, "sglang.srt.model_loader.loader"), "get_model_loader"), LoadFormat=MagicMock(), logger=MagicMock()
    )
    chosen.modelopt_config = None
    loader = get_model_loader(chosen, None)
    assert isinstance(loader, Loader)
    assert loader.load_config is chosen


def test_the_table_has_every_method_of_the_memory_saver_that_an_adapter_stands_in_for(source: EngineSource) -> None:
    saver = defined(tree(source, "sglang.srt.utils.torch_memory_saver_adapter"), "TorchMemorySaverAdapter")
    methods = {node.name for node in saver.body if isinstance(node, ast.FunctionDef)}
    assert methods == known("sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.")


def test_the_table_has_every_way_to_write_new_weights_that_is_to_be_refused(source: EngineSource) -> None:
    module = "sglang.srt.managers.scheduler_components.weight_updater"
    updater = defined(tree(source, module), "SchedulerWeightUpdaterManager")
    methods = {node.name for node in updater.body if isinstance(node, ast.FunctionDef)}
    writing = {name for name in methods if name.startswith("update_weights") or name in ("begin_weight_update", "end_weight_update")}
    ordinary = {"init_weights_update_group", "destroy_weights_update_group", "flush_cache_after_weight_update"}
    assert {name for name in methods if "weight" in name and "update" in name and "version" not in name} - ordinary == writing
    assert writing | {"check_weights"} <= known(f"{module}:SchedulerWeightUpdaterManager.")


POOLS = [("MHATokenToKVPool", "_create_buffers_normal", {"k_buffer", "v_buffer"}), ("MLATokenToKVPool", "_create_buffers", {"kv_buffer"})]


@pytest.mark.parametrize(("name", "method", "made"), POOLS)
def test_a_pool_makes_only_its_values_and_on_the_device_that_it_names(source: EngineSource, name: str, method: str, made: set[str]) -> None:
    module = tree(source, "sglang.srt.mem_cache.memory_pool")
    create = run_alone(
        defined(defined(module, name), method),
        torch=torch,
        nullcontext=contextlib.nullcontext,
        ceil_align=lambda number, step: -(-number // step) * step,
        GPU_MEMORY_TYPE_KV_CACHE="kv_cache",
    )
    regions: list[str] = []
    asked: dict[str, Any] = {
        "memory_saver_adapter": SimpleNamespace(region=lambda tag: regions.append(tag) or contextlib.nullcontext()),
        "_kv_buffer_shapes": lambda: ((80, 2, 4), (80, 2, 4)),
        "enable_custom_mem_pool": False,
        "custom_mem_pool": None,
        "kv_cache_layout": "nhd",
        "use_hnd": False,
        "store_dtype": torch.int8,
        "device": "meta",
        "layer_num": 3,
        "size": 64,
        "page_size": 16,
        "kv_cache_dim": 8,
    }
    pool = SimpleNamespace(**asked)
    create(pool)
    assert regions == ["kv_cache"]
    assert set(vars(pool)) - set(asked) == made
    tensors = [tensor for attribute in made for tensor in getattr(pool, attribute)]
    assert len(tensors) == 3 * len(made)
    assert all(tensor.is_meta and tensor.shape[0] == 80 for tensor in tensors)


def test_release_and_resume_know_the_kinds_of_memory_that_an_adapter_does(source: EngineSource) -> None:
    constants: dict[str, Any] = {}
    text = source.text("sglang.srt.constants")
    assert text is not None
    exec(text, constants)
    assert set(constants["GPU_MEMORY_ALL_TYPES"]) == {*TAGS, "cuda_graph"}


def test_every_request_comes_to_the_queue_by_the_function_that_is_hooked(source: EngineSource) -> None:
    scheduler = defined(tree(source, "sglang.srt.managers.scheduler"), "Scheduler")
    adding = {
        method.name
        for method in scheduler.body
        if isinstance(method, ast.FunctionDef)
        for call in ast.walk(method)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"self.waiting_queue.{way}" for way in ("append", "extend", "insert")}
    }
    assert adding == {"_add_request_to_queue"}


@pytest.mark.parametrize("name", ["release_memory_occupation", "resume_memory_occupation"])
def test_schedulers_are_asked_for_their_memory_by_the_communicator_that_an_adapter_asks(source: EngineSource, name: str) -> None:
    mixin = defined(tree(source, "sglang.srt.managers.tokenizer_control_mixin"), "TokenizerControlMixin")
    attributes = {node.attr for node in ast.walk(defined(mixin, name)) if isinstance(node, ast.Attribute)}
    assert {"auto_create_handle_loop", f"{name}_communicator"} <= attributes


def names(function: ast.FunctionDef) -> set[str]:
    """What a function may take from its module."""
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - set(dir(builtins))


def test_several_tokenizer_workers_are_started_by_the_one_call_that_is_stood_in_for(source: EngineSource, monkeypatch: pytest.MonkeyPatch) -> None:
    function = defined(tree(source, "sglang.srt.entrypoints.http_server"), "_setup_and_run_http_server")
    serving = SimpleNamespace(
        tokenizer_worker_num=2,
        enable_http2=False,
        enable_ssl_refresh=False,
        enable_http_worker_reuseport=False,
        ssl_certfile=None,
        host="127.0.0.1",
        port=8000,
    )
    globals_ = {name: MagicMock() for name in (*names(function), "get_serving", "envs")}
    globals_["get_serving"].return_value = arguments = MagicMock(**vars(serving))
    globals_["envs"].SGLANG_HTTP_SERVER_APP_PATH.get.return_value = app_path(source)
    monkeypatch.setitem(sys.modules, "uvicorn.config", MagicMock())
    run_alone(function, **globals_)(arguments, *(MagicMock() for _ in range(5)))
    (call,) = globals_["uvicorn"].run.call_args_list
    assert (call.args, call.kwargs["workers"], call.kwargs["host"], call.kwargs["port"]) == ((APP,), 2, "127.0.0.1", 8000)
    assert call.kwargs.keys() <= inspect.signature(uvicorn.Config).parameters.keys()
    assert not globals_["uvicorn"].Server.called


def app_path(source: EngineSource) -> str:
    """The app that workers serve where nobody names another; before 0.5.21 nobody can."""
    for node in defined(tree(source, "sglang.srt.environ"), "Envs").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SGLANG_HTTP_SERVER_APP_PATH":
            assert isinstance(node.value, ast.Call)
            return str(ast.literal_eval(node.value.args[0]))
    return APP


def test_a_tokenizer_worker_finds_its_engine_by_the_process_that_has_started_it(source: EngineSource) -> None:
    function = defined(tree(source, "sglang.srt.managers.multi_tokenizer_mixin"), "get_main_process_id")
    process = SimpleNamespace(_parent_pid=7)
    assert run_alone(function, multiprocessing=SimpleNamespace(current_process=lambda: process))() == 7


def test_several_tokenizer_workers_have_an_app_each_that_is_not_started_for_one(source: EngineSource) -> None:
    module = tree(source, "sglang.srt.entrypoints.http_server")
    assert "init_multi_tokenizer" in calls(defined(module, "lifespan"))
    assert {"get_main_process_id", "read_from_shared_memory", "set_global_state"} <= set(calls(defined(module, "init_multi_tokenizer")))
