"""Rules of the code base that no linter knows."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADAPTERS = ("gms_sglang", "gms_trtllm", "gms_vllm")
PACKAGES = [ROOT / "gms_core", *(ROOT / "integrations" / name for name in ADAPTERS), ROOT / "patches/gms_patches", ROOT / "tools/bench"]
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
MOST_LINES = 400
HEAVY = {"torch", "pydantic", "rich", "vllm", "sglang", "tensorrt_llm", "cuda", "numpy", "packaging", "uvicorn"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _in_cli(path: Path) -> bool:
    return path.is_relative_to(ROOT / "gms_core/cli")


def _calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after it ran this code."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[-1].split())


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_can_be_told_in_one_sentence_when_it_is_read(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) <= MOST_LINES
    assert ast.get_docstring(tree) or not source.strip(), "a module begins with a sentence on what it is for"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_environment_is_read_by_config_alone_when_code_needs_it(path: Path) -> None:
    if path == ROOT / "gms_core/config.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in {"environ", "environb", "getenv", "putenv"}, f"line {node.lineno}: gms_core.config reads the environment"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "environb", "getenv", "putenv"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", [path for path in MODULES if not _in_cli(path)], ids=_name)
def test_only_the_command_line_exits_prints_and_configures_logging_when_code_runs(path: Path) -> None:
    ending, printing = {"sys.exit", "os._exit", "exit", "quit"}, {"print", "sys.stdout.write", "sys.stderr.write"}
    forbidden = ending | printing | {"logging.basicConfig", "logging.config.dictConfig"}
    tree = ast.parse(path.read_text())
    # The main block of a process of its own is the one place that turns a result into an exit code.
    body = [node for node in tree.body if not _is_main_block(node)]
    found = [f"line {line}: {call}" for statement in body for call, line in _calls(statement) if call in forbidden]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_errors_are_raised_or_logged_when_they_are_caught_broadly(path: Path) -> None:
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            broad = ast.unparse(node.type) in {"Exception", "BaseException"}
            told = any(isinstance(inner, ast.Raise) for inner in ast.walk(node)) or any(call == "log.exception" for call, _ in _calls(node))
            assert not broad or told or "noqa: BLE001 - " in lines[node.lineno - 1], f"line {node.lineno}: say why everything is caught"


@pytest.mark.parametrize(
    "code",
    [
        "import gms_core",
        "import gms_core.client, gms_core.layout, gms_core.errors",
        "import gms_core.server.supervisor, gms_core.server.device_server",
        "import gms_core.failover.control, gms_core.failover.follower, gms_core.failover.http, gms_core.failover.notifications",
        "import gms_core.failover.locks, gms_core.failover.promotion",
        "import gms_core.kv.private, gms_core.kv.rank, gms_core.sleep",
        "import gms_core.failover.front_end.api_server, gms_core.failover.front_end.gate, gms_core.failover.front_end.rehearsal",
        "import gms_core.cli, gms_core.cli.serve, gms_core.devices, gms_core.runtime_dir",
        "import gms_trtllm",
    ],
)
def test_nothing_heavy_is_imported_when_the_core_is(code: str) -> None:
    assert _loaded_after(code) & HEAVY == set()


def test_nothing_heavy_is_imported_when_serve_starts(tmp_path: Path) -> None:
    # The whole path of the command, up to the point where the devices' processes are started.
    code = f"""
import gms_core.server.supervisor as supervisor
supervisor.serve = lambda devices, directory, host_memory, on_ready, **_: 0
from gms_core.cli import gms
gms(["serve", "--device", "host", "--runtime-dir", {str(tmp_path)!r}], standalone_mode=False)
"""
    assert _loaded_after(code) & HEAVY == set()


def test_every_public_name_exists_when_a_package_lists_it() -> None:
    import gms_core

    for module in pkgutil.walk_packages(gms_core.__path__, "gms_core."):
        if not module.ispkg:
            continue
        loaded = importlib.import_module(module.name)
        for name in getattr(loaded, "__all__", ()):
            assert hasattr(loaded, name), f"{module.name}.{name}"


def test_no_module_is_a_drawer_when_it_is_named() -> None:
    assert [_name(path) for path in MODULES if {"utils", "util", "common", "helpers", "misc"} & {path.stem, *path.parts}] == []
