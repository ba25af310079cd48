"""The adapter for vLLM against real wheels and the engine that is installed: every symbol that it touches is there, with the parameters it needs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_core.plugins.engines import WheelSource, find_installed, open_wheel
from gms_core.plugins.findings import Status
from gms_patches.check import check_symbol
from gms_patches.for_vllm import PATCHES, SYMBOLS
from gms_patches.patch import Symbol
from gms_vllm.plugin import gms_engines

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "wheels"
ADAPTER = ROOT / "integrations" / "gms_vllm"
VERSIONS = ("0.26.0", "0.30.0", "0.33.0")


@pytest.fixture(params=VERSIONS)
def wheel(request: pytest.FixtureRequest) -> Iterator[WheelSource]:
    (path,) = WHEELS.glob(f"vllm-{request.param}-*.whl")
    (adapter,) = gms_engines()
    with open_wheel(adapter, path) as source:
        assert source.version == request.param
        yield source


@pytest.mark.wheels
def test_adapter_fits_when_it_meets_a_real_wheel(wheel: WheelSource) -> None:
    (adapter,) = gms_engines()
    verdicts = adapter.check(wheel)
    assert [verdict for verdict in verdicts if verdict.status is not Status.OK] == []
    assert len(verdicts) == 1 + len(PATCHES) + len(SYMBOLS)


@pytest.mark.engine
def test_adapter_fits_when_it_meets_the_engine_that_is_installed() -> None:
    (adapter,) = gms_engines()
    source = find_installed(adapter)
    assert source is not None
    assert [verdict for verdict in adapter.check(source) if verdict.status is not Status.OK] == []


@pytest.mark.wheels
def test_check_fails_when_a_symbol_is_not_in_the_wheel(wheel: WheelSource) -> None:
    assert check_symbol(Symbol("vllm.v1.worker.gpu_worker:Worker.no_such_method", "a test"), wheel).status is Status.FAIL
    assert check_symbol(Symbol("vllm.v1.worker.gpu_worker:Worker.load_model", "a test", ("self",)), wheel).status is Status.FAIL


def _called(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def touched(text: str) -> Iterator[str]:
    """Symbols of vLLM that a module names: imported by name, reached through an imported module, or asked for with ``hasattr`` and ``getattr``."""
    tree = ast.parse(text)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update({alias.asname or alias.name: alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield f"{modules[node.value.id]}:{node.attr}"
        elif isinstance(node, ast.Call) and (_called(node, "hasattr") or _called(node, "getattr")) and isinstance(node.args[0], ast.Name):
            module, name = modules.get(node.args[0].id), node.args[1]
            if module is not None and isinstance(name, ast.Constant):
                yield f"{module}:{name.value}"


@pytest.mark.parametrize("path", sorted(ADAPTER.glob("*.py")), ids=lambda path: path.name)
def test_table_has_every_symbol_when_the_adapter_names_one(path: Path) -> None:
    known = {symbol.target for symbol in SYMBOLS} | {patch.target for patch in PATCHES}
    assert set(touched(path.read_text())) - known == set()


def test_a_symbol_is_noticed_when_a_module_names_it() -> None:
    text = "import vllm.a.b as c\nfrom vllm.d import e\nc.f()\nhasattr(c, 'g')\n"
    assert set(touched(text)) == {"vllm.d:e", "vllm.a.b:f", "vllm.a.b:g"}
