"""Patches and symbols: found by syntax tree, applied once, reversed, and refused where the engine is not as expected."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gms_core.errors import EngineUnsupported
from gms_core.plugins.findings import Status
from gms_patches import on_import
from gms_patches.apply import MARKER, applied, apply, in_force
from gms_patches.check import check_patch, check_symbol
from gms_patches.on_import import when_imported
from gms_patches.patch import Kind, Patch, Symbol
from gms_patches.source import find, fingerprint, parameters

ENGINE = {
    "fakeengine/__init__.py": "from fakeengine.core import helper as helper\n",
    "fakeengine/core.py": """
        from .parts import Base, imported

        def helper(first, second=2, *, third=None):
            # a comment
            return (first, second, third)

        class Worker(Base):
            field: int = 1

            def __init__(self):
                self.made, self.other = 1, 2

            async def method(self, x, /, y, *args, z, **kwargs):
                return y

            @property
            def shown(self):
                return 1

        try:
            import missing_module
        except ImportError:
            def fallback(a):
                return a

        CONSTANT = 3

        class Record:
            def checked(self, strict=False):
                return strict

        Record = helper("Record", vars(Record))

        class Replaced:
            def gone(self):
                return 1

        Replaced = helper(1)
    """,
    "fakeengine/parts.py": """
        class Base:
            def inherited(self, a, b=1):
                return a

        def imported(x):
            return x
    """,
}

PATCH = Patch(
    name="fake-helper",
    target="fakeengine.core:helper",
    kind=Kind.WRAP,
    distributions=("pytest",),
    versions=">=1",
    signatures=("first, second=, *, third=",),
    reason="A test needs it.",
)


@dataclass
class Source:
    """The source of a fake engine, as the checks see it."""

    root: Path
    version: str = "1.0"

    @property
    def where(self) -> str:
        return str(self.root)

    def text(self, module: str) -> str | None:
        inside = self.root.joinpath(*module.split("."))
        for path in (inside.with_suffix(".py"), inside / "__init__.py"):
            if path.is_file():
                return path.read_text()
        return None


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    for name, text in ENGINE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = in_force()
    yield Source(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "fakeengine"]:
        del sys.modules[name]
    assert in_force() == before


def doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    def helper(*args: Any, **kwargs: Any) -> Any:
        return [original(*args, **kwargs)] * 2

    return helper


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fakeengine.core:helper", "first, second=, *, third="),
        ("fakeengine:helper", "first, second=, *, third="),
        ("fakeengine.core:Worker.method", "self, x, /, y, *args, z, **kwargs"),
        ("fakeengine.core:Worker.inherited", "self, a, b="),
        ("fakeengine.core:imported", "x"),
        ("fakeengine.core:fallback", "a"),
        ("fakeengine.core:Worker", None),
        ("fakeengine.core:Worker.field", None),
        ("fakeengine.core:Worker.made", None),
        ("fakeengine.core:Worker.other", None),
        ("fakeengine.core:CONSTANT", None),
        ("fakeengine.core:Record.checked", "self, strict="),
    ],
)
def test_parameters_are_found_when_a_symbol_is_there(engine: Source, name: str, expected: str | None) -> None:
    found = find(name, engine.text)
    assert found is not None
    assert found.parameters == expected


@pytest.mark.parametrize(
    "name",
    [
        "fakeengine.core:gone",
        "fakeengine.core:Worker.gone",
        "fakeengine.core:Record.gone",
        "fakeengine.core:Replaced.gone",
        "fakeengine.gone:helper",
        "fakeengine.core:helper.inner",
    ],
)
def test_nothing_is_found_when_a_symbol_is_gone(engine: Source, name: str) -> None:
    assert find(name, engine.text) is None


def test_search_ends_when_modules_import_from_each_other(engine: Source) -> None:
    (engine.root / "fakeengine/left.py").write_text("from fakeengine.right import thing\n")
    (engine.root / "fakeengine/right.py").write_text("from fakeengine.left import thing\n")
    assert find("fakeengine.left:thing", engine.text) is None


@pytest.mark.parametrize("name", ["helper", "Worker.method", "Worker.inherited"])
def test_live_parameters_are_those_of_the_source_when_written_the_same_way(engine: Source, name: str) -> None:
    live: Any = importlib.import_module("fakeengine.core")
    for part in name.split("."):
        live = getattr(live, part)
    found = find(f"fakeengine.core:{name}", engine.text)
    assert found is not None
    assert parameters(live) == found.parameters


def test_fingerprint_stays_when_comments_and_blank_lines_change() -> None:
    assert fingerprint("def f():\n    # why\n    return 1\n") == fingerprint("    def f():\n\n        return 1")
    assert fingerprint("def f():\n    return 1\n") != fingerprint("def f():\n    return 2\n")


def test_symbol_fails_when_its_parameters_have_changed(engine: Source) -> None:
    verdict = check_symbol(Symbol("fakeengine.core:helper", "a test", ("first, second=",)), engine)
    assert verdict.status is Status.FAIL
    assert "third" in verdict.evidence
    assert verdict.fix


def test_symbol_fails_when_it_is_no_longer_a_function(engine: Source) -> None:
    assert check_symbol(Symbol("fakeengine.core:CONSTANT", "a test", ("x",)), engine).status is Status.FAIL


def test_symbol_passes_when_this_version_does_not_need_it(engine: Source) -> None:
    assert check_symbol(Symbol("fakeengine.core:gone", "a test", (), ">=2"), engine).status is Status.OK
    assert check_symbol(Symbol("fakeengine.core:gone", "a test", (), ">=1"), engine).status is Status.FAIL


def test_patch_warns_when_only_the_version_is_unknown(engine: Source) -> None:
    assert check_patch(PATCH, engine).status is Status.OK
    assert check_patch(replace(PATCH, versions=">=2"), engine).status is Status.WARN


def test_patch_fails_when_the_code_that_it_replaces_has_changed(engine: Source) -> None:
    found = find(PATCH.target, engine.text)
    assert found is not None
    replacing = replace(PATCH, kind=Kind.REPLACE, fingerprints=(found.fingerprint,))
    assert check_patch(replacing, engine).status is Status.OK
    path = engine.root / "fakeengine/core.py"
    path.write_text(path.read_text().replace("return (first", "return (None"))
    assert check_patch(replacing, engine).status is Status.FAIL


def test_patch_passes_when_the_engine_no_longer_needs_it(engine: Source) -> None:
    for unneeded in (
        replace(PATCH, target="fakeengine.core:gone", unnecessary_from="1.0"),
        replace(PATCH, target="fakeengine.core:not_yet", necessary_from="1.1"),
    ):
        assert check_patch(unneeded, engine).status is Status.OK
    assert check_patch(replace(unneeded, necessary_from="1.0"), engine).status is Status.FAIL


@pytest.mark.usefixtures("engine")
def test_function_is_changed_and_restored_when_a_patch_is_applied_and_reverted() -> None:
    module: Any = importlib.import_module("fakeengine.core")
    original = module.helper
    result = apply(PATCH, doubled)
    assert module.helper(1) == [(1, 2, None)] * 2
    assert getattr(module.helper, MARKER) == PATCH.name
    assert PATCH.name in in_force()
    result.revert()
    result.revert()
    assert module.helper is original


@pytest.mark.usefixtures("engine")
def test_function_is_changed_once_when_a_patch_is_applied_twice() -> None:
    module: Any = importlib.import_module("fakeengine.core")
    first = apply(PATCH, doubled)
    assert apply(PATCH, doubled) is first
    assert module.helper(1) == [(1, 2, None)] * 2
    first.revert()


@pytest.mark.usefixtures("engine")
def test_patch_stays_when_a_scope_inside_another_ends() -> None:
    module: Any = importlib.import_module("fakeengine.core")
    with applied(PATCH, doubled):
        with applied(PATCH, doubled):
            pass
        assert module.helper(1) == [(1, 2, None)] * 2
    assert module.helper(1) == (1, 2, None)


@pytest.mark.usefixtures("engine")
def test_revert_is_refused_when_something_else_patched_the_function_since() -> None:
    module: Any = importlib.import_module("fakeengine.core")
    result = apply(PATCH, doubled)
    ours, module.helper = module.helper, lambda: None
    with pytest.raises(EngineUnsupported, match="something else"):
        result.revert()
    module.helper = ours
    result.revert()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signatures": ("first",)}, "takes"),
        ({"versions": "<1"}, "tested with"),
        ({"target": "fakeengine.core:gone"}, "not there"),
        ({"target": "fakeengine.gone:helper"}, "not there"),
        ({"target": "fakeengine.core:Worker.shown"}, "not a plain function"),
        ({"kind": Kind.REPLACE, "fingerprints": ("0",)}, "not the code"),
        ({"distributions": ("no-such-distribution",)}, "unknown version"),
    ],
)
def test_nothing_is_changed_when_the_engine_is_not_as_the_patch_knows_it(change: dict[str, Any], message: str) -> None:
    module: Any = importlib.import_module("fakeengine.core")
    original = module.helper
    with pytest.raises(EngineUnsupported, match=message) as caught:
        apply(replace(PATCH, **change), doubled)
    assert caught.value.hint
    assert module.helper is original
    assert PATCH.name not in in_force()


@pytest.mark.usefixtures("engine")
def test_version_is_not_checked_but_parameters_are_when_untested_engines_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_ALLOW_UNTESTED_ENGINE", "1")
    apply(replace(PATCH, versions="<1"), doubled).revert()
    with pytest.raises(EngineUnsupported):
        apply(replace(PATCH, signatures=("first",)), doubled)


@pytest.mark.usefixtures("engine")
def test_callback_runs_once_when_the_module_is_imported_later(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests of this process may have loaded the plugins, which wait for engine modules of their own.
    monkeypatch.setattr(on_import, "_waiting", {})
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if type(finder).__module__ != on_import.__name__])
    calls: list[bool] = []
    when_imported("fakeengine.core", lambda: calls.append(hasattr(sys.modules["fakeengine.core"], "CONSTANT")))
    assert calls == []
    module = importlib.import_module("fakeengine.core")
    importlib.import_module("fakeengine.core")
    assert calls == [True]
    assert type(module.__loader__).__module__ != on_import.__name__
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == on_import.__name__]


@pytest.mark.usefixtures("engine")
def test_callback_runs_at_once_when_the_module_is_imported_already() -> None:
    importlib.import_module("fakeengine.core")
    calls: list[int] = []
    when_imported("fakeengine.core", lambda: calls.append(1))
    assert calls == [1]
