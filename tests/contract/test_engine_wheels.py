"""Each adapter against real wheels and the engine that is installed: every symbol that it touches is there, with the parameters it needs."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_wheels import ENGINES, ROOT, SGLANG, VLLM, Engine

from gms_core.plugins.engines import EngineSource, find_installed
from gms_core.plugins.findings import Status
from gms_patches.check import check_patch, check_symbol, in_range, is_needed
from gms_patches.patch import Patch, Symbol
from gms_patches.source import find

WHEELS = [pytest.param(engine, version, id=f"{engine}-{version}") for engine in ENGINES for version in engine.versions]
REGISTRATIONS = ("register", "plugin_hook")


@pytest.mark.wheels
@pytest.mark.parametrize(("engine", "version"), WHEELS)
def test_adapter_fits_when_it_meets_a_real_wheel(engine: Engine, version: str) -> None:
    with engine.wheel(version) as source:
        verdicts = engine.adapter.check(source)
    assert [verdict for verdict in verdicts if verdict.status is not Status.OK] == []
    assert len(verdicts) == 1 + len(engine.patches) + len(engine.symbols)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_tested_version_is_what_pip_installs_when_the_extra_is_asked_for(engine: Engine) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"{engine.adapter.package}{engine.adapter.tested}" in extras[engine.adapter.name]
    assert all(in_range(version, engine.adapter.tested) for version in engine.versions)


@pytest.mark.engine
def test_adapter_fits_when_it_meets_the_engine_that_is_installed() -> None:
    source = find_installed(VLLM.adapter)
    assert source is not None
    assert [verdict for verdict in VLLM.adapter.check(source) if verdict.status is not Status.OK] == []


@dataclass(frozen=True)
class Changed:
    """An engine's source in which one word is another."""

    source: EngineSource
    word: str
    other: str

    @property
    def version(self) -> str:
        return self.source.version

    @property
    def where(self) -> str:
        return self.source.where

    def text(self, module: str) -> str | None:
        text = self.source.text(module)
        return None if text is None else re.sub(rf"\b{self.word}\b", self.other, text)


GONE = [
    (VLLM, "vllm.v1.worker.gpu_worker:Worker.load_model", "load_model"),
    (VLLM, "vllm.v1.worker.gpu_worker:Worker.load_model", "load_dummy_weights"),
    (VLLM, "vllm.config.load:LoadConfig.model_loader_extra_config", "model_loader_extra_config"),
    (SGLANG, "sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.region", "region"),
    (SGLANG, "sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.region", "enable_cpu_backup"),
    (SGLANG, "sglang.srt.mem_cache.memory_pool:ReqToTokenPool.req_to_token", "req_to_token"),
]


@pytest.mark.wheels
@pytest.mark.parametrize(("engine", "target", "word"), GONE)
def test_check_fails_when_a_symbol_or_a_parameter_goes(engine: Engine, target: str, word: str) -> None:
    (symbol,) = (symbol for symbol in engine.symbols if symbol.target == target)
    with engine.wheel(engine.versions[-1]) as source:
        assert check_symbol(symbol, source).status is Status.OK
        assert check_symbol(symbol, Changed(source, word, f"{word}_no_more")).status is Status.FAIL


@pytest.mark.wheels
def test_check_fails_when_the_code_of_a_function_that_is_replaced_changes() -> None:
    (patch,) = (patch for patch in SGLANG.patches if patch.name == "sglang-export-static-state")
    with SGLANG.wheel(SGLANG.versions[-1]) as source:
        assert check_patch(patch, source).status is Status.OK
        assert "has changed" in check_patch(patch, Changed(source, "named_buffers", "named_parameters")).evidence


def wanted(needed: Symbol | Patch, version: str) -> bool:
    """Whether an adapter needs this with an engine of that version."""
    if isinstance(needed, Symbol):
        return not needed.versions or in_range(version, needed.versions)
    return is_needed(needed, version)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_table_has_no_entry_that_no_wheel_can_try(engine: Engine) -> None:
    entries = [*engine.symbols, *engine.patches]
    assert [entry.target for entry in entries if not any(wanted(entry, version) for version in engine.versions)] == []
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_patches_have_names_of_their_own(engine: Engine) -> None:
    names = [patch.name for patch in engine.patches]
    assert len(set(names)) == len(names)
    assert all(name.startswith(f"{engine}-") for name in names)


@pytest.mark.wheels
@pytest.mark.parametrize("version", SGLANG.versions)
def test_a_hook_lies_where_its_target_is_defined(version: str) -> None:
    # A name that is only imported there could be hooked too, but not for those who import it from its own module later.
    with SGLANG.wheel(version) as source:
        for patch in SGLANG.patches:
            if wanted(patch, version):
                found = find(patch.target, source.text)
                assert found is not None
                assert found.module == patch.target.partition(":")[0]


def _called(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def touched(text: str, package: str) -> Iterator[str]:
    """Symbols of an engine that a module names: imported, reached through an imported module, asked for with ``hasattr`` or ``getattr``, hooked."""
    tree = ast.parse(text)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update({alias.asname or alias.name: alias.name for alias in node.names if alias.name.split(".")[0] == package})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield f"{modules[node.value.id]}:{node.attr}"
        elif isinstance(node, ast.Call) and (_called(node, "hasattr") or _called(node, "getattr")) and isinstance(node.args[0], ast.Name):
            module, name = modules.get(node.args[0].id), node.args[1]
            if module is not None and isinstance(name, ast.Constant):
                yield f"{module}:{name.value}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and node.args:
            function, target = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, node.args[0]
            if function in REGISTRATIONS and isinstance(target, ast.Constant) and str(target.value).startswith(f"{package}."):
                yield str(target.value)


SOURCES = [pytest.param(engine, path, id=f"{path.parent.name}-{path.name}") for engine in ENGINES for path in sorted(engine.folder.glob("**/*.py"))]


@pytest.mark.parametrize(("engine", "path"), SOURCES)
def test_table_has_every_symbol_when_the_adapter_names_one(engine: Engine, path: Path) -> None:
    known = {entry.target for entry in (*engine.symbols, *engine.patches)}
    # A hook's registry takes dots throughout.
    known |= {patch.target.replace(":", ".") for patch in engine.patches}
    assert set(touched(path.read_text(), engine.adapter.package)) - known == set()


def test_a_symbol_is_noticed_when_a_module_names_it() -> None:
    text = "import vllm.a.b as c\nfrom vllm.d import e\nc.f()\nhasattr(c, 'g')\nRegistry.register('vllm.h.i', e)\nRegistry.register('other', e)\n"
    assert set(touched(text, "vllm")) == {"vllm.d:e", "vllm.a.b:f", "vllm.a.b:g", "vllm.h.i"}
    assert set(touched(text, "sglang")) == set()
